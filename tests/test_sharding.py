"""The real networks train alike on one device and on eight, data-parallel and sharded."""

import jax
import numpy as np
import pytest

from latent_diffusion_jax import build, phases
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.train import sharding

STEPS = 5
CONFIGS = {
    "first_stage": (
        "configs/first_stage/shapes.py:tiny",
        ["--config.train.batch_size=16"],
    ),
    "diffusion": (
        "configs/diffusion/shapes.py:tiny",
        ["--config.train.batch_size=16", "--config.train.accumulate=2"],
    ),
}


def losses(config, mesh, steps=STEPS):
    """The losses of the first steps, and whether any parameter was split."""
    objective = build.objective(config, mesh)
    key = jax.random.key(config.seed)
    state = sharding.init_sharded(objective.init, key, mesh)
    frozen = {}
    if config.phase == "diffusion":
        first_stage = jax.jit(build.first_stage(config).init)(jax.random.key(1))
        frozen = sharding.put_tree(
            mesh, {"first_stage": first_stage, "latent_scale": np.float32(0.7)}
        )
    batches = phases.shuffled(config, build.source(config, "train"))
    step = jax.jit(objective.train_step, donate_argnums=0)
    split = any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))
    seen = []
    for _ in range(steps):
        state, metrics = step(state, frozen, sharding.put_batch(mesh, next(batches)), key)
        seen.append(float(metrics["loss"]))
    return np.array(seen), split


@pytest.mark.parametrize("phase", CONFIGS)
def test_losses_do_not_depend_on_the_mesh(phase, monkeypatch):
    # the networks are small: split what is above 64 elements, not above 65,536
    monkeypatch.setattr(sharding.state_shardings, "__defaults__", (64,))
    config = load_config(*CONFIGS[phase])
    one, _ = losses(config, sharding.make_mesh(data=1, fsdp=1))
    eight, _ = losses(config, sharding.make_mesh(data=8, fsdp=1))
    mixed, split = losses(config, sharding.make_mesh(data=2, fsdp=4))
    assert split
    assert len(set(one)) == STEPS
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    np.testing.assert_allclose(mixed, one, rtol=1e-5)


ALONE = dict(data=1, fsdp=1)
START = 4  # of the discriminator, whose logits decide by their sign what counts: errors grow faster
VARIANTS = {  # mesh, changes, relative error before and after the discriminator's start
    "data": (dict(data=8, fsdp=1), [], 2e-6, 1e-3),
    "fsdp": (dict(data=2, fsdp=4), [], 2e-6, 1e-3),
    # afterwards: statistics and adaptive weight are those of half a batch
    "accumulated": (ALONE, ["--config.train.accumulate=2"], 2e-6, 0.1),
    "accumulated, fsdp": (dict(data=2, fsdp=4), ["--config.train.accumulate=2"], 2e-6, 0.1),
    "bfloat16": (ALONE, ["--config.dtype=bfloat16"], 5e-3, 2e-2),
}


@pytest.fixture(scope="module")
def adversarial():
    """The first ten losses of the VQ model with its discriminator, plain float32, one device."""

    def run(axes, changes):
        changes = [*changes, "--config.train.batch_size=16"]
        changes += [f"--config.discriminator.start={START}"]
        config = load_config("configs/first_stage/vq_f4.py:tiny", changes)
        return losses(config, sharding.make_mesh(**axes), steps=10)[0]

    return run, run(ALONE, [])


@pytest.mark.parametrize("variant", VARIANTS)
def test_adversarial_losses_are_those_of_one_device(variant, adversarial, monkeypatch):
    monkeypatch.setattr(sharding.state_shardings, "__defaults__", (64,))
    run, expected = adversarial
    *how, before, after = VARIANTS[variant]
    found = run(*how)
    np.testing.assert_allclose(found[:START], expected[:START], rtol=before)
    np.testing.assert_allclose(found[START:], expected[START:], rtol=after)
