"""The KL model's posterior against the original's numbers and closed forms."""

import numpy as np
import pytest

from latent_diffusion_jax.first_stage import posterior
from tests.published import golden, nhwc

ARRAYS, INFO = golden("diag_gaussian")
MOMENTS = nhwc(ARRAYS["params"])  # log-variances far outside [-30, 20] among them


def close(ours, name):
    """To ten times the float32 error of the original, relative to the largest value."""
    about = INFO["accuracy"][name]
    relative = max(about["f32_max_abs_err"] / about["absmax"], np.finfo(np.float32).eps)
    expected = ARRAYS[f"out_{name}"]
    expected = nhwc(expected) if expected.ndim == 4 else expected
    np.testing.assert_allclose(ours, expected, rtol=10 * relative, atol=0)


@pytest.mark.parametrize("name", ["mean", "logvar", "mode", "sample", "kl", "nll"])
def test_published(name):
    mean, logvar = posterior.split_moments(MOMENTS)
    values = {
        "mean": lambda: mean,
        "logvar": lambda: logvar,
        "mode": lambda: posterior.mode(MOMENTS),
        "sample": lambda: posterior.sample(MOMENTS, nhwc(ARRAYS["eps"])),
        "kl": lambda: posterior.kl(MOMENTS),
        "nll": lambda: posterior.nll(nhwc(ARRAYS["params_other"]), nhwc(ARRAYS["x"])),
    }
    close(values[name](), name)


def test_published_kl_of_two_posteriors():
    both = [posterior.split_moments(nhwc(ARRAYS[name])) for name in ("params", "params_other")]
    terms = posterior.normal_kl(*both[0], *both[1])
    close(terms.sum(axis=(1, 2, 3)), "kl_other")
    ours, other = ([x[1:] for x in moments] for moments in both)
    terms = posterior.normal_kl(ours[0], other[1], other[0], 0.5 * other[1])
    error = INFO["accuracy"]["normal_kl"]["f32_max_abs_err"]  # small ones are differences
    np.testing.assert_allclose(terms, nhwc(ARRAYS["out_normal_kl"]), rtol=2e-6, atol=error)


def test_standard_normal_has_no_kl_and_the_entropy_s_nll():
    moments = np.zeros((2, 3, 4, 10), np.float32)
    np.testing.assert_array_equal(posterior.kl(moments), 0)
    at_mode = posterior.nll(moments, posterior.mode(moments))
    np.testing.assert_allclose(at_mode, 3 * 4 * 5 * 0.5 * np.log(2 * np.pi), rtol=1e-6)


def test_samples_have_the_moments():
    eps = np.random.default_rng(0).normal(size=(20_000, 1, 1, 1)).astype(np.float32)
    moments = np.broadcast_to(np.float32([3.0, np.log(4.0)]), (20_000, 1, 1, 2))
    z = np.asarray(posterior.sample(moments, eps))
    assert abs(z.mean() - 3) < 4 * 2 / np.sqrt(len(z))
    assert abs(z.std() - 2) < 4 * 2 / np.sqrt(2 * len(z))
