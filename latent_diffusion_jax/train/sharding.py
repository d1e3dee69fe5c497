"""How arrays lie on the devices: a mesh with axes `data` and `fsdp`, everything else from shapes.

Batches are split over both axes. Parameters, optimiser state and averages are split over `fsdp` on
their largest dimension that divides (ZeRO-3: Rajbhandari et al. 2020) and copied over `data`.
Models know nothing of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from latent_diffusion_jax.errors import UserError

MIN_SIZE = 2**16  # elements: below, gathering costs more than the copy
AnyMesh = Mesh | AbstractMesh
AXES = ("data", "fsdp")
AXIS_TYPES = (AxisType.Auto,) * 2  # Linen's convolutions fail on the Explicit ones of the default


def make_mesh(*, data: int = -1, fsdp: int = 1, slices: int = 0) -> Mesh:
    """Makes the mesh; `data=-1` takes the devices that `fsdp` leaves.

    `slices` are what a slower network joins: of a TPU, or nodes of GPUs. `data` goes across them,
    `fsdp` stays inside one. 0: those that the devices tell of; N: as many, in order; 1: no matter.

    Raises:
      UserError: the devices do not divide into these axes, or fsdp would go across slices.
    """
    data, fsdp = _axes(jax.device_count(), data, fsdp)
    return Mesh(arrange(jax.devices()[: data * fsdp], fsdp, slices), AXES, axis_types=AXIS_TYPES)


def plan_mesh(devices: int, *, data: int = -1, fsdp: int = 1, slices: int = 0) -> AbstractMesh:
    """The same of devices that need not be there, to lay shapes out on.

    Raises:
      UserError: as `make_mesh`.
    """
    data, fsdp = _axes(devices, data, fsdp)
    _group(range(data * fsdp), fsdp, slices, lambda device: 0)
    return AbstractMesh((data, fsdp), AXES, axis_types=AXIS_TYPES)


def _axes(count: int, data: int, fsdp: int) -> tuple[int, int]:
    if fsdp < 1 or count % fsdp or (data != -1 and (data < 1 or count % (data * fsdp))):
        raise UserError(f"{count} devices do not divide into a mesh of data={data} x fsdp={fsdp}")
    return count // fsdp if data == -1 else data, fsdp


def arrange(devices: Sequence[Any], fsdp: int, slices: int = 0) -> np.ndarray:
    """Devices as [data, fsdp]: slice by slice, in the order given; inside one by its topology.

    That order is the processes', so that each slice has the rows of a batch that its own read.

    Raises:
      UserError: they do not divide into `slices`, or a slice does not into groups of `fsdp`.
    """

    def inside(group: list[Any]) -> np.ndarray:
        shape = len(group) // fsdp, fsdp
        if len({_slice_index(device) for device in group}) > 1:  # have no one topology
            return np.asarray(group).reshape(shape)
        return create_device_mesh(shape, group, allow_split_physical_axes=True)

    groups = _group(devices, fsdp, slices, _slice_index)
    return np.concatenate([inside(group) for group in groups])


def _group(
    devices: Sequence[Any], fsdp: int, slices: int, slice_of: Callable[[Any], int]
) -> list[list[Any]]:
    if slices < 0 or (slices and len(devices) % slices):
        raise UserError(f"{len(devices)} devices do not divide into mesh.slices={slices}")
    groups: dict[int, list[Any]] = {}
    for i, device in enumerate(devices):
        index = i * slices // len(devices) if slices else slice_of(device)
        groups.setdefault(index, []).append(device)
    for group in groups.values():
        if len(group) % fsdp:
            raise UserError(
                f"mesh.fsdp={fsdp} would go across slices, of which one has {len(group)} of the"
                f" {len(devices)} devices (--config.mesh.slices=1 is to have it so)"
            )
    return list(groups.values())


def _slice_index(device: Any) -> int:
    # CPUs may tell of processes as slices: they are for trying things out
    return 0 if device.platform == "cpu" else getattr(device, "slice_index", 0)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Rows over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(tree: Any, mesh: AnyMesh, min_size: int = MIN_SIZE) -> Any:
    """Shardings for a tree of arrays or shapes: over `fsdp` from `min_size` elements on."""
    ways = mesh.shape["fsdp"]

    def sharding(x: Any) -> NamedSharding:
        dividing = [(n, -axis) for axis, n in enumerate(x.shape) if n % ways == 0]
        if ways == 1 or np.prod(x.shape) < min_size or not dividing:
            return replicated(mesh)
        axis = -max(dividing)[1]  # the first of the largest
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(sharding, tree)


def bytes_per_device(tree: Any, mesh: AnyMesh) -> int:
    """Bytes that one device holds of a tree of arrays or shapes that is laid out so."""
    parts = jax.tree.map(lambda x, s: s.shard_shape(x.shape), tree, state_shardings(tree, mesh))
    sizes = jax.tree.map(lambda x, part: math.prod(part) * x.dtype.itemsize, tree, parts)
    return sum(jax.tree.leaves(sizes))


def abstract_state(init: Callable[[jax.Array], Any], key: jax.Array, mesh: Mesh) -> Any:
    """Shapes, types and shardings of `init(key)`, with nothing allocated."""
    return lay_out(jax.eval_shape(init, key), mesh)


def lay_out(shapes: Any, mesh: AnyMesh) -> Any:
    """The same shapes and types, with shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        state_shardings(shapes, mesh),
    )


