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


def losses(config, mesh):
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
    for _ in range(STEPS):
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
