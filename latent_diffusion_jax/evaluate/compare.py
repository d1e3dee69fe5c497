"""How a set of images compares with another, in Inception's features."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate import distances, features, sets
from latent_diffusion_jax.evaluate.neighbours import Neighbours, find_neighbours
from latent_diffusion_jax.train.checksum import digest

NEIGHBOURS = 3
NEAR = 10_000  # images of a set that neighbourhoods are of, at most: ADM's number
SUBSETS, SUBSET = 100, 1000  # of KID
SPLITS = 10  # of the Inception Score


class Compared(NamedTuple):
    """measures: name -> number; protocol: how they came about; pace: of making the images."""

    measures: dict[str, float]
    protocol: dict[str, Any]
    pace: float | None
    neighbours: Neighbours | None


def compare(
    images: sets.Images,
    reference: sets.Images | sets.Statistics | None,
    *,
    inception: Any,
    preparation: str,
    out: Path,
    batch: int,
    mesh: Mesh,
    save: str | None = None,
    neighbours: int = 0,
) -> Compared | None:
    """Of several processes all take part; the first one gets a result, and the others None.

    Args:
      images: what is measured.
      reference: statistics give FID and sFID alone, None what takes no other set.
      inception: the parameters of `Inception`.
      preparation: one of PREPARATIONS.
      out: features lie in folders beside it, where the next run finds them.
      save: a file for the statistics of `images`, to be a reference later.
      neighbours: of so many images the nearest of the reference are found.

    Raises:
      UserError: too few images, or neighbours in statistics.
    """
    others = reference if isinstance(reference, sets.Images) else None
    for found in (images, others):
        if found is not None and found.number < 2:
            raise UserError(f"{_name(found)} has one image; a set has two or more")
    if neighbours and others is None:
        raise UserError(f"--neighbours={neighbours} are of reference images, not of statistics")
    weights = {"inception": digest(inception)}
    run = features.make_network(inception, mesh)

    def seen(found: sets.Images, name: str) -> features.Stored:
        return features.store(
            found,
            run,
            out.with_suffix(f".{name}"),
            batch=-(-batch // mesh.size) * mesh.size,
            preparation=preparation,
            made_with=weights,
        )

    ours = seen(images, "images")
    real = None if others is None else seen(others, "reference")
    shown = list(itertools.islice(images.read(0), neighbours)) if neighbours else []
    if jax.process_index():
        return None
    moments = statistics(ours)
    if save is not None:
        sets.write_statistics(save, moments)
    measures = dict(zip(("is", "is_deviation"), _inception_score(ours)))
    protocol: dict[str, Any] = {
        "number": ours.number,
        "preparation": preparation,
        **weights,
        "is_splits": min(SPLITS, ours.number),
    }
    theirs = reference if isinstance(reference, dict) else {}
    nearest = None
    if real is not None:
        theirs = statistics(real)
        measures |= _of_pairs(real, ours, protocol)
    for name, kind in (("fid", "pool"), ("sfid", "spatial")):
        if kind in theirs:
            measures[name] = distances.frechet_distance(*moments[kind], *theirs[kind])
    if shown and real is not None and others is not None:
        nearest = find_neighbours(shown, ours.pool, others, real.pool)
        measures |= nearest.measures
    return Compared(dict(sorted(measures.items())), protocol, ours.pace, nearest)


def _name(images: sets.Images) -> str:
    return repr(images.made_from.get("path") or images.made_from.get("split") or "the set")


def statistics(stored: features.Stored) -> sets.Statistics:
    """As `sets.write_statistics` takes them."""
    found = {name: stored.moments(name) for name in sets.MOMENTS}
    return {name: (m.mean, m.covariance) for name, m in found.items()}


def _inception_score(stored: features.Stored) -> tuple[float, float]:
    return distances.inception_score(stored.logits, min(SPLITS, stored.number))


def _of_pairs(
    real: features.Stored, ours: features.Stored, protocol: dict[str, Any]
) -> dict[str, float]:
    """What takes the features of both; too few images for it are said in the protocol."""
    fewest = min(real.number, ours.number)
    size, near = min(SUBSET, fewest), min(NEAR, fewest)
    kid = distances.kernel_distance(real.pool, ours.pool, SUBSETS, size)
    found = dict(zip(("kid", "kid_deviation"), kid))
    protocol |= {
        "reference_number": real.number,
        "kid_subsets": [SUBSETS, size],
        "neighbours": NEIGHBOURS,
        "neighbourhoods_of": near,
    }
    if near <= NEIGHBOURS:
        return found
    manifolds = distances.manifolds(_some(real.pool, near), _some(ours.pool, near), NEIGHBOURS)
    return found | manifolds._asdict()


def _some(features: np.ndarray, number: int) -> np.ndarray:
    """So many of them, drawn at random: sets are often sorted by class."""
    chosen = np.random.RandomState(distances.SEED).permutation(len(features))[:number]
    return features[np.sort(chosen)]
