"""The training images that samples are nearest to: does a model repeat what it was shown?

As the paper's figures of nearest neighbours, but in FID's features. A distance alone says little:
beside it stands how far the nearest image is from the nearest to it of its own set.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latent_diffusion_jax.evaluate import distances
from latent_diffusion_jax.evaluate.sets import Images

NEAREST = 5


class Neighbours(NamedTuple):
    """Of N samples the k nearest images of another set.

    samples: N images; images: N times k of them.
    indices: int [N, k], of the images in their set; distances: [N, k].
    apart: [N], from the nearest image to the nearest other of its set.
    """

    samples: Sequence[np.ndarray]
    images: Sequence[Sequence[np.ndarray]]
    indices: np.ndarray
    distances: np.ndarray
    apart: np.ndarray

    @property
    def measures(self) -> dict[str, float]:
        """Means over the samples: where they copy, the first is far below the second."""
        return {
            "nearest": float(self.distances[:, 0].mean()),
            "nearest_apart": float(self.apart.mean()),
        }

    def as_json(self) -> list[dict]:
        """A sample each."""
        rows = zip(self.indices.tolist(), self.distances.tolist(), self.apart.tolist())
        return [{"images": i, "distances": d, "apart": apart} for i, d, apart in rows]


def find_neighbours(
    samples: Sequence[np.ndarray], features: np.ndarray, others: Images, theirs: np.ndarray
) -> Neighbours:
    """Of the first samples, given the features [N, D] of all, and those of the other set [M, D]."""
    away, indices = distances.nearest(features[: len(samples)], theirs, min(NEAREST, len(theirs)))
    of_nearest, _ = distances.nearest(theirs[indices[:, 0]], theirs, 2)  # itself first
    images = [[next(others.read(i)) for i in row] for row in indices.tolist()]
    return Neighbours(samples, images, indices, away, of_nearest[:, 1])


def write_picture(path: Path, found: Neighbours) -> None:
    """A row each: the sample, and the images with their distances below."""
    from matplotlib.figure import Figure  # a second to import, and rarely wanted

    rows, columns = len(found.samples), found.indices.shape[1] + 1
    figure = Figure(figsize=(1.3 * columns, 1.55 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for line, sample, images, away in zip(axes, found.samples, found.images, found.distances):
        for axis, picture in zip(line, (sample, *images)):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        for axis, distance in zip(line[1:], away):
            axis.set_xlabel(f"{distance:.3g}", fontsize=8, labelpad=2)
    axes[0, 0].set_title("sample", fontsize=9)
    axes[0, 1].set_title("nearest", fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
