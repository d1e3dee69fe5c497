"""What a config would build: parameters, latent shape, FLOPs and bytes, from shapes alone.

Nothing is allocated: networks are traced over abstract arrays, FLOPs are XLA's count of the traced
program (2 per multiply-add).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.train.sharding import make_mesh, state_shardings


def describe(config: ConfigDict) -> dict[str, Any]:
    """The facts as JSON-serialisable values."""
    key = jax.random.key(0)
    stage, shape = build.first_stage(config), build.latent_shape(config)
    side = config.data.image_size
    objective = build.objective(config)
    state = jax.eval_shape(objective.init, key)
    trained = dict(state.params)
    frozen = build.frozen_shapes(config, training=True)
    first_stage = trained.get("autoencoder") or frozen["first_stage"]
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    z = jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    forward = {
        "encode": flops(stage.encode, first_stage, image),
        "decode": flops(stage.decode, first_stage, z),
    }
    if config.phase == "diffusion":
        network, t = build.denoise_network(config), jax.ShapeDtypeStruct((1,), jnp.int32)
        forward["unet"] = flops(network, state.params["unet"], z, t, build.cond_shapes(config))

    mesh = build.unpack("mesh", make_mesh, config.mesh)
    return {
        "phase": config.phase,
        "image": [side, side, 3],
        "latent": list(shape),
        "f": stage.factor,
        "parameters": {
            name: {"trained": name in trained, "total": count(tree), "parts": parts(tree)}
            for name, tree in {**trained, **frozen}.items()
            if count(tree)
        },
        "flops_forward_per_image": forward,
        "flops_per_step": _step_flops(config, objective, state, frozen, side, shape),
        "batch_size": config.train.batch_size,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "bytes_of_state_per_device": {
            "parameters": bytes_per_device(state.params, mesh),
            "optimizer": bytes_per_device(state.opt_state, mesh),
            "ema": bytes_per_device(state.ema, mesh),
            "frozen": bytes_per_device(frozen, mesh),
        },
    }


def _step_flops(config, objective, state, frozen, side, shape):
    rows = config.train.batch_size
    batch = {"image": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32)}
    if config.phase == "diffusion":
        frozen = {**frozen, "latent_scale": jax.ShapeDtypeStruct((), jnp.float32)}
        stage = build.first_stage(config)
        if config.latents.source == "cache":
            moments = jax.eval_shape(stage.encode, frozen["first_stage"], batch["image"])
            batch = {"moments": moments}
        batch |= build.inputs(config, rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    # the scan over micro-batches is counted once
    return flops(objective.train_step, state, frozen, batch, key) * config.train.accumulate


def flops(function: Callable, *abstract: Any) -> float:
    """FLOPs of a function over abstract arguments."""
    cost = jax.jit(function).lower(*abstract).cost_analysis() or {}
    return float(cost.get("flops", 0.0))


def arrays(config: ConfigDict) -> str:
    """A table of every trained array: name, shape, size."""
    params = jax.eval_shape(build.init_params(config), jax.random.key(0))
    return parameter_overview.get_parameter_overview(params, include_stats=False)


def count(tree: Any) -> int:
    """Numbers in a tree of arrays."""
    return int(parameter_overview.count_parameters(tree)) if tree else 0


def parts(tree: dict) -> dict[str, int]:
    """Counts by published component: the first word of each module's name."""
    out: dict[str, int] = {}
    for name, sub in tree.items():
        first = name.split(".")[0]
        out[first] = out.get(first, 0) + count(sub)
    return out


def bytes_per_device(tree: Any, mesh: Any) -> int:
    """Bytes that one device holds of a tree laid out by the shape rule."""
    shardings = state_shardings(tree, mesh)
    sizes = jax.tree.map(
        lambda x, s: int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


def table(facts: dict[str, Any]) -> str:
    """The facts for people."""
    lines = [
        f"phase       {facts['phase']}",
        f"image       {' x '.join(map(str, facts['image']))}",
        f"latent      {' x '.join(map(str, facts['latent']))} (f = {facts['f']})",
        "parameters",
    ]
    for name, about in facts["parameters"].items():
        lines.append(
            f"  {name:22}{about['total']:>16,}  {'trained' if about['trained'] else 'frozen'}"
        )
        lines += [f"    {part:20}{number:>16,}" for part, number in about["parts"].items()]
    lines.append("forward pass, GFLOP per image")
    lines += [f"  {n:22}{v / 1e9:>16,.3f}" for n, v in facts["flops_forward_per_image"].items()]
    lines.append(f"training step, GFLOP (batch of {facts['batch_size']})")
    lines.append(f"  {'step':22}{facts['flops_per_step'] / 1e9:>16,.1f}")
    mesh = " x ".join(f"{axis} {ways}" for axis, ways in facts["mesh"].items())
    lines.append(f"state, MB per device ({facts['devices']} devices: {mesh})")
    lines += [f"  {n:22}{v / 1e6:>16,.1f}" for n, v in facts["bytes_of_state_per_device"].items()]
    return "\n".join(lines)
