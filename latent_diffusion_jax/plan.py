"""Will it fit, and how fast could it be: memory, collectives and time of a training step.

`plan` reads everything off shapes, with no device at hand. What a device keeps is found by walking
through the program of one micro-batch, as traced. What it sends follows from how training lays
arrays out (`train/sharding.py`): what is split is gathered whole for networks to read, and
gradients are summed over all devices. `compiled.py` reads the same off what XLA makes of it.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal, Var, jaxprs_in_params
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.chips import Chip
from latent_diffusion_jax.train.objective import Objective
from latent_diffusion_jax.train.sharding import (
    MIN_SIZE,
    AnyMesh,
    bytes_per_device,
    plan_mesh,
    state_shardings,
)
from latent_diffusion_jax.train.state import TrainState

PARAMS, FROZEN = 0, 2  # among the arguments of a criterion's gradients
VIEWS = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "transpose"}


class Step(NamedTuple):
    """Shapes of what a training step takes."""

    state: TrainState
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    key: Any


def step_shapes(config: ConfigDict, objective: Objective) -> Step:
    """The shapes for the config's objective and batch, whole."""
    rows = config.train.batch_size
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(objective.init, key)
    cached = config.phase == "diffusion" and build.is_cached(config)
    frozen = build.frozen_shapes(config, training=True, cached=cached)
    side = config.data.image_size
    batch = {"image": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32)}
    if config.phase == "diffusion":
        if cached:
            encode = build.first_stage(config).encode
            batch = {"moments": jax.eval_shape(encode, frozen["first_stage"], batch["image"])}
        batch |= build.inputs(config, rows, cached)
        frozen = {**frozen, "latent_scale": jax.ShapeDtypeStruct((), jnp.float32)}
    return Step(state, frozen, batch, key)


def state_bytes(step: Step, mesh: AnyMesh) -> dict[str, int]:
    """Bytes of the state that a device holds, by part."""
    parts = {
        "parameters": step.state.params,
        "optimizer": step.state.opt_state,
        "ema": (step.state.ema, step.state.averages),
        "frozen": step.frozen,
    }
    return {name: bytes_per_device(tree, mesh) for name, tree in parts.items()}


def plan(config: ConfigDict, step: Step, mesh: AnyMesh) -> dict[str, Any]:
    """Bytes that a device holds and sends in a training step.

    JSON-serialisable. `bytes_per_device`: the state by part; `gathered`, the copies of parameters
    that are read; `backward`, gradients and activations at their peak. `collectives_per_step`:
    bytes of arrays that are `gathered` (whole) and `reduced` (what goes into sums), and `sent`:
    those that leave a device if rings do it, (n - 1) / n of an array for a gather over n devices or
    a scattered sum, twice that for a whole sum. `bytes_moved_per_device`: to and from memory,
    all of it written and read once in a pass.

    Raises:
      UserError: the batch does not divide.
    """
    rows, accumulate = build.check_batch(config, mesh.size), config.train.accumulate
    batch = {n: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for n, x in step.batch.items()}
    step = step._replace(batch=batch)
    state = {**state_bytes(step, mesh), "batch": accumulate * sum(map(_bytes, batch.values()))}
    turns = list(_turns(config, step))
    copies = [sum(_bytes(x) for x in turn.reads if _ways(x, mesh) > 1) for turn in turns]
    backward = max(max(turn.peak, turn.summed(mesh)) for turn in turns)
    if accumulate > 1:  # and the sum so far
        backward += max(bytes_per_device(turn.gradients, mesh) for turn in turns)
    held = {**state, "gathered": max(copies), "backward": backward}
    return {
        "images_per_device_and_pass": rows,
        "bytes_per_device": {**held, "total": sum(held.values())},
        "collectives_per_step": _collectives(turns, accumulate, mesh),
        "bytes_moved_per_device": 2 * (sum(state.values()) - state["frozen"])
        + accumulate * sum(3 * sum(map(_bytes, t.reads)) + 2 * t.peak for t in turns),
        "optimizer_not_split": not_split(step.state.opt_state, mesh),
    }


def roofline(facts: dict[str, Any], flops: float, chip: Chip, dtype: str) -> dict[str, Any]:
    """Seconds that a chip's peaks allow for a step of `plan`, what bounds it, and whether it fits.

    `flops` are those of one device, whose networks compute in `dtype`. Work, memory and links are
    taken to overlap perfectly. `memory` is the share of the chip's that is used; above 0.9 is
    "tight".
    """
    seconds = {
        "compute": flops / chip.peak(dtype),
        "hbm": facts["bytes_moved_per_device"] / chip.hbm_speed,
        "interconnect": facts["collectives_per_step"]["sent"] / chip.interconnect,
    }
    bound = max(seconds, key=seconds.__getitem__)
    memory = facts["bytes_per_device"]["total"] / chip.hbm
    return {
        "fits": "yes" if memory <= 0.9 else "tight" if memory <= 1 else "no",
        "memory": memory,
        "seconds": seconds,
        "seconds_per_step": seconds[bound],
        "bound": bound,
    }


