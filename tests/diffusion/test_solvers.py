"""Samplers of higher order: published trajectories, the order they claim, the moments they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.diffusion.guidance import guide
from latent_diffusion_jax.diffusion.samplers import SAMPLERS, make_sampler, sample
from latent_diffusion_jax.diffusion.schedule import at, make_schedule, make_timesteps
from tests.diffusion.test_samplers import close, published_eps
from tests.published import golden

MEAN, VARIANCE = 0.7, 0.25
FINE = 64_000  # times of a schedule that is all but continuous
SCHEDULE = make_schedule(
    name="linear", timesteps=FINE, linear_start=1.5 / FINE, linear_end=19.5 / FINE
)
ORDERS = {"ddim": 1, "euler": 1, "plms": 2, "heun": 2, "dpmpp_2m": 2, "unipc": 3}
STOCHASTIC = {"ddpm": 1, "euler_ancestral": 1, "dpmpp_2m_sde": 2}  # weak orders


def gaussian_eps(z_t, t, schedule=SCHEDULE):
    """E[eps | z_t] for data N(MEAN, VARIANCE I)."""
    alpha, sigma = at(schedule, t, z_t.ndim)
    return sigma * (z_t - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)


def flowed(z, t, t_end):
    """Where the probability flow leads: (z_t - alpha m) / sqrt(alpha^2 v + sigma^2) stays."""
    (a, s), (b, r) = at(SCHEDULE, t), at(SCHEDULE, t_end)
    scale = np.sqrt(b**2 * VARIANCE + r**2) / np.sqrt(a**2 * VARIANCE + s**2)
    return b * MEAN + scale * (z - a * MEAN)


def test_every_sampler_has_its_truth():
    assert set(SAMPLERS) == {*ORDERS, *STOCHASTIC}


@pytest.mark.parametrize("scale", ["1.0", "3.0"])
def test_plms_equals_published(scale):
    arrays, case = golden(f"traj_plms10_s{scale}")
    denoise = published_eps(arrays["c"])
    if case["unconditional_guidance_scale"] != 1:
        both = published_eps(np.concatenate([arrays["uc"], arrays["c"]]))
        denoise = guide(both, case["unconditional_guidance_scale"])
    schedule = make_schedule(name="linear", **case["schedule"])
    timesteps = make_timesteps("original", case["S"], schedule)
    z_T = jnp.asarray(arrays["x_T"])
    z, path = sample(
        make_sampler("plms", schedule),
        denoise,
        z_T,
        timesteps=timesteps,
        noise=lambda i: i,
        return_path=True,
    )
    close(z, arrays["out_final"])
    close(path, arrays["out_x_inter"][1:])


@pytest.mark.parametrize("name", ORDERS)
def test_error_falls_with_the_order(name):
    """Between two noise levels, in steps of one size in lambda."""
    z = jnp.array([-2.0, 0.5, 3.0]).reshape(1, 3, 1, 1)
    start, end = FINE - 1, FINE // 10
    expected = flowed(z, start, end)
    noise_levels = np.log(np.asarray(SCHEDULE.sigma / SCHEDULE.alpha, np.float64))

    @jax.jit
    def error(t, t_next):
        sampler = make_sampler(name, SCHEDULE)
        out = sample(sampler, gaussian_eps, z, timesteps=(t, t_next), noise=lambda i: i)
        return jnp.abs(out - expected).max()

    def error_after(steps):
        levels = np.linspace(noise_levels[start], noise_levels[end], steps + 1)
        t = np.searchsorted(noise_levels, levels).clip(end, start).astype(np.int32)
        return error(t[:-1], t[1:])

    order = np.log2(error_after(20) / error_after(80)) / 2
    assert order > ORDERS[name] - 0.25


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_variance_of_stochastic_samplers(name):
    """They are affine in their noise: the variance is the sum of squared derivatives."""
    start, end = FINE - 1, FINE // 10
    (a, s), (b, r) = at(SCHEDULE, start), at(SCHEDULE, end)
    scales = (jnp.sqrt(a**2 * VARIANCE + s**2), 1.0)  # of z, of the noise

    def error_after(steps):
        t = np.round(np.linspace(start, end, steps + 1)).astype(np.int32)

        def last(z, noise):
            sampler = make_sampler(name, SCHEDULE)
            z = (z + a * MEAN).reshape(1, 1, 1, 1)
            timesteps = t[:-1], t[1:]
            return sample(
                sampler, gaussian_eps, z, timesteps=timesteps, noise=lambda i: noise[i]
            ).sum()

        still = 0.0, jnp.zeros(steps)
        mean, derivatives = jax.jit(jax.value_and_grad(last, argnums=(0, 1)))(*still)
        np.testing.assert_allclose(mean, b * MEAN, atol=1e-5)
        variance = sum(jnp.sum((c * d) ** 2) for c, d in zip(scales, derivatives, strict=True))
        return jnp.abs(variance - (b**2 * VARIANCE + r**2))

    few, many = error_after(25), error_after(100)
    assert np.log2(few / many) / 2 > STOCHASTIC[name] - 0.1


def test_relatives():
    """Euler's methods are DDIM's ends; with one step all deterministic ones are Euler's."""
    noise = jax.random.normal(jax.random.key(0), [10, 2, 4, 4, 1])
    z = jax.random.normal(jax.random.key(1), [2, 4, 4, 1])

    def run(name, steps=10, **options):
        timesteps = make_timesteps("trailing", steps, SCHEDULE)
        sampler = make_sampler(name, SCHEDULE, **options)
        return sample(sampler, gaussian_eps, z, timesteps=timesteps, noise=lambda i: noise[i])

    close(run("euler_ancestral"), run("ddpm"))
    close(run("euler_ancestral"), run("ddim", eta=1.0))
    for name in ("heun", "dpmpp_2m", "unipc"):
        close(run(name, 1), run("euler", 1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_into_clean_data_and_over_repeated_times_all_is_finite(name):
    schedule = make_schedule(name="cosine")  # whose last alpha is 5e-5
    sampler = make_sampler(name, schedule)
    z = jax.random.normal(jax.random.key(1), [1, 2, 2, 1])
    for times in ([999, 500, 0, -1], [700, 300, 300, 1, 1, 0, -1]):
        t = np.array(times, np.int32)
        out = sample(
            sampler,
            lambda z, t: gaussian_eps(z, t, schedule),
            z,
            timesteps=(t[:-1], t[1:]),
            noise=lambda i: jnp.ones_like(z),
        )
        assert jnp.isfinite(out).all()
