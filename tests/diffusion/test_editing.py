"""Masks against the published loop in float64, image-to-image, and interpolation on the sphere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.diffusion.editing import keep_known, last_steps, slerp
from latent_diffusion_jax.diffusion.samplers import SAMPLERS, make_sampler, sample
from latent_diffusion_jax.diffusion.schedule import add_noise, make_schedule, make_timesteps
from latent_diffusion_jax.errors import UserError
from tests.diffusion.test_samplers import (
    ALPHAS_CUMPROD,
    SCHEDULE,
    close,
    numpy_ddim,
    numpy_ddpm,
    published_eps,
)

STEPS, SHAPE = 10, (2, 4, 4, 3)
RANDOM = np.random.default_rng(0)
Z_T, Z0, *_ = RANDOM.standard_normal([2, *SHAPE])
NOISE, MASK_NOISE = RANDOM.standard_normal([2, STEPS, *SHAPE])
KNOWN = RANDOM.integers(0, 2, [2, 4, 4, 1]).astype(float)
TIMES = make_timesteps("uniform", STEPS, SCHEDULE)


def kept(name, when="before", **options):
    sampler = make_sampler(name, SCHEDULE, **options)
    z0, known, noise, mask_noise = (jnp.float32(x) for x in (Z0, KNOWN, NOISE, MASK_NOISE))
    sampler = keep_known(sampler, SCHEDULE, z0, known, lambda i: mask_noise[i], when=when)
    noise_of = {"timesteps": TIMES, "noise": lambda i: noise[i]}
    return sample(sampler, published_eps([0.0]), jnp.float32(Z_T), **noise_of)


def noisy_z0(i, t):
    return np.sqrt(ALPHAS_CUMPROD[t]) * Z0 + np.sqrt(1 - ALPHAS_CUMPROD[t]) * MASK_NOISE[i]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_mask_before_each_step_is_the_published_ddim(eta):
    z = Z_T
    for i, (t, t_next) in enumerate(zip(*TIMES)):
        z = noisy_z0(i, t) * KNOWN + (1 - KNOWN) * z
        z = numpy_ddim(z, t, t_next, NOISE[i], eta)
    close(kept("ddim", eta=eta), z)


def test_mask_after_each_step_is_the_published_ancestral_sampling():
    z = Z_T
    for i, (t, t_next) in enumerate(zip(*TIMES)):
        z = numpy_ddpm(z, t, t_next, NOISE[i])
        z = noisy_z0(i, t) * KNOWN + (1 - KNOWN) * z
    close(kept("ddpm", when="after"), z)


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_sampler_sees_the_known_part_at_the_level_of_its_step(name):
    seen = []

    def denoise(z, t):
        jax.debug.callback(lambda z, t: seen.append((int(t), z)), z, t, ordered=True)
        return 0.6 * z

    sampler = make_sampler(name, SCHEDULE)
    noise, z0, known = (jnp.float32(x) for x in (MASK_NOISE, Z0, KNOWN))
    sampler = keep_known(sampler, SCHEDULE, z0, known, lambda i: noise[i])
    sample(sampler, denoise, jnp.float32(Z_T), timesteps=TIMES, noise=lambda i: noise[i])
    jax.effects_barrier()
    for i, t in enumerate(TIMES[0]):
        *_, z = (z for called, z in seen if called == t)  # some call at t_next too, before
        close(z * KNOWN, noisy_z0(i, t) * KNOWN)


def test_image_to_image_takes_the_last_steps():
    for strength, steps in ((1.0, 10), (0.7, 7), (0.3, 3), (1e-6, 1)):
        t, t_next = last_steps(TIMES, strength)
        np.testing.assert_array_equal(t, TIMES[0][10 - steps :])
        np.testing.assert_array_equal(t_next, TIMES[1][10 - steps :])


def test_image_to_image_gives_the_image_back_to_a_model_that_knows_its_noise():
    schedule = make_schedule(name="cosine")
    z0, eps = jnp.float32(Z0), jnp.float32(NOISE[0])
    times = last_steps(make_timesteps("trailing", 20, schedule), 0.6)
    z_t = add_noise(schedule, z0, times[0][0], eps)
    z = sample(
        make_sampler("ddim", schedule), lambda z, t: eps, z_t, timesteps=times, noise=jnp.float32
    )
    close(z, z0)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, float("nan")])
def test_bad_strength_is_one_clear_line(strength):
    with pytest.raises(UserError, match=f"strength {strength}"):
        last_steps(TIMES, strength)


def test_bad_when_is_one_clear_line():
    with pytest.raises(UserError, match="did you mean 'before'"):
        kept("ddim", when="befor")


def test_slerp_turns_at_constant_speed_and_keeps_the_norm():
    a, b = (jnp.float32(x) for x in (Z_T, Z0))
    b *= (jnp.linalg.norm(a.reshape(2, -1), axis=1) / jnp.linalg.norm(b.reshape(2, -1), axis=1))[
        :, None, None, None
    ]
    flat = [np.float64(x).reshape(2, -1) for x in (a, b)]
    norms = np.linalg.norm(flat[0], axis=1)
    angles = np.arccos(np.sum(flat[0] * flat[1], axis=1) / norms**2)
    for weight in (0.25, np.float32([0.5, 0.9])):
        between = np.float64(slerp(a, b, weight)).reshape(2, -1)
        np.testing.assert_allclose(np.linalg.norm(between, axis=1), norms, rtol=1e-5)
        turned = np.arccos(np.sum(flat[0] * between, axis=1) / norms**2)
        np.testing.assert_allclose(turned, weight * angles, rtol=1e-5)


def test_slerp_ends_exactly_and_is_finite_where_there_is_no_arc():
    a, b = (jnp.float32(x) for x in (Z_T, Z0))
    np.testing.assert_array_equal(slerp(a, b, jnp.array([0.0, 1.0])), jnp.stack([a[0], b[1]]))
    close(slerp(a, 2 * a, 0.5), 1.5 * a)
    close(slerp(a, a + 1e-5 * b, 0.5), a)
    np.testing.assert_allclose(slerp(a, -a, 0.25), a / 2, atol=1e-6)
    assert jnp.isfinite(slerp(0 * a, b, 0.5)).all()
    assert jnp.isfinite(slerp(0 * a, 0 * b, 0.5)).all()
