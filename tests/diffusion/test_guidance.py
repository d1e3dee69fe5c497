"""Guidance against closed forms: what it makes of exact models is again an exact model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.diffusion.guidance import (
    classifier_guide,
    dynamic_threshold,
    guide,
    image_guide,
    within,
)
from latent_diffusion_jax.diffusion.prediction import to_x0
from latent_diffusion_jax.diffusion.samplers import make_sampler, sample
from latent_diffusion_jax.diffusion.schedule import at, make_schedule, make_timesteps
from latent_diffusion_jax.errors import UserError

Z = jax.random.normal(jax.random.key(0), [2, 3, 3, 1])
COND = jnp.array([1.0, -2.0])
NULL = jnp.zeros(2)
TIMES = pytest.mark.parametrize("t", [jnp.array(50), jnp.array([10, 90])], ids=["scalar", "batch"])
SCHEDULE = make_schedule(name="linear", linear_start=0.0015, linear_end=0.0195)
MEAN, VARIANCE = 0.7, 0.25


def model(z_t, t, cond):
    return 0.5 * z_t + (cond * (1 + t / 100))[:, None, None, None]


def doubled(calls=None):
    def denoise(z_t, t):
        if calls is not None:
            calls.append(z_t.shape)
        return model(z_t, t, jnp.concatenate([NULL, COND]))

    return denoise


@TIMES
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


def test_outside_the_interval_the_condition_alone_is_evaluated():
    rows = []

    def counted(denoise):
        def count(z_t, t):
            jax.debug.callback(lambda t: rows.append((int(t), len(z_t))), t, ordered=True)
            return denoise(z_t, t)

        return count

    guided = guide(counted(doubled()), 3.0)
    chosen = within((200, 600), guided, counted(lambda z_t, t: model(z_t, t, COND)))
    visited = jnp.array([900, 600, 599, 200, 199, 0])
    _, found = jax.jit(lambda: jax.lax.scan(lambda _, t: (None, chosen(Z, t)), None, visited))()
    jax.effects_barrier()
    assert rows == [(900, 2), (600, 2), (599, 4), (200, 4), (199, 2), (0, 2)]
    for t, eps in zip(visited, found):
        uncond, cond = model(Z, t, NULL), model(Z, t, COND)
        expected = 3 * cond - 2 * uncond if 200 <= t < 600 else cond
        np.testing.assert_allclose(eps, expected, rtol=1e-6, atol=1e-5)


def gaussian_eps(z_t, t, mean=MEAN):
    """E[eps | z_t] for data N(mean, VARIANCE I)."""
    alpha, sigma = at(SCHEDULE, t, z_t.ndim)
    return sigma * (z_t - alpha * mean) / (alpha**2 * VARIANCE + sigma**2)


def log_classes(z_t, t):
    """log p(class | z_t), [B, 2]: two classes, as likely, with means MEAN and -MEAN."""
    alpha, sigma = at(SCHEDULE, t, z_t.ndim)
    variance = alpha**2 * VARIANCE + sigma**2
    squares = [((z_t - alpha * m) ** 2 / variance).sum((1, 2, 3)) for m in (MEAN, -MEAN)]
    return jax.nn.log_softmax(-jnp.stack(squares, axis=-1) / 2)


def mixture_eps(z_t, t):
    """E[eps | z_t] when the class is unknown."""
    of_first, of_second = jnp.exp(log_classes(z_t, t)).T.reshape((2, -1) + (1,) * (z_t.ndim - 1))
    return of_first * gaussian_eps(z_t, t, MEAN) + of_second * gaussian_eps(z_t, t, -MEAN)


@TIMES
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_the_exact_classifier_guides_as_the_exact_condition_does(scale, t):
    t = 5 * t
    guided = classifier_guide(mixture_eps, SCHEDULE, lambda z, t: log_classes(z, t)[:, 0], scale)
    both = jnp.concatenate([mixture_eps(Z, t), gaussian_eps(Z, t)])
    expected = guide(lambda z, t: both, scale)(Z, t)
    np.testing.assert_allclose(jax.jit(guided)(Z, t), expected, atol=1e-5)


@TIMES
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_image_guiding_by_a_linear_likelihood_shifts_the_data(scale, t):
    """N(m, v) weighted with exp(b x0) is N(m + b v, v), for all noise levels: guiding is exact."""
    slope = jnp.linspace(-1, 1, 9).reshape(1, 3, 3, 1)
    t = 5 * t
    guided = image_guide(gaussian_eps, SCHEDULE, lambda x0: (slope * x0).sum((1, 2, 3)), scale)
    expected = gaussian_eps(Z, t, MEAN + scale * slope * VARIANCE)
    np.testing.assert_allclose(jax.jit(guided)(Z, t), expected, atol=1e-5)


def test_image_guiding_by_an_observation_pulls_x0_through_the_model():
    """log p(y | x0) = -|x0 - y|^2 / 2: its gradient, times d x0 / d z_t of the best model."""
    y, t = 0.3, jnp.array(400)
    guided = image_guide(
        gaussian_eps, SCHEDULE, lambda x0: -((x0 - y) ** 2).sum((1, 2, 3)) / 2, 2.0
    )
    alpha, sigma = at(SCHEDULE, t)
    slope = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    x0 = MEAN + slope * (Z - alpha * MEAN)
    expected = gaussian_eps(Z, t) - 2 * sigma * (y - x0) * slope
    np.testing.assert_allclose(guided(Z, t), expected, atol=1e-5)


@pytest.mark.parametrize("guidance", ["classifier", "image"])
def test_sampling_with_guidance_gives_the_posterior(guidance):
    """Of N(m, v), given y = x0 + N(0, r) or weighted with exp(b x0)."""
    y, r, b, rows = -0.5, 0.5, -1.2, 20_000

    def log_observation(z_t, t):
        alpha, sigma = at(SCHEDULE, t, z_t.ndim)
        spread = alpha**2 * VARIANCE + sigma**2
        x0 = MEAN + alpha * VARIANCE / spread * (z_t - alpha * MEAN)
        return (-((y - x0) ** 2) / (r + VARIANCE * sigma**2 / spread) / 2)[:, 0, 0, 0]

    guided, mean, variance = {
        "classifier": (
            classifier_guide(gaussian_eps, SCHEDULE, log_observation, 1.0),
            (MEAN / VARIANCE + y / r) / (1 / VARIANCE + 1 / r),
            1 / (1 / VARIANCE + 1 / r),
        ),
        "image": (
            image_guide(gaussian_eps, SCHEDULE, lambda x0: b * x0.sum((1, 2, 3)), 1.0),
            MEAN + b * VARIANCE,
            VARIANCE,
        ),
    }[guidance]
    keys = jax.random.split(jax.random.key(1), 1001)
    z = sample(
        make_sampler("ddpm", SCHEDULE),
        guided,
        jax.random.normal(keys[-1], [rows, 1, 1, 1]),
        timesteps=make_timesteps("trailing", 1000, SCHEDULE),
        noise=lambda i: jax.random.normal(keys[i], [rows, 1, 1, 1]),
    )
    # four standard errors; in the variance also 0.5 % for steps of finite length
    assert abs(z.mean() - mean) < 4 * np.sqrt(variance / rows)
    assert abs(z.var() - variance) < 4 * variance * np.sqrt(2 / rows) + 0.005 * variance


@TIMES
@pytest.mark.parametrize("floor", [1.0, 0.5])
def test_dynamic_threshold_is_imagens_for_each_image(floor, t):
    z = Z * jnp.array([1.0, 0.05]).reshape(2, 1, 1, 1)  # the second image is within the range
    t = 5 * t
    levels = at(SCHEDULE, t, 4)
    eps = 0.2 * z
    found = dynamic_threshold(lambda z_t, t: eps, SCHEDULE, 0.8, floor)(z, t)
    for before, after in zip(*(to_x0("eps", e, z, *levels) for e in (eps, found))):
        s = max(np.quantile(np.abs(before), 0.8), floor)
        np.testing.assert_allclose(after, np.clip(before, -s, s) / s * floor, atol=1e-5)
    np.testing.assert_array_equal(found[1], eps[1])


def test_dynamic_threshold_keeps_samples_in_range():
    def largest(denoise):
        times, sampler = make_timesteps("trailing", 10, SCHEDULE), make_sampler("ddim", SCHEDULE)
        return jnp.abs(sample(sampler, denoise, Z, timesteps=times, noise=jnp.float32)).max()

    def wild(z_t, t):
        return 0.1 * z_t

    assert largest(wild) > 3
    np.testing.assert_allclose(largest(dynamic_threshold(wild, SCHEDULE, 0.9)), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: within((500, 500), model, model), "t = 500 up to 500"),
        (lambda: dynamic_threshold(model, SCHEDULE, 99.5), "quantile 99.5"),
        (lambda: dynamic_threshold(model, SCHEDULE, 0.9, floor=0.0), "floor 0.0"),
    ],
)
def test_bad_options_are_one_clear_line(make, message):
    with pytest.raises(UserError, match=message):
        make()
