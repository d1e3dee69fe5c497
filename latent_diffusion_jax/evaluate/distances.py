"""Distances between sets of images, of their features: FID, KID, Inception Score, manifolds.

Sources: Heusel et al. 2017 (FID), Nash et al. 2021 (sFID: the same of other features), Binkowski et
al. 2018 (KID), Salimans et al. 2016 (Inception Score), Kynkaanniemi et al. 2019 (improved precision
and recall), Naeem et al. 2020 (density and coverage). Conventions are torch-fidelity's, which the
paper used (appendix E.3). All in float64, on the host.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from latent_diffusion_jax.errors import UserError

SEED = 2020  # of what is drawn, torch-fidelity's
ROWS = 512  # of distances at once


class Moments(NamedTuple):
    """Of features that came by: how many, their mean [D] and their scatter [D, D].

    The scatter is the sum of outer products of deviations: covariance times (number - 1).
    """

    number: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """[D, D], of a sample (N - 1)."""
        return self.scatter / (self.number - 1)


def no_moments(dim: int) -> Moments:
    """Of nothing yet."""
    return Moments(0, np.zeros(dim), np.zeros((dim, dim)))


def update(moments: Moments, features: np.ndarray) -> Moments:
    """With [n, D] features more; the order and the portions matter in the last digits alone."""
    x = np.asarray(features, np.float64)
    if not len(x):
        return moments
    mean = x.mean(axis=0)
    apart = x - mean
    own = Moments(len(x), mean, apart.T @ apart)
    number = moments.number + own.number
    away = own.mean - moments.mean
    share = own.number / number
    between = np.outer(away, away) * (moments.number * share)
    return Moments(number, moments.mean + away * share, moments.scatter + own.scatter + between)


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """FID: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    By eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), which unlike the root of a product cannot
    become complex or negative where covariances are singular.

    Raises:
      UserError: features of different dimensions.
    """
    if mean.shape != other_mean.shape:
        raise UserError(f"features of {len(mean)} numbers cannot be compared to {len(other_mean)}")
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ other_covariance @ root
    of_product = np.linalg.eigvalsh((product + product.T) / 2)
    overlap = np.sqrt(np.maximum(of_product, 0)).sum()
    away = mean - other_mean
    traces = np.trace(covariance) + np.trace(other_covariance)
    return max(float(away @ away + traces - 2 * overlap), 0.0)  # less is rounding


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000
) -> tuple[float, float]:
    """KID: (mean, deviation) over random subsets of [N, D] and [M, D]; may be negative.

    The unbiased squared distance for the kernel (x . y / D + 1)^3.

    Raises:
      UserError: fewer features than a subset has.
    """
    if min(len(a), len(b)) < size:
        raise UserError(f"KID on subsets of {size} takes as many images, not {min(len(a), len(b))}")
    generator = np.random.RandomState(SEED)  # torch-fidelity's, for its subsets
    found = []
    for _ in range(subsets):
        x = a[generator.choice(len(a), size, replace=False)].astype(np.float64)
        y = b[generator.choice(len(b), size, replace=False)].astype(np.float64)
        found.append(_kernel_distance(x, y))
    return float(np.mean(found)), float(np.std(found))


def _kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def apart(x):  # the mean over pairs of different ones
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return apart(x) + apart(y) - 2 * kernel(x, y).mean()


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """(mean, deviation) over splits of [N, classes], shuffled: exp E KL(p(y|x) || p(y)).

    Raises:
      UserError: fewer images than splits.
    """
    if len(logits) < splits:
        raise UserError(f"the Inception Score of {splits} splits takes {splits} images or more")
    x = logits[np.random.RandomState(SEED).permutation(len(logits))].astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    scores = []
    for i in range(splits):
        rows = slice(i * len(x) // splits, (i + 1) * len(x) // splits)
        mean = p[rows].mean(axis=0)
        log_mean = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
        divergence = np.where(p[rows] > 0, p[rows] * (log_p[rows] - log_mean), 0).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


class Manifolds(NamedTuple):
    """How two sets lie in each other's neighbourhood.

    precision: share of samples within the neighbourhood of a real image; recall: share of real
    images within that of a sample; density: within how many real images' neighbourhoods a sample
    is, over k; coverage: share of real images with a sample in their neighbourhood.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifolds(real: np.ndarray, samples: np.ndarray, k: int = 3) -> Manifolds:
    """Of features [N, D] and [M, D]; a neighbourhood reaches to the k-th other of the same set.

    Raises:
      UserError: too few features for k neighbours.
    """
    if min(len(real), len(samples)) <= k:
        raise UserError(f"{k} neighbours take more than {k} images of each set")
    real, samples = real.astype(np.float64), samples.astype(np.float64)
    of_real, of_samples = radii(real, k), radii(samples, k)
    near, inside, covered = 0, 0, np.zeros(len(real), bool)
    reached = np.zeros(len(real), bool)
    for rows, squares in _squared_distances(samples, real):
        within = squares <= of_real
        near += within.sum()
        inside += within.any(axis=1).sum()
        covered |= within.any(axis=0)
        reached |= (squares <= of_samples[rows, None]).any(axis=0)
    return Manifolds(
        precision=float(inside / len(samples)),
        recall=float(reached.mean()),
        density=float(near / (k * len(samples))),
        coverage=float(covered.mean()),
    )


def nearest(x: np.ndarray, others: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of [N, D] the k nearest of [M, D]: their distances and indices [N, k], nearest first.

    `others` are read a few at a time.
    """
    distances, indices = np.empty((len(x), 0)), np.empty((len(x), 0), int)
    x = x.astype(np.float64)
    for start in range(0, len(others), ROWS):
        part = others[start : start + ROWS].astype(np.float64)
        squares = np.concatenate([rows for _, rows in _squared_distances(x, part)])
        distances = np.concatenate([distances, np.sqrt(squares)], axis=1)
        numbers = np.arange(start, start + len(part))
        indices = np.concatenate([indices, np.broadcast_to(numbers, squares.shape)], axis=1)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        distances, indices = (np.take_along_axis(a, order, axis=1) for a in (distances, indices))
    return distances, indices


def radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distances [N] from each of [N, D] to its k-th nearest other."""
    found = np.empty(len(x))
    for rows, squares in _squared_distances(x, x):
        squares[np.arange(len(squares)), np.arange(len(x))[rows]] = np.inf
        found[rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return found


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows of a, [rows, M]) at a time."""
    norms = (b**2).sum(axis=1)
    for start in range(0, len(a), ROWS):
        rows = slice(start, start + ROWS)
        x = a[rows]
        squares = (x**2).sum(axis=1)[:, None] - 2 * x @ b.T + norms
        yield rows, np.maximum(squares, 0)