def init_sharded(init: Callable[[jax.Array], Any], key: jax.Array, mesh: Mesh) -> Any:
    """Runs `init(key)` so that every array is born where it belongs, never whole on one device."""
    shardings = state_shardings(jax.eval_shape(init, key), mesh)

    def initial(key: jax.Array) -> Any:  # JAX keeps a program for as long as its function lives
        return init(key)

    return jax.jit(initial, out_shardings=shardings)(key)


def lower_step(
    step: Callable, state: Any, frozen: Any, batch: Any, key: Any, mesh: Mesh
) -> jax.stages.Lowered:
    """The step (state, frozen, batch, key) -> (state, metrics), ready to be compiled.

    State, whose buffers it takes over, comes back as it lies. Arguments are arrays, or shapes with
    shardings.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    return jitted.lower(state, frozen, batch, key)


def gather(mesh: AnyMesh, tree: Any) -> Any:
    """Inside a jit: the same tree, whole on every device, for networks to read.

    Left to propagate shardings by itself, XLA splits activations along the channels of split
    kernels, which compiles for minutes.
    """
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def gather_late(mesh: AnyMesh, tree: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    """Inside a loop: (the tree gathered, x), once `x` is there and not before the loop.

    What a loop does not change XLA works out once before it and keeps: the whole tree. What depends
    on x stays inside, where each array is gathered when it is read and freed thereafter.
    """
    if mesh.shape["fsdp"] > 1:
        tree, x = jax.lax.optimization_barrier((tree, x))
    return gather(mesh, tree), x


def split(mesh: Mesh, tree: Any) -> Any:
    """Inside a jit: back to how state lies, for the gradients of what was gathered."""
    return jax.lax.with_sharding_constraint(tree, state_shardings(tree, mesh))


def put_tree(mesh: Mesh, tree: Any) -> Any:
    """Lays a tree that every process holds whole (frozen networks) out like state."""
    return jax.device_put(tree, state_shardings(tree, mesh))


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays from this process's rows [B / processes, ...].

    Raises:
      UserError: the global batch does not divide by the devices of the mesh.
    """

    def put(name: str, rows: np.ndarray) -> jax.Array:
        _check_rows(name, rows.shape[0] * jax.process_count(), mesh)
        return jax.make_array_from_process_local_data(batch_sharding(mesh), rows)

    return {name: put(name, np.asarray(rows)) for name, rows in batch.items()}


def put_rows(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes the same global arrays from all rows [B, ...], which every process holds.

    Raises:
      UserError: the batch does not divide by the devices of the mesh.
    """

    def put(name: str, rows: np.ndarray) -> jax.Array:
        _check_rows(name, len(rows), mesh)
        return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda i: rows[i])

    return {name: put(name, np.asarray(rows)) for name, rows in batch.items()}


def _check_rows(name: str, total: int, mesh: Mesh) -> None:
    if total % mesh.size:
        raise UserError(
            f"batch of {total} ({name}) does not divide by the {mesh.size} devices of the mesh"
        )


def own_rows(array: jax.Array) -> np.ndarray:
    """The rows of a batch that lie on this process's devices: what `put_batch` was given."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])
