"""Samplers against published trajectories and against Gaussian data, whose best eps is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.diffusion.guidance import guide
from latent_diffusion_jax.diffusion.prediction import PREDICTIONS, make_denoise, target, to_x0
from latent_diffusion_jax.diffusion.samplers import (
    SAMPLERS,
    image_keys,
    image_noise,
    make_sampler,
    sample,
)
from latent_diffusion_jax.diffusion.schedule import at, make_schedule, make_timesteps
from latent_diffusion_jax.errors import UserError
from tests.published import golden

SCHEDULE = make_schedule(name="linear", linear_start=0.0015, linear_end=0.0195)
DDIM_CASES = [
    f"traj_ddim10_{case}" for case in ("eta0_s1.0", "eta0_s1.5", "eta0_s3.0", "eta1_s1.0")
]
MEAN, VARIANCE = 0.7, 0.25
# in float64 throughout, for loops in numpy; the schedule is SCHEDULE
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)


def close(actual, expected):
    """Equal up to 1e-5 of the largest value."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def published_eps(c):
    """eps(z, t, c) = 0.6 z + 0.1 sin(t / 100) + 0.05 c: per element, so the layout is free."""
    c = jnp.asarray(c).reshape(-1, 1, 1, 1)
    return lambda z, t: 0.6 * z + 0.1 * jnp.sin(t / 100) + 0.05 * c


def numpy_ddim(z, t, t_next, noise, eta, revise=lambda x0: x0):
    """A step of the published sampler, t_next >= 0, with published_eps of c = 0."""
    a, a_next = ALPHAS_CUMPROD[t], ALPHAS_CUMPROD[t_next]
    eps = 0.6 * z + 0.1 * np.sin(t / 100)
    x0 = (z - np.sqrt(1 - a) * eps) / np.sqrt(a)
    sigma = eta * np.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    direction = np.sqrt(1 - a_next - sigma**2) * eps
    return np.sqrt(a_next) * revise(x0) + direction + sigma * noise


def numpy_ddpm(z, t, t_next, noise, revise=lambda x0: x0):
    """The same of ancestral sampling: one beta for all between the times."""
    a, a_next = ALPHAS_CUMPROD[t], ALPHAS_CUMPROD[t_next]
    beta = 1 - a / a_next
    x0 = (z - np.sqrt(1 - a) * (0.6 * z + 0.1 * np.sin(t / 100))) / np.sqrt(a)
    mean = beta * np.sqrt(a_next) / (1 - a) * revise(x0)
    mean += (1 - a_next) * np.sqrt(1 - beta) / (1 - a) * z
    return mean + np.sqrt(beta * (1 - a_next) / (1 - a)) * noise


def predicted_x0(denoise, schedule, z, path, t):
    """What each step believed, from the latents before it."""
    before = jnp.concatenate([z[None], path[:-1]])
    levels = (at(schedule, t_i) for t_i in t)
    steps = zip(before, t, levels, strict=True)
    return [to_x0("eps", denoise(z_i, t_i), z_i, *level) for z_i, t_i, level in steps]


@pytest.mark.parametrize("name", DDIM_CASES)
def test_ddim_equals_published(name):
    arrays, case = golden(name)
    assert not case["mask"]
    assert case["temperature"] == 1
    denoise = published_eps(arrays["c"])
    if case["unconditional_guidance_scale"] != 1:
        both = published_eps(np.concatenate([arrays["uc"], arrays["c"]]))
        denoise = guide(both, case["unconditional_guidance_scale"])
    noise = jnp.asarray(arrays["noise"]) if case["eta"] else jnp.full([case["S"], 1], jnp.nan)
    timesteps = make_timesteps("uniform", case["S"], SCHEDULE)
    np.testing.assert_array_equal(timesteps[0][::-1], arrays["timesteps"])
    sampler = make_sampler(
        "ddim", make_schedule(name="linear", **case["schedule"]), eta=case["eta"]
    )
    z_T = jnp.asarray(arrays["x_T"])
    z, path = sample(
        sampler, denoise, z_T, timesteps=timesteps, noise=lambda i: noise[i], return_path=True
    )
    close(z, arrays["out_final"])
    close(path, arrays["out_x_inter"][1:])
    x0 = predicted_x0(denoise, SCHEDULE, z_T, path, timesteps[0])
    close(jnp.stack(x0), arrays["out_pred_x0"][1:])


