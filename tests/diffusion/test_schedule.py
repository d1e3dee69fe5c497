"""Schedules and sampling times against the published tables."""

import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax import build
from latent_diffusion_jax.diffusion.schedule import (
    SCHEDULES,
    add_noise,
    at,
    fresh_fraction,
    make_betas,
    make_schedule,
    make_timesteps,
    posterior,
)
from latent_diffusion_jax.errors import UserError
from tests.published import golden

TABLES, PUBLISHED = golden("schedules")[0], golden("schedules")[1]["schedules"]
DDIM_TABLES, _ = golden("ddim_tables")
LINEAR = {"linear_start": 0.0015, "linear_end": 0.0195}
T = 1000
SCHEDULE = make_schedule(name="linear", **LINEAR)


def published(name):
    options = dict(PUBLISHED[name])
    return make_schedule(name=options.pop("beta_schedule", "linear"), **options)


def close(actual, expected, relative=1e-5):
    """Equal up to `relative` of the largest value."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedule_equals_published(name):
    schedule = published(name)
    assert schedule.alpha.dtype == schedule.sigma.dtype == jnp.float32
    np.testing.assert_allclose(schedule.alpha, TABLES[f"{name}/sqrt_alphas_cumprod"], rtol=2e-7)
    sigma = TABLES[f"{name}/sqrt_one_minus_alphas_cumprod"]
    np.testing.assert_allclose(schedule.sigma, sigma, rtol=2e-7)
    t = np.arange(T)
    z = jnp.ones([T, 1])
    mean, variance = posterior(schedule, z, 0 * z, t, t - 1)
    close(mean[:, 0], TABLES[f"{name}/posterior_mean_coef1"])
    # As the noise that it stands for, beside latents of unit scale: the variance itself is a
    # difference of neighbours in float32, good to 5e-5 of its value.
    deviation = np.sqrt(TABLES[f"{name}/posterior_variance"])
    np.testing.assert_allclose(jnp.sqrt(variance[:, 0]), deviation, rtol=0, atol=1e-5)
    mean, _ = posterior(schedule, 0 * z, z, t, t - 1)
    close(mean[:, 0], TABLES[f"{name}/posterior_mean_coef2"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_derived_tables_equal_published(name):
    options = dict(PUBLISHED[name])
    betas = make_betas(name=options.pop("beta_schedule", "linear"), **options)
    np.testing.assert_allclose(betas, TABLES[f"{name}/betas"], rtol=0, atol=1e-14)
    alphas_cumprod = np.cumprod(1 - betas)
    np.testing.assert_allclose(alphas_cumprod, TABLES[f"{name}/alphas_cumprod"], rtol=1e-12)
    schedule, t = published(name), np.arange(T)
    alpha, sigma = at(schedule, t)
    previous, _ = at(schedule, t - 1)
    for ours, table in (
        (previous**2, "alphas_cumprod_prev"),
        (1 / alpha, "sqrt_recip_alphas_cumprod"),
        (sigma / alpha, "sqrt_recipm1_alphas_cumprod"),
    ):
        np.testing.assert_allclose(ours, TABLES[f"{name}/{table}"], rtol=1e-6)
    expected = TABLES[f"{name}/log_one_minus_alphas_cumprod"]
    np.testing.assert_allclose(2 * jnp.log(sigma), expected, rtol=1e-5, atol=1e-6)
    _, variance = posterior(schedule, jnp.ones([T, 1]), jnp.ones([T, 1]), t, t - 1)
    expected = TABLES[f"{name}/posterior_log_variance_clipped"][1:]  # at 0, theirs stands for -inf
    np.testing.assert_allclose(jnp.log(variance[1:, 0]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name,power", [("sqrt_linear", 1), ("sqrt", 0.5)])
def test_other_schedules_follow_their_formula(name, power):
    schedule = make_schedule(name=name, timesteps=3, linear_start=0.01, linear_end=0.09)
    betas = np.array([0.01, 0.05, 0.09]) ** power
    np.testing.assert_allclose(schedule.alpha**2, np.cumprod(1 - betas), rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_preserve_variance_and_only_get_noisier(name):
    schedule = make_schedule(name=name, timesteps=50, **({} if name == "cosine" else LINEAR))
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=3e-7)
    assert (np.diff(schedule.alpha) < 0).all()
    assert (np.diff(schedule.sigma) >= 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"name": "linear", "linear_start": 0.00085, "linear_end": 0.012},
        {"name": "linear", **LINEAR},  # its last alpha but one is below 2^-12
        {"name": "linear", "timesteps": 2, **LINEAR},
        {"name": "cosine"},
    ],
)
def test_zero_terminal_snr_stretches_alpha_down_to_zero(options):
    before = np.sqrt(np.cumprod(1 - make_betas(**options)))
    betas = make_betas(**options, zero_terminal_snr=True)
    assert ((betas > 0) & (betas < 1)).all()
    after = np.sqrt(np.cumprod(1 - betas))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-12)
    np.testing.assert_allclose(after[-1], min(2.0**-12, after[-2] / 2), rtol=1e-6)
    shrunk = (before - before[-1]) / (before[0] - before[-1])  # linear, from 1 to 0
    np.testing.assert_allclose(after[:-1], shrunk[:-1] * before[0], rtol=1e-9)
    schedule = make_schedule(**options, zero_terminal_snr=True)
    np.testing.assert_allclose(schedule.alpha, after, rtol=1e-6)
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=3e-7)


def test_zero_terminal_snr_is_a_key_of_the_config():
    section = {"name": "linear", **LINEAR, "zero_terminal_snr": True}
    for make in (make_schedule, make_betas):
        build.unpack("diffusion.schedule", make, section, takes=[SCHEDULES["linear"]])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"name": "lineer", **LINEAR}, "did you mean 'linear'"),
        ({"name": "linear", "linear_start": 0.1}, "linear_end"),
        ({"name": "cosine", **LINEAR}, "linear_start"),
        ({"name": "linear", "linear_start": 0.5, "linear_end": 1.5}, "outside"),
        ({"name": "linear", "linear_start": 0.0, "linear_end": 0.1}, "outside"),
        ({"name": "cosine", "timesteps": 0}, "0 timesteps"),
        ({"name": "cosine", "timesteps": 1, "zero_terminal_snr": True}, "at least 2"),
    ],
)
def test_bad_schedule_is_one_clear_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        make_schedule(**options)
    assert "\n" not in str(error.value)


def test_at_knows_clean_data_and_broadcasts():
    schedule = published("txt2img")
    assert at(schedule, -1) == (1.0, 0.0)
    alpha, sigma = at(schedule, jnp.array([-1, 0, T - 1]), ndim=4)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    np.testing.assert_array_equal(alpha[1:].ravel(), schedule.alpha[jnp.array([0, -1])])
    z = jnp.ones([2, 3, 3, 1])
    np.testing.assert_array_equal(add_noise(schedule, z, jnp.array([-1, -1]), 9 * z), z)
    scalar, batch = (add_noise(schedule, z, t, 9 * z) for t in (jnp.array(7), jnp.array([7, 7])))
    np.testing.assert_array_equal(scalar, batch)


def test_ops_equal_published():
    (arrays, _), schedule = golden("diffusion_ops"), published("ldm_vq_0.0195")
    x0, t = arrays["x0"], arrays["t"]
    close(add_noise(schedule, x0, t, arrays["noise"]), arrays["out_q_sample"], 1e-6)
    _, sigma = at(schedule, t, x0.ndim)
    close(add_noise(schedule, x0, t, 0 * x0), arrays["out_q_mean"], 1e-6)
    np.testing.assert_allclose(sigma**2, arrays["out_q_var"], rtol=1e-6)
    np.testing.assert_allclose(2 * jnp.log(sigma), arrays["out_q_logvar"], rtol=1e-5, atol=1e-6)
    mean, variance = posterior(schedule, x0, arrays["x_t"], t, t - 1)
    close(mean, arrays["out_post_mean"])
    close(variance, arrays["out_post_var"])
    later = t > 0  # at 0, theirs stands for -inf
    np.testing.assert_allclose(
        jnp.log(variance[later]), arrays["out_post_logvar"][later], rtol=0, atol=1e-4
    )


def test_posterior_agrees_with_bayes_between_distant_times():
    """From the joint Gaussian of z_s and z_t given z: covariance alpha_t / alpha_s sigma_s^2."""
    schedule = published("ldm_vq_0.0195")
    t, s, z, z_t = 700, 300, 0.3, -1.2
    alpha, sigma = (np.asarray(x, np.float64) for x in (schedule.alpha, schedule.sigma))
    covariance = alpha[t] / alpha[s] * sigma[s] ** 2
    mean, variance = posterior(schedule, jnp.array([z]), jnp.array([z_t]), t, s)
    expected = alpha[s] * z + covariance / sigma[t] ** 2 * (z_t - alpha[t] * z)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    expected = sigma[s] ** 2 - covariance**2 / sigma[t] ** 2
    np.testing.assert_allclose(variance, expected, rtol=1e-5)


def golden_tables():
    names = (name.removesuffix("/timesteps") for name in DDIM_TABLES)
    return sorted(name for name in names if f"{name}/timesteps" in DDIM_TABLES)


@pytest.mark.parametrize("table", golden_tables())
def test_timesteps_equal_published(table):
    kind, steps = table.split("/S")
    name = {"uniform": "original", "quad": "original_quad"}[kind]
    t, t_next = make_timesteps(name, int(steps), SCHEDULE)
    np.testing.assert_array_equal(t[::-1], DDIM_TABLES[f"{table}/timesteps"])
    for model in ("ldm_vq_0.0195", "txt2img"):
        schedule = published(model)
        alpha, _ = at(schedule, t)
        alpha_next, sigma_next = at(schedule, t_next)
        close(alpha[::-1] ** 2, DDIM_TABLES[f"{model}/{table}/alphas"], 1e-6)
        close(alpha_next[::-1] ** 2, DDIM_TABLES[f"{model}/{table}/alphas_prev"], 1e-6)
        noise = sigma_next * jnp.sqrt(fresh_fraction(schedule, t, t_next))
        for eta in (0.5, 1.0):
            close(eta * noise[::-1], DDIM_TABLES[f"{model}/{table}/sigmas_eta{eta}"])


def test_uniform_has_exactly_the_steps_asked_for():
    for steps in range(1, T + 1):
        t, t_next = make_timesteps("uniform", steps, SCHEDULE)
        assert len(t) == steps
        assert t.dtype == t_next.dtype == np.int32
        assert (np.diff(t) < 0).all()
        assert t[-1] >= 0
        assert t[0] < T
        np.testing.assert_array_equal(t_next[:-1], t[1:])
        assert t_next[-1] == (0 if steps < T else -1)
        if T % steps == 0 and steps not in (500, T):  # 500 and 1000 crash in the original
            published_t, published_next = make_timesteps("original", steps, SCHEDULE)
            np.testing.assert_array_equal(t, published_t)
            np.testing.assert_array_equal(t_next, published_next)


@pytest.mark.parametrize("name", ["uniform", "trailing", "quad", "karras"])
@pytest.mark.parametrize("timesteps", [1, 2, 7, 50, 1000])
def test_timesteps_fit_every_schedule(name, timesteps):
    schedule = make_schedule(name="linear", timesteps=timesteps, **LINEAR)
    for steps in range(1, timesteps + 1):
        t, t_next = make_timesteps(name, steps, schedule)
        assert len(t) == steps
        assert (t_next < t).all()
        assert 0 <= t[-1] <= t[0] < timesteps
    np.testing.assert_array_equal(t, np.arange(timesteps)[::-1])  # all of them: the full grid
    np.testing.assert_array_equal(t_next, t - 1)


def test_trailing_starts_at_the_noisiest_and_ends_clean():
    t, t_next = make_timesteps("trailing", 10, SCHEDULE)
    np.testing.assert_array_equal(t, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99])
    assert t_next[-1] == -1


def test_karras_levels_are_those_of_the_paper_up_to_the_grid():
    t, t_next = make_timesteps("karras", 20, SCHEDULE)
    assert (t[0], t[-1], t_next[-1]) == (T - 1, 0, -1)
    noise = np.asarray(SCHEDULE.sigma / SCHEDULE.alpha, np.float64)
    root = np.linspace(noise[-1] ** (1 / 7), noise[0] ** (1 / 7), 20)
    for time, level in zip(t, root**7, strict=True):
        below, above = noise[max(time - 1, 0)], noise[min(time + 1, T - 1)]
        assert below <= level * (1 + 1e-6)
        assert level <= above * (1 + 1e-6)


def test_quad_is_dense_at_little_noise():
    t, _ = make_timesteps("quad", 20, SCHEDULE)
    assert (t[0], t[-1]) == (800, 0)
    np.testing.assert_allclose(np.sqrt(t), np.linspace(np.sqrt(800), 0, 20), atol=0.3)


def test_original_refuses_exactly_the_steps_that_crash_in_the_original():
    crashes = {3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, T + 1)}
    for steps in range(1, T + 1):
        if steps in crashes:
            with pytest.raises(UserError, match=f"t = 1000 of 1000 with {steps} steps"):
                make_timesteps("original", steps, SCHEDULE)
        else:
            t, _ = make_timesteps("original", steps, SCHEDULE)
            assert len(t) == -(-T // (T // steps))
            assert t.max() < T


@pytest.mark.parametrize("name,steps", [("uniform", 0), ("trailing", 1001), ("unifrom", 10)])
def test_bad_timesteps_are_one_clear_line(name, steps):
    with pytest.raises(UserError, match=f"{steps} sampling steps|did you mean 'uniform'"):
        make_timesteps(name, steps, SCHEDULE)
