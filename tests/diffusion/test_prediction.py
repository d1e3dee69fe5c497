"""Conversions and loss weights: each is the same quantity in other words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.diffusion.prediction import (
    PREDICTIONS,
    loss_weight,
    make_denoise,
    target,
    to_eps,
    to_x0,
)
from latent_diffusion_jax.diffusion.schedule import add_noise, at, make_schedule
from latent_diffusion_jax.errors import UserError
from tests.published import golden

SCHEDULE = make_schedule(name="linear", linear_start=0.0015, linear_end=0.0195)
TIMES = jnp.array([0, 100, 500, 999])


def example():
    z, eps = jax.random.normal(jax.random.key(0), [2, len(TIMES), 2, 2, 3])
    return z, eps, add_noise(SCHEDULE, z, TIMES, eps), at(SCHEDULE, TIMES, 4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_converts_back_to_eps_and_x0(prediction):
    z, eps, z_t, levels = example()
    output = target(prediction, z, eps, *levels)
    # Divisions by sigma_0 = 0.04 and alpha_999 = 0.06 magnify the rounding of z_t.
    np.testing.assert_allclose(to_eps(prediction, output, z_t, *levels), eps, atol=2e-5)
    np.testing.assert_allclose(to_x0(prediction, output, z_t, *levels), z, atol=2e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_output_splits_z_t_into_x0_and_eps(prediction):
    _, output, z_t, levels = example()
    x0 = to_x0(prediction, output, z_t, *levels)
    eps = to_eps(prediction, output, z_t, *levels)
    np.testing.assert_allclose(add_noise(SCHEDULE, x0, TIMES, eps), z_t, atol=1e-5)
    np.testing.assert_allclose(target(prediction, x0, eps, *levels), output, atol=2e-5)


def test_conversions_equal_published():
    arrays, _ = golden("diffusion_ops")
    x_t, levels = arrays["x_t"], at(SCHEDULE, arrays["t"], 4)
    for actual, name in (
        (to_x0("eps", arrays["noise"], x_t, *levels), "out_x0_from_eps"),
        (to_eps("x0", arrays["x0"], x_t, *levels), "out_eps_from_x0"),
    ):
        atol = 1e-5 * np.abs(arrays[name]).max()
        np.testing.assert_allclose(actual, arrays[name], rtol=0, atol=atol)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoise_is_eps_in_float32_whatever_the_network_returns(prediction):
    z, eps, z_t, levels = example()
    output = target(prediction, z, eps, *levels).astype(jnp.bfloat16)
    denoise = make_denoise(lambda z_t, t: output, SCHEDULE, prediction)
    expected = to_eps(prediction, output.astype(jnp.float32), z_t, *levels)
    assert denoise(z_t, TIMES).dtype == jnp.float32
    np.testing.assert_array_equal(denoise(z_t, TIMES), expected)


def test_min_snr_is_one_loss_of_x0_for_every_prediction():
    z, eps, z_t, (alpha, sigma) = example()
    guess = z + 0.1 * jax.random.normal(jax.random.key(1), z.shape)
    weighted = {}
    for prediction in PREDICTIONS:
        output = target(prediction, guess, to_eps("x0", guess, z_t, alpha, sigma), alpha, sigma)
        error = output - target(prediction, z, eps, alpha, sigma)
        weighted[prediction] = loss_weight("min_snr", prediction, alpha, sigma) * error**2
    expected = jnp.minimum((alpha / sigma) ** 2, 5) * (guess - z) ** 2
    for values in weighted.values():
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("gamma", [5, 0.5])
def test_min_snr_weights_of_hang_et_al(gamma):
    alpha, sigma = at(SCHEDULE, jnp.arange(1000))
    snr = (alpha / sigma) ** 2
    capped = jnp.minimum(snr, gamma)
    for prediction, expected in {
        "eps": capped / snr,
        "x0": capped,
        "v": capped / (snr + 1),
    }.items():
        found = loss_weight("min_snr", prediction, alpha, sigma, gamma)
        np.testing.assert_allclose(found, expected, 1e-5)
        np.testing.assert_array_equal(loss_weight("uniform", prediction, alpha, sigma), 1)


def test_unknown_names_list_the_choices():
    z = jnp.ones([1])
    with pytest.raises(UserError, match="unknown prediction 'epsilon'.*eps, v, x0"):
        to_eps("epsilon", z, z, z, z)
    with pytest.raises(UserError, match="did you mean 'min_snr'"):
        loss_weight("minsnr", "eps", z, z)
