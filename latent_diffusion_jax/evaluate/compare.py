"""How a set of images compares with another: the table of `evaluate --images --reference`."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate import distances, features, sets

NEIGHBOURS = 3
NEAR = 10_000  # images of a set that neighbourhoods are of, at most: ADM's number
SUBSETS, SUBSET = 100, 1000  # of KID
SPLITS = 10  # of the Inception Score


def compare(
    images: str,
    reference: str | None,
    *,
    inception: Any,
    preparation: str,
    out: Path,
    batch: int,
    mesh: Mesh,
    save: str | None = None,
) -> dict[str, Any]:
    """{"measures": name -> number, "protocol": how they came about}, also written to `out`.

    Args:
      images, reference: a folder or a `.npz`, each; the reference may be statistics, which give FID
        and sFID alone. Features lie in folders beside `out`, where the next run finds them.
      inception: the parameters of `Inception`.
      preparation: one of PREPARATIONS.
      save: a file for the statistics of `images`, to be a reference later.

    Raises:
      UserError: nothing to read, or too few images.
    """
    batch = -(-batch // mesh.size) * mesh.size
    weights = {"inception": _digest(inception)}
    run = features.make_network(inception, mesh)

    def seen(found: sets.Images, name: str) -> features.Stored:
        place = out.with_suffix(f".{name}")
        return features.store(
            found, run, place, batch=batch, preparation=preparation, made_with=weights
        )

    # both are opened before minutes are spent on one
    shown, others, theirs = _open(images), None, {}
    if reference is not None and sets.is_statistics(reference):
        theirs = sets.read_statistics(reference)
    elif reference is not None:
        others = _open(reference)
    ours = seen(shown, "images")
    moments = statistics(ours)
    if save is not None:
        sets.write_statistics(save, moments)
    measures = dict(zip(("is", "is_deviation"), _inception_score(ours)))
    protocol: dict[str, Any] = {
        "images": images,
        "reference": reference,
        "number": ours.number,
        "preparation": preparation,
        **weights,
        "is_splits": min(SPLITS, ours.number),
        "jax": jax.__version__,
        "devices": mesh.size,
    }
    if others is not None:
        real = seen(others, "reference")
        theirs = statistics(real)
        measures |= _of_pairs(real, ours, protocol)
    for name, kind in (("fid", "pool"), ("sfid", "spatial")):
        if kind in theirs:
            measures[name] = distances.frechet_distance(*moments[kind], *theirs[kind])
    found = {"measures": dict(sorted(measures.items())), "protocol": protocol}
    out.write_text(json.dumps(found, indent=1))
    return found


def _open(path: str) -> sets.Images:
    found = sets.open_images(path)
    if found.number < 2:
        raise UserError(f"{path!r} has one image; a set has two or more")
    return found


def statistics(stored: features.Stored) -> dict[str, tuple[np.ndarray, np.ndarray]]:
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


def _digest(params: Any) -> str:
    """What tells these weights from others, whatever file they came in."""
    total = 0
    for leaf in jax.tree.leaves(params):
        total = zlib.crc32(np.asarray(leaf).tobytes(), total)
    return f"{total:08x}"
