"""What a config would build: parameters, latent shape, FLOPs and bytes, from shapes alone.

Nothing is allocated: networks are traced over abstract arrays, FLOPs are XLA's count of the traced
program (2 per multiply-add).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.chips import CHIPS
from latent_diffusion_jax.errors import choose
from latent_diffusion_jax.nn.products import traced_for
from latent_diffusion_jax.plan import plan, roofline, state_bytes, step_shapes
from latent_diffusion_jax.train.sharding import plan_mesh


@traced_for("tpu")  # what is planned for; CPUs have forms of their own
def describe(
    config: ConfigDict, devices: int | None = None, kind: str | None = None
) -> dict[str, Any]:
    """The facts as JSON-serialisable values.

    With `plan` of a training step, if `devices` (those at hand) or `kind`, one of CHIPS, is given.

    Raises:
      UserError: an unknown kind; the devices or the batch do not divide.
    """
    chip = None if kind is None else choose("kind of chip", kind, CHIPS)
    mesh = build.unpack("mesh", plan_mesh, config.mesh, devices=devices or jax.device_count())
    planning = devices or kind
    if planning:
        build.check_batch(config, mesh.size)
    stage, shape = build.first_stage(config), build.latent_shape(config)
    side = config.data.image_size
    objective = build.objective(config)
    step = step_shapes(config, objective)
    trained, frozen = dict(step.state.params), build.frozen_shapes(config, training=True)
    first_stage = trained.get("autoencoder") or frozen["first_stage"]
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    z = jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    forward = {
        "encode": flops(stage.encode, first_stage, image),
        "decode": flops(stage.decode, first_stage, z),
    }
    if config.phase == "diffusion":
        network, t = build.denoise_network(config), jax.ShapeDtypeStruct((1,), jnp.int32)
        forward["unet"] = flops(network, trained["unet"], z, t, build.cond_shapes(config))

    # the scan over micro-batches is counted once
    of_step = flops(objective.train_step, *step) * config.train.accumulate
    facts = {
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
        "flops_per_step": of_step,
        "batch_size": config.train.batch_size,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "bytes_of_state_per_device": state_bytes(step, mesh),
    }
    if planning:
        facts["plan"] = plan(config, step, mesh)
    if chip is not None:
        best = roofline(facts["plan"], of_step / mesh.size, chip, config.dtype)
        facts["roofline"] = {"kind": kind, **best}
    return facts


def flops(function: Callable, *abstract: Any) -> float:
    """FLOPs of a function over abstract arguments, whatever takes turns when it runs."""
    with traced_for("none"):  # of a loop one turn would be counted
        cost = jax.jit(lambda *x: function(*x)).lower(*abstract).cost_analysis() or {}
    return float(cost.get("flops", 0.0))


def arrays(config: ConfigDict) -> str:
    """A table of every trained array: name, shape, size."""
    params = build.param_shapes(config)
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
    lines += [_megabytes(*item) for item in facts["bytes_of_state_per_device"].items()]
    return "\n".join([*lines, *_plan_lines(facts)])


def _plan_lines(facts: dict[str, Any]) -> list[str]:
    if "plan" not in facts:
        return []
    plan = facts["plan"]
    memory, whole = plan["bytes_per_device"], plan["optimizer_not_split"]
    shown = ("batch", "gathered", "backward", "total")
    lines = [
        f"training step, MB per device ({plan['images_per_device_and_pass']} images at once)",
        *(_megabytes(name, memory[name]) for name in shown),
        "collectives, MB per step",
        *(_megabytes(*item) for item in plan["collectives_per_step"].items()),
    ]
    if whole["bytes"] and facts["devices"] > 1:
        better = "".join(f"; mesh.fsdp={n} splits all" for n in whole["better_fsdp"])
        lines.append(f"note: fsdp leaves {whole['bytes'] / 1e6:,.1f} MB of optimizer whole{better}")
    if "compiled" in facts:
        lines.append("compiled for as many CPUs, MB per device and MB per step")
        for part in facts["compiled"].values():
            lines += [_megabytes(*item) for item in part.items()]
    return [*lines, *_roofline_lines(facts)]


def _roofline_lines(facts: dict[str, Any]) -> list[str]:
    if "roofline" not in facts:
        return []
    best = facts["roofline"]
    kind, chip = best["kind"], CHIPS[best["kind"]]
    speed = facts["batch_size"] / best["seconds_per_step"]
    lines = [
        f"fits {kind}    {best['fits']} ({best['memory']:.0%} of {chip.hbm / 1e9:.0f} GB)",
        f"step on {kind} at best, ms ({best['bound']} bounds it: {speed:,.0f} images/s)",
        *(f"  {name:22}{value * 1e3:>16,.1f}" for name, value in best["seconds"].items()),
    ]
    if facts["devices"] > chip.linked:
        lines.append(f"note: {chip.linked} {kind} are linked so; between those, the network bounds")
    return lines


def _megabytes(name: str, value: float) -> str:
    return f"  {name:22}{value / 1e6:>16,.1f}"
