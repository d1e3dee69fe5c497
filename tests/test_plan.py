"""What is planned for N devices is what XLA compiles for them; big models split whole."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest

from latent_diffusion_jax import build
from latent_diffusion_jax.chips import CHIPS, chip_of
from latent_diffusion_jax.compiled import collectives, measure
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.plan import (
    not_split,
    peak,
    plan,
    roofline,
    step_shapes,
)
from latent_diffusion_jax.train import sharding

ROOT = Path(__file__).parent.parent
X = jax.ShapeDtypeStruct((10, 10), "float32")


@pytest.mark.parametrize(
    "function,arrays",
    [
        (lambda x: jnp.sin(jnp.exp(x)), 2),
        (lambda x: jnp.exp(x) + jnp.sin(x) * jnp.cos(x), 4),  # exp waits for sin x cos
        (lambda x: jnp.sin(jnp.exp(x).T.reshape(100)), 2),  # a view is no copy
        (lambda x: jax.jit(lambda y: jnp.sin(jnp.exp(y)))(x) + x, 2),  # inside, then with the sum
    ],
)
def test_peak_of_memory(function, arrays):
    found = peak(jax.make_jaxpr(function)(X).jaxpr)
    assert found == arrays * 400


def test_rematerialised_layers_keep_less():
    def loss(layer):
        return lambda x: jnp.sum(layer(layer(layer(layer(x)))))

    def layer(x):
        return jnp.sin(jnp.exp(jnp.tanh(x)))

    kept, again = (
        peak(jax.make_jaxpr(jax.grad(loss(f)))(X).jaxpr) for f in (layer, jax.checkpoint(layer))
    )
    assert again < 0.7 * kept


def test_collectives_of_a_program():
    hlo = """
%body (p: f32[4]) -> f32[4] {
  %a = f32[4,8]{1,0} all-gather(%p), dimensions={0}
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%p), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %s = (bf16[2,2]{1,0}, pred[5]{0}) all-reduce(%w, %w), to_apply=%add
  ROOT %m = s32[] all-to-all(%s)
}
"""
    assert collectives(hlo) == {
        "gathered": 3 * 128,
        "reduced": 13,
        "scattered": 0,
        "moved": 4,
    }


PHASES = {
    "diffusion": (
        "configs/diffusion/shapes.py:tiny",
        ["latents.source=cache", "unet.channel_mult=(1,)", "unet.model_channels=64"]
        + ["train.accumulate=2"],
    ),
    "first stage": ("configs/first_stage/vq_f4.py:tiny", []),
}


def of_a_step(spec, changes, monkeypatch):
    """What is planned for eight devices and what is compiled, small arrays split too."""
    monkeypatch.setattr(sharding.state_shardings, "__defaults__", (64,))
    changes = [*changes, "train.batch_size=16", "mesh.fsdp=4"]
    config = load_config(spec, [f"--config.{change}" for change in changes])
    step = step_shapes(config, build.objective(config))
    planned = plan(config, step, sharding.plan_mesh(8, fsdp=4))
    return planned, measure(config, sharding.make_mesh(fsdp=4))


@pytest.mark.parametrize("phase", PHASES)
def test_plan_is_what_is_compiled(phase, monkeypatch):
    check(*of_a_step(*PHASES[phase], monkeypatch))


def test_nothing_but_weights_is_gathered_to_compute_activations_again(monkeypatch):
    changes = ["latents.source=cache", "unet.channel_mult=(1,1)", "unet.model_channels=64"]
    changes.append("unet.remat=full")
    both = of_a_step("configs/diffusion/shapes.py:tiny", changes, monkeypatch)
    gathered = [each["collectives_per_step"]["gathered"] for each in both]
    assert abs(gathered[0] / gathered[1] - 1) < 0.02


def check(planned, compiled):
    memory, collectives = compiled["bytes_per_device"], compiled["collectives_per_step"]
    planned_memory = planned["bytes_per_device"]
    state = ("parameters", "optimizer", "ema", "frozen", "batch")
    held = sum(planned_memory[name] for name in state)
    # the program is not given what it does not read of the frozen networks
    assert 0.99 * (held - planned_memory["frozen"]) < memory["arguments"] < 1.01 * held
    for name in ("gathered", "reduced"):
        assert abs(planned["collectives_per_step"][name] / collectives[name] - 1) < 0.1
    assert collectives["scattered"] + collectives["moved"] < 0.02 * collectives["gathered"]
    temporary = planned_memory["gathered"] + planned_memory["backward"]
    assert 0.7 < temporary / memory["temporary"] < 2  # XLA fuses, the plan does not
    assert memory["output"] < 0.05 * held  # the new state is where the old one lay


BIG = {
    "imagenet256": 1280,  # 400 M, for 5 images a device
    "text256": 768,  # 1.45 B
}


@pytest.mark.parametrize("name", BIG)
def test_no_large_array_of_the_optimizer_is_copied_on_a_pod(name):
    init = build.init_params(load_config(f"configs/diffusion/{name}.py"))
    moments = jax.eval_shape(lambda key: optax.adamw(1e-4).init(init(key)), jax.random.key(0))
    assert not_split(moments, sharding.plan_mesh(256, fsdp=64)) == {"bytes": 0, "better_fsdp": []}
    found = not_split(moments, sharding.plan_mesh(256, fsdp=256))
    assert found["bytes"] > 2**28
    assert found["better_fsdp"] == [64]


@pytest.mark.slow
@pytest.mark.parametrize("name", BIG)
def test_big_models_compile_for_a_pod_as_planned(name):
    command = [sys.executable, "-m", "latent_diffusion_jax", "describe", "--json", "--compile"]
    command += [f"--config=configs/diffusion/{name}.py", "--config.mesh.fsdp=64", "--devices=256"]
    command += [f"--config.train.batch_size={BIG[name]}", "--kind=v5e"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    facts = json.loads(subprocess.check_output(command, cwd=ROOT, env=env))
    check(facts["plan"], facts["compiled"])
    assert facts["roofline"]["fits"] == "yes"


def test_roofline_of_a_plan():
    facts = {
        "bytes_per_device": {"total": 15e9},
        "bytes_moved_per_device": 81.9e9,
        "collectives_per_step": {"sent": 60e9},
    }
    best = roofline(facts, 39.4e12, CHIPS["v5e"], "bfloat16")
    assert best["seconds"] == pytest.approx({"compute": 0.2, "hbm": 0.1, "interconnect": 0.3})
    assert best["bound"] == "interconnect"
    assert best["seconds_per_step"] == best["seconds"]["interconnect"]
    assert best["fits"] == "tight"
    assert roofline(facts, 1e15, CHIPS["a100"], "float32")["bound"] == "compute"
    assert CHIPS["a100"].peak("float32") == CHIPS["a100"].peak("bfloat16") / 2


def test_chips_by_the_names_of_devices():
    for kind, name in (("TPU v5 lite", "v5e"), ("NVIDIA H100 80GB HBM3", "h100")):
        assert chip_of(SimpleNamespace(device_kind=kind)) is CHIPS[name]
    assert chip_of(jax.devices()[0]) is None
    assert chip_of(SimpleNamespace(device_kind="NVIDIA H100 PCIe")) is None  # slower