@pytest.mark.parametrize("name,options", [("ddpm", {}), ("ddim", {"eta": 1.0})])
def test_ancestral_sampling_equals_published(name, options):
    arrays, case = golden("ancestral_T50_eps")
    schedule = make_schedule(name="linear", **case["schedule"])
    t, t_next = make_timesteps("uniform", case["T"], schedule)
    noise, z_T, denoise = jnp.asarray(arrays["noise"]), arrays["x_T"], published_eps(arrays["c"])
    z, path = sample(
        make_sampler(name, schedule, **options),
        denoise,
        z_T,
        timesteps=(t, t_next),
        noise=lambda i: noise[i],
        return_path=True,
    )
    kept = (t % case["log_every_t"] == 0) | (t == case["T"] - 1)
    close(z, arrays["out_final"])
    close(z, arrays["out_progressive_final"])
    close(path[kept], arrays["out_intermediates"][1:])
    x0 = predicted_x0(denoise, schedule, jnp.asarray(z_T), path, t)
    close(jnp.stack(x0)[kept], arrays["out_progressive_x0"])


@pytest.mark.parametrize(
    "name,options", [("ddim", {"eta": 0.0}), ("ddim", {"eta": 1.0}), ("ddpm", {})]
)
def test_revised_x0_is_the_published_quantised_one(name, options):
    """In DDIM, what is added to x0 again is the unrevised eps."""
    z, *noise = np.random.default_rng(0).standard_normal([11, 2, 4, 4, 3])
    timesteps = make_timesteps("uniform", 10, SCHEDULE)
    noise_of = {"noise": lambda i: jnp.float32(noise)[i], "timesteps": timesteps}
    sampler = make_sampler(name, SCHEDULE, revise=jnp.tanh, **options)
    ours = sample(sampler, published_eps([0.0]), jnp.float32(z), **noise_of)
    step = {"ddim": numpy_ddim, "ddpm": numpy_ddpm}[name]
    for i, (t, t_next) in enumerate(zip(*timesteps)):
        z = step(z, t, t_next, noise[i], *options.values(), revise=np.tanh)
    close(ours, z)