# One micro-batch


class _Turn(NamedTuple):
    """One of the criterion's gradients: the arrays it gathers and yields, its peak of memory."""

    reads: list[Any]
    gradients: Any
    peak: int

    def summed(self, mesh: AnyMesh) -> int:
        """Bytes while gradients are summed over devices, an array at a time: all terms, the shares
        that are kept of the sums, and one sum that is not cut yet.
        """
        terms = [_bytes(x) for x in jax.tree.leaves(self.gradients)]
        if mesh.size == 1:
            return sum(terms)
        return sum(terms) + bytes_per_device(self.gradients, mesh) + max(terms)


def _turns(config: ConfigDict, step: Step) -> Iterator[_Turn]:
    """The turns of a micro-batch. What an earlier one has gathered, and not changed, stays."""
    number = jax.ShapeDtypeStruct((), jnp.int32)
    there: set[Any] = set()
    for function in build.criterion(config).gradients:
        state = step.state
        arguments = (state.params, state.buffers, step.frozen, step.batch, step.key, number)
        traced = jax.jit(function).trace(*arguments)
        jaxpr, (_, gradients, _) = traced.jaxpr.jaxpr, traced.out_info
        read = _read(jaxpr)
        reads = {
            path: x
            for (path, x), var in zip(jax.tree.leaves_with_path(arguments), jaxpr.invars)
            if path[0].idx in (PARAMS, FROZEN) and var in read
        }
        yield _Turn([x for p, x in reads.items() if p not in there], gradients, peak(jaxpr))
        there |= reads.keys()
        there = {p for p in there if p[0].idx == FROZEN or p[1].key not in gradients}


def _read(jaxpr: Jaxpr) -> set[Var]:
    """The variables that some operation reads."""
    return {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)}


def peak(jaxpr: Jaxpr) -> int:
    """Bytes of what a program makes, at the moment when most of it is needed still.

    In the order in which it was traced, arguments not counted. Reshapes, transposes and broadcasts
    are taken to be free, everything else to be written out.
    """
    source: dict[Var, Var] = {}  # of views
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in VIEWS and not isinstance(eqn.invars[0], Literal):
            source[eqn.outvars[0]] = source.get(eqn.invars[0], eqn.invars[0])

    def real(variables: Any) -> set[Var]:
        return {source.get(v, v) for v in variables if not isinstance(v, Literal)}

    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in real(eqn.invars)}
    last |= dict.fromkeys(real(jaxpr.outvars), len(jaxpr.eqns))
    made: dict[Var, int] = {}
    held = most = 0
    for i, eqn in enumerate(jaxpr.eqns):
        inside = max((peak(j) for j in jaxprs_in_params(eqn.params)), default=0)
        new = {v: _bytes(v.aval) for v in eqn.outvars if v in last and v not in source}
        most = max(most, held + max(inside, sum(new.values())))
        made |= new
        done = [made.pop(v, 0) for v in real(eqn.invars) if last[v] == i]
        held += sum(new.values()) - sum(done)
    return most


# Collectives


def _collectives(turns: list[_Turn], accumulate: int, mesh: AnyMesh) -> dict[str, float]:
    fsdp, data = mesh.shape["fsdp"], mesh.shape["data"]
    # of all micro-batches: XLA takes what does not change out of their loop
    gathered = sum(_bytes(x) for turn in turns for x in turn.reads if _ways(x, mesh) > 1)
    sums = [x for turn in turns for x in jax.tree.leaves(turn.gradients)] * accumulate
    split = sum(_bytes(x) for x in sums if _ways(x, mesh) > 1)
    whole = sum(map(_bytes, sums)) - split
    # what is split is scattered while it is summed over fsdp, then each part is summed over data
    parts = split // fsdp if data > 1 else 0
    sent = (gathered + split) * (1 - 1 / fsdp)
    sent += 2 * parts * (1 - 1 / data) + 2 * whole * (1 - 1 / mesh.size)
    reduced = split + parts + whole if mesh.size > 1 else 0
    return {"gathered": gathered, "reduced": reduced, "sent": sent}


def _ways(x: Any, mesh: AnyMesh) -> int:
    """Into how many parts an array is split."""
    return math.prod(x.shape) // math.prod(state_shardings(x, mesh).shard_shape(x.shape))


def not_split(opt_state: Any, mesh: AnyMesh) -> dict[str, Any]:
    """Bytes of the optimiser's large arrays that every device holds, and an fsdp that would not."""
    large = [x for x in jax.tree.leaves(opt_state) if math.prod(x.shape) >= MIN_SIZE]

    def whole(fsdp: int) -> int:
        other = plan_mesh(mesh.size, fsdp=fsdp)
        return sum(_bytes(x) for x in large if _ways(x, other) == 1)

    found = whole(mesh.shape["fsdp"])
    better = [n for n in range(mesh.size, 1, -1) if mesh.size % n == 0 and found and not whole(n)]
    return {"bytes": found, "better_fsdp": better[:1]}


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
