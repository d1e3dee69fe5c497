"""Distances against public implementations' numbers (tests/golden/metrics) and closed forms."""

import json

import numpy as np
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate.distances import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifolds,
    no_moments,
    radii,
    update,
)
from tests.published import GOLDEN

FACTS = json.loads((GOLDEN / "metrics" / "metrics.json").read_text())
ARRAYS = {n: dict(np.load(GOLDEN / "metrics" / f"{n}.npz")) for n in ("fid", "kid", "isc", "prc")}
FEATURES = [name for name in FACTS["fid"] if f"{name}_1" in ARRAYS["fid"]]
SINGULAR = ("n_less_than_d", "low_rank_subspaces", "identical_n_less_than_d", "decaying_spectrum")


def moments(features: np.ndarray, portion: int | None = None) -> Moments:
    found = no_moments(features.shape[1])
    for start in range(0, len(features), portion or len(features)):
        found = update(found, features[start : start + (portion or len(features))])
    return found


@pytest.mark.parametrize("name", FEATURES)
def test_frechet_distance_of_features(name):
    sets = [moments(ARRAYS["fid"][f"{name}_{i}"]) for i in (1, 2)]
    found = frechet_distance(*[x for m in sets for x in (m.mean, m.covariance)])
    expected = FACTS["fid"][name]["exact_nuclear_norm"]
    tolerance = {"atol": 1e-4} if name in SINGULAR else {"rtol": 1e-9, "atol": 1e-6}
    np.testing.assert_allclose(found, expected, **{"rtol": 0, **tolerance})


def test_frechet_distance_of_given_statistics():
    a = ARRAYS["fid"]
    found = frechet_distance(*(a[f"stats_diag_{x}"] for x in ("mu1", "sigma1", "mu2", "sigma2")))
    np.testing.assert_allclose(found, FACTS["fid"]["stats_diag"]["closed_form"], rtol=1e-12)


def test_frechet_distance_of_inceptions_features():
    spatial = np.load(GOLDEN / "metrics" / "inception.npz")["tff_spatial"].reshape(13, -1)
    sets = moments(spatial[:7]), moments(spatial[7:])
    found = frechet_distance(*[x for m in sets for x in (m.mean, m.covariance)])
    expected = FACTS["fid"]["sfid_spatial_first7_vs_last6"]["exact_nuclear_norm"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)  # singular: 7 images


@pytest.mark.parametrize("portion", [1, 7, 200])
def test_moments_do_not_depend_on_portions(portion):
    x = 1000 + np.random.default_rng(0).standard_normal((200, 5))
    found = moments(x, portion)
    assert found.number == 200
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-9, atol=1e-12)
    assert update(found, x[:0]) is found


@pytest.mark.parametrize("name", [n for n, f in FACTS["kid"].items() if not f.get("kwargs", 1)])
def test_kernel_distance(name):
    facts, a = FACTS["kid"][name], ARRAYS["kid"]
    found = kernel_distance(
        a[f"{name}_1"], a[f"{name}_2"], subsets=facts["subsets"], size=facts["subset_size"]
    )
    expected = facts["torch_fidelity"]["float64"]
    np.testing.assert_allclose(found, [expected["mean"], expected["std_ddof0"]], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ARRAYS["isc"])
def test_inception_score(name):
    expected = FACTS["isc"][name]["shuffled_seed2020"]
    found = inception_score(ARRAYS["isc"][name])
    np.testing.assert_allclose(found, [expected["mean"], expected["std_ddof0"]], atol=1e-9)
    whole = inception_score(ARRAYS["isc"][name], splits=1)
    np.testing.assert_allclose(whole[0], FACTS["isc"][name]["one_split"], rtol=1e-9)


@pytest.mark.parametrize("name", FACTS["prc"])
def test_precision_and_recall(name):
    facts, a = FACTS["prc"][name], ARRAYS["prc"]
    real, samples = a[f"{name}_real"], a[f"{name}_fake"]
    found = manifolds(real, samples, facts["k"])
    assert (found.precision, found.recall) == (facts["precision"], facts["recall"])
    for which, x in (("real", real), ("fake", samples)):
        expected = a[f"{name}_radius2_{which}"]
        np.testing.assert_allclose(radii(x.astype(float), facts["k"]), expected, 1e-9, 1e-12)


def test_density_and_coverage_count_neighbourhoods():
    """On a line: neighbourhoods of real points at 0, 1, 2, 10 with k = 1 reach 1, 1, 1 and 8."""
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    found = manifolds(real, np.array([[0.5], [2.5], [30.0]]), k=1)
    # 0.5 is near 0 and 1; 2.5 near 2 and 10; 30 near none
    assert found.density == pytest.approx(4 / 3)
    assert found.precision == pytest.approx(2 / 3)
    assert found.coverage == 1.0
    same = manifolds(real, real, k=1)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)


def test_too_few_are_said():
    x = np.zeros((3, 2))
    with pytest.raises(UserError, match="subsets of 1000 takes as many images, not 3"):
        kernel_distance(x, x)
    with pytest.raises(UserError, match="10 splits takes 10 images"):
        inception_score(x)
    with pytest.raises(UserError, match="3 neighbours take more than 3 images"):
        manifolds(x, x)
    with pytest.raises(UserError, match="features of 2 numbers cannot be compared to 3"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