@pytest.mark.parametrize("clip", [0, 1])
def test_ddpm_step_equals_published(clip):
    """Every image at a time of its own."""
    arrays, case = golden("diffusion_ops")
    x_t, t = arrays["x_t"], arrays["t"]
    schedule = make_schedule(name="linear", **case["schedule"])
    revise = (lambda x0: jnp.clip(x0, -1, 1)) if clip else None
    sampler = make_sampler("ddpm", schedule, revise=revise)
    at_t = t.reshape(-1, 1, 1, 1)
    model = 0.6 * x_t + 0.1 * np.sin(at_t / 100) + 0.05 * arrays["c"].reshape(-1, 1, 1, 1)
    mean, deviated = (
        sampler.step(lambda z, t: model, (), x_t, t, t - 1, noise * jnp.ones_like(x_t))[0]
        for noise in (0, 1)
    )
    close(mean, arrays[f"out_p_mean_clip{clip}"])
    deviation = np.broadcast_to(np.sqrt(arrays["out_p_var"]), x_t.shape)
    np.testing.assert_allclose(deviated - mean, deviation, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_loses_no_brightness(name):
    """Steps on Gaussian data are affine: without noise, from z_T = 0, they lead to the mean.

    All noise has that mean; the last z_t of the published schedule has another.
    """
    z_T = jnp.stack([jnp.zeros([4, 4, 1]), jax.random.normal(jax.random.key(0), [4, 4, 1])])

    def brightness(prediction, zero_terminal_snr):
        schedule = make_schedule(
            name="linear",
            linear_start=0.00085,
            linear_end=0.012,
            zero_terminal_snr=zero_terminal_snr,
        )

        def network(z_t, t):
            eps, levels = gaussian_eps(z_t, t, schedule), at(schedule, t, z_t.ndim)
            alpha, sigma = levels
            x0 = MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (z_t - alpha * MEAN)
            return target(prediction, x0, eps, *levels)

        z = sample(
            make_sampler(name, schedule),
            make_denoise(network, schedule, prediction),
            z_T,
            timesteps=make_timesteps("trailing", 10, schedule),
            noise=lambda i: jnp.zeros([2, 4, 4, 1]),
        )
        assert jnp.isfinite(z).all()
        return z[0]

    for prediction in PREDICTIONS:
        np.testing.assert_allclose(brightness(prediction, True), MEAN, atol=1e-4)
        assert (brightness(prediction, False) < MEAN - 5e-4).all()  # -0.02 without new noise


def test_ddim_with_eta_1_is_ddpm_on_any_subsequence():
    noise = jax.random.normal(jax.random.key(0), [8, 2, 4, 4, 1])
    z = jax.random.normal(jax.random.key(1), [2, 4, 4, 1])
    for name in ("uniform", "trailing", "original_quad"):
        options = {"timesteps": make_timesteps(name, 8, SCHEDULE), "noise": lambda i: noise[i]}
        ddim = make_sampler("ddim", SCHEDULE, eta=1.0)
        ddpm = make_sampler("ddpm", SCHEDULE)
        close(sample(ddim, gaussian_eps, z, **options), sample(ddpm, gaussian_eps, z, **options))


def gaussian_eps(z_t, t, schedule=SCHEDULE):
    """E[eps | z_t] for data N(MEAN, VARIANCE I)."""
    alpha, sigma = at(schedule, t, z_t.ndim)
    return sigma * (z_t - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)


def exact_moments(timesteps, z_mean, z_variance, eta):
    """The mean and variance that DDIM steps with the best eps lead to, in float64.

    Every step is affine: z_next = alpha_next x0 + sqrt(sigma_next^2 - s^2) eps + s noise.
    """
    alphas, sigmas = (np.asarray(x, np.float64) for x in (SCHEDULE.alpha, SCHEDULE.sigma))
    alphas, sigmas = np.append(alphas, 1.0), np.append(sigmas, 0.0)  # index -1: clean
    offset, variance = z_mean - alphas[timesteps[0][0]] * MEAN, z_variance
    for t, s in zip(*timesteps):
        a, b, a_next, b_next = alphas[t], sigmas[t], alphas[s], sigmas[s]
        eps = b / (a**2 * VARIANCE + b**2)  # per unit of z_t - a MEAN
        added = (eta * b_next) ** 2 * (1 - (a * b_next / (a_next * b)) ** 2)
        gain = a_next * (1 - b * eps) / a + np.sqrt(b_next**2 - added) * eps
        offset, variance = gain * offset, gain**2 * variance + added
    last = alphas[timesteps[1][-1]]
    return last * MEAN + offset, variance


@pytest.mark.parametrize("table,steps", [("uniform", 10), ("trailing", 25), ("uniform", 1000)])
def test_ddim_is_its_closed_form_map(table, steps):
    timesteps = make_timesteps(table, steps, SCHEDULE)
    z = jnp.linspace(-3, 3, 7).reshape(1, 7, 1, 1)
    out = sample(
        make_sampler("ddim", SCHEDULE), gaussian_eps, z, timesteps=timesteps, noise=lambda i: i
    )
    expected = [exact_moments(timesteps, float(x), 0.0, 0.0)[0] for x in z.ravel()]
    np.testing.assert_allclose(out.ravel(), expected, atol=2e-5)


def test_ddim_converges_to_the_probability_flow_at_first_order():
    """The flow keeps (z_t - alpha_t m) / sqrt(alpha_t^2 v + sigma_t^2) constant."""
    z = jnp.array([-2.0, 0.5, 3.0]).reshape(1, 3, 1, 1)
    errors = []
    for steps in (1000, 2000, 4000):  # ever finer grids of one continuous process
        schedule = make_schedule(
            name="linear", timesteps=steps, linear_start=1.5 / steps, linear_end=19.5 / steps
        )
        alpha, sigma = at(schedule, steps - 1)
        spread = jnp.sqrt(alpha**2 * VARIANCE + sigma**2)
        expected = MEAN + VARIANCE**0.5 * (z - alpha * MEAN) / spread
        out = sample(
            make_sampler("ddim", schedule),
            partial(gaussian_eps, schedule=schedule),
            z,
            timesteps=make_timesteps("uniform", steps, schedule),
            noise=lambda i: i,
        )
        errors.append(float(jnp.abs(out - expected).max()))
    assert errors[-1] < 4e-3
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, atol=0.2)


