from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.state import (
    TrainState,
    ema_decay_at,
    init_ema,
    sampling_params,
    update_ema,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ema.npz")


def test_decay_is_the_originals():
    found = ema_decay_at(GOLDEN["num_updates"], 0.9999)
    np.testing.assert_allclose(found, GOLDEN["decay_at"], rtol=2e-7)


def test_average_follows_the_originals():
    weights = GOLDEN["weights"]
    ema = init_ema({"unet": weights[0]}, ["unet"])
    for n, (now, expected) in enumerate(zip(weights[1:], GOLDEN["ema"]), start=1):
        ema = update_ema(ema, {"unet": now}, 1 - ema_decay_at(n, 0.9999))
        np.testing.assert_allclose(ema["unet"], expected, atol=1e-6)


def test_only_named_networks_are_averaged():
    params = {"unet": jnp.ones(2), "label": jnp.ones(3)}
    ema = init_ema(params, ["unet"])
    later = {"unet": jnp.full(2, 5.0), "label": jnp.full(3, 5.0)}
    ema = update_ema(ema, later, 1 - ema_decay_at(1, 0.5))
    assert set(ema) == {"unet"}
    state = TrainState(jnp.int32(1), later, (), ema)
    found = sampling_params(state)
    np.testing.assert_array_equal(found["label"], later["label"])
    np.testing.assert_allclose(found["unet"], 1 + 4 * (1 - 2 / 11), rtol=1e-6)


def test_unknown_network_is_named():
    with pytest.raises(UserError, match="'unit'.*unet"):
        init_ema({"unet": jnp.ones(2)}, ["unit"])
