"""How arrays lie on the devices: a mesh with axes `data` and `fsdp`, everything else from shapes.

Batches are split over both axes. Parameters, optimiser state and averages are split over `fsdp` on
their largest dimension that divides (ZeRO-3: Rajbhandari et al. 2020) and copied over `data`.
Models know nothing of it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from latent_diffusion_jax.errors import UserError

MIN_SIZE = 2**16  # elements: below, gathering costs more than the copy
AnyMesh = Mesh | AbstractMesh
AXES = ("data", "fsdp")
AXIS_TYPES = (AxisType.Auto,) * 2  # Linen's convolutions fail on the Explicit ones of the default


def make_mesh(*, data: int = -1, fsdp: int = 1) -> Mesh:
    """Makes the mesh; `data=-1` takes the devices that `fsdp` leaves.

    Raises:
      UserError: the devices do not divide into these axes.
    """
    sizes = _axes(jax.device_count(), data, fsdp)
    return jax.make_mesh(sizes, AXES, axis_types=AXIS_TYPES)


def plan_mesh(devices: int, *, data: int = -1, fsdp: int = 1) -> AbstractMesh:
    """The same of devices that need not be there, to lay shapes out on.

    Raises:
      UserError: the devices do not divide into these axes.
    """
    return AbstractMesh(_axes(devices, data, fsdp), AXES, axis_types=AXIS_TYPES)


def _axes(count: int, data: int, fsdp: int) -> tuple[int, int]:
    if fsdp < 1 or count % fsdp or (data != -1 and (data < 1 or count % (data * fsdp))):
        raise UserError(f"{count} devices do not divide into a mesh of data={data} x fsdp={fsdp}")
    return count // fsdp if data == -1 else data, fsdp


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
    return jax.jit(init, out_shardings=shardings)(key)


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


def gather(mesh: Mesh, tree: Any) -> Any:
    """Inside a jit: the same tree, whole on every device, for networks to read.

    Left to propagate shardings by itself, XLA splits activations along the channels of split
    kernels, which compiles for minutes.
    """
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


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