@pytest.mark.parametrize(
    "name,options,steps",
    [
        ("ddpm", {}, 1000),
        ("ddpm", {}, 100),
        ("ddim", {}, 200),
        ("ddim", {"eta": 0.5}, 100),
    ],
)
def test_samplers_recover_the_mean_and_variance_of_gaussian_data(name, options, steps):
    shape, count = (64, 64, 1), 8 * 64 * 64
    keys = image_keys(jax.random.key(7), jnp.arange(8))
    timesteps = make_timesteps("trailing", steps, SCHEDULE)
    z = sample(
        make_sampler(name, SCHEDULE, **options),
        gaussian_eps,
        image_noise(keys, -1, shape),
        timesteps=timesteps,
        noise=lambda i: image_noise(keys, i, shape),
    )
    eta = 1.0 if name == "ddpm" else options.get("eta", 0.0)
    mean, variance = exact_moments(timesteps, 0.0, 1.0, eta)
    four_errors = 4 * np.sqrt(variance / count), 4 * variance * np.sqrt(2 / count)
    assert abs(z.mean() - mean) < four_errors[0]
    assert abs(z.var() - variance) < four_errors[1]
    if steps == 1000:  # fine enough to be the data's own moments
        assert abs(z.mean() - MEAN) < four_errors[0]
        assert abs(z.var() - VARIANCE) < four_errors[1]


@pytest.mark.parametrize("name,options", [("ddim", {"eta": 0.7}), ("ddpm", {})])
def test_scan_is_the_python_loop(name, options):
    sampler = make_sampler(name, SCHEDULE, **options)
    timesteps = make_timesteps("uniform", 5, SCHEDULE)
    noise = jax.random.normal(jax.random.key(0), [5, 2, 4, 4, 3])
    start = jax.random.normal(jax.random.key(1), [2, 4, 4, 3])
    z, carry, expected = start, sampler.init(start), []
    for i, (t, t_next) in enumerate(zip(*timesteps)):
        z, carry = sampler.step(gaussian_eps, carry, z, t, t_next, noise[i])
        expected.append(z)
    z, path = sample(
        sampler, gaussian_eps, start, timesteps=timesteps, noise=noise.__getitem__, return_path=True
    )
    np.testing.assert_allclose(path, jnp.stack(expected), atol=1e-5)
    np.testing.assert_array_equal(z, path[-1])


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_ends_and_repeated_times_stay_finite(name):
    """Cosine ends at alpha = 5e-5, and the quadratic table repeats its smallest times."""
    schedule = make_schedule(name="cosine")
    sampler = make_sampler(name, schedule, **({"eta": 1.0} if name == "ddim" else {}))
    z = jnp.ones([1, 2, 2, 1])
    assert jnp.isfinite(sampler.step(lambda z, t: z, (), z, 999, 0, z)[0]).all()
    t, t_next = make_timesteps("original_quad", 300, schedule)
    assert (t == t_next).any()
    still, _ = sampler.step(lambda z, t: 0.3 * z, (), z, t[-2], t_next[-2], 9 * z)
    assert t[-2] == t_next[-2]
    np.testing.assert_allclose(still, z, atol=1e-5)


def test_sampling_is_float32_and_image_i_ignores_its_batch():
    @jax.jit
    def generate(indices, seed=3):
        keys = image_keys(jax.random.key(seed), indices)
        return sample(
            make_sampler("ddpm", SCHEDULE),
            gaussian_eps,
            image_noise(keys, -1, (4, 4, 3)).astype(jnp.bfloat16),
            timesteps=make_timesteps("uniform", 4, SCHEDULE),
            noise=lambda i: image_noise(keys, i, (4, 4, 3)),
        )

    few = jnp.array([4, 2])
    together = generate(jnp.arange(5))
    assert together.dtype == jnp.float32
    np.testing.assert_allclose(generate(few), together[few], atol=1e-6)
    assert jnp.abs(together[0] - together[1]).max() > 0.1
    assert jnp.abs(generate(few, 4) - together[few]).max() > 0.1


def test_noise_differs_between_images_and_steps_and_from_the_start():
    noise_of = jax.jit(partial(image_noise, shape=(8, 8, 2)))
    keys = image_keys(jax.random.key(0), jnp.arange(3))
    noise = np.stack([noise_of(keys, i) for i in range(-1, 3)]).reshape(12, -1)
    correlation = np.corrcoef(noise) - np.eye(12)
    assert np.abs(correlation).max() < 0.4  # 128 numbers each: 4.5 standard errors
    again = noise_of(image_keys(jax.random.key(0), jnp.array([2, 8, 9])), 1)
    np.testing.assert_array_equal(again[0].ravel(), noise[2 * 3 + 2])


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("dimm", {}, "did you mean 'ddim'"),
        ("ddim", {"etta": 0.0}, "etta"),
        ("ddpm", {"eta": 0.0}, "'ddpm'.*eta"),
        ("ddim", {"eta": 1.5}, "1.5"),
    ],
)
def test_bad_sampler_is_one_clear_line(name, options, message):
    with pytest.raises(UserError, match=message):
        make_sampler(name, SCHEDULE, **options)
