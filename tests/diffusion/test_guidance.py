"""Guidance interpolates and extrapolates between two predictions in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.diffusion.guidance import guide

Z = jax.random.normal(jax.random.key(0), [2, 3, 3, 1])
COND = jnp.array([1.0, -2.0])
NULL = jnp.zeros(2)


def model(z_t, t, cond):
    return 0.5 * z_t + (cond * (1 + t / 100))[:, None, None, None]


def doubled(calls=None):
    def denoise(z_t, t):
        if calls is not None:
            calls.append(z_t.shape)
        return model(z_t, t, jnp.concatenate([NULL, COND]))

    return denoise


@pytest.mark.parametrize("t", [jnp.array(50), jnp.array([10, 90])], ids=["scalar", "batch"])
def test_scale_moves_from_null_through_condition(t):
    uncond, cond = model(Z, t, NULL), model(Z, t, COND)
    guided = jax.jit(lambda scale: guide(doubled(), scale)(Z, t))  # the scale may be traced
    np.testing.assert_allclose(guided(0.0), uncond, atol=1e-6)
    np.testing.assert_allclose(guided(1.0), cond, atol=1e-6)
    np.testing.assert_allclose(guided(3.0), 3 * cond - 2 * uncond, atol=1e-5)


def test_one_call_on_twice_the_batch():
    calls = []
    assert guide(doubled(calls), 2.0)(Z, jnp.array(1)).shape == Z.shape
    assert calls == [(4, 3, 3, 1)]
