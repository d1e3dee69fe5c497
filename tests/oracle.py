"""Reads the class of one shape back from its pixels: analysis by synthesis, with nothing learnt.

The background is the median of the border, the colour the nearest hue, the kind the best overlap of
the foreground with a circle, square and triangle of its own centre and area, turned by up to 20
degrees. Independent of the code that draws the data set.
"""

import colorsys
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

HUES = {"red": 0.0, "green": 130.0, "blue": 228.0, "yellow": 51.0}  # degrees
SIDES = {"circle": 60, "square": 4, "triangle": 3}  # a polygon of 60 sides is round enough
TURNS = {"circle": (0.0,), "square": range(-20, 21, 4), "triangle": range(-20, 21, 4)}


class Reading(NamedTuple):
    """What the oracle sees; kind and colour are "none" where it sees no shape."""

    kind: str
    colour: str
    confidence: float  # overlap with the ideal shape, 0 to 1

    @property
    def name(self) -> str:
        return "none" if self.kind == "none" else f"{self.colour} {self.kind}"


def read_shape(image: np.ndarray, least: float = 0.75) -> Reading:
    """Reads uint8 [H, W, 3]; an overlap below `least` is no shape."""
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)
    strongest = np.quantile(distance, 0.97)
    if strongest < 60:
        return Reading("none", "none", 0.0)
    core = np.median(pixels[distance > 0.7 * strongest], axis=0)
    share = distance / np.linalg.norm(core - np.median(border, axis=0))
    alpha = np.clip((share - 0.2) / 0.6, 0, 1)  # steeper than the edge, against noise and blur
    hue, saturation, _ = colorsys.rgb_to_hsv(*core / 255)
    if saturation < 0.35 or not 0.05 < alpha.mean() < 0.6:
        return Reading("none", "none", 0.0)
    colour = min(HUES, key=lambda name: abs((hue * 360 - HUES[name] + 180) % 360 - 180))
    overlaps = {kind: best_overlap(alpha, kind) for kind in SIDES}
    kind = max(overlaps, key=lambda name: overlaps[name])
    if overlaps[kind] < least:
        return Reading("none", "none", overlaps[kind])
    return Reading(kind, colour, overlaps[kind])


def best_overlap(alpha: np.ndarray, kind: str) -> float:
    """The largest intersection over union of a soft mask and the ideal shape over its turns."""
    overlaps = []
    for turn in TURNS[kind]:
        ideal = polygon(alpha, SIDES[kind], np.deg2rad(turn))
        overlaps.append(np.minimum(alpha, ideal).sum() / np.maximum(alpha, ideal).sum())
    return float(max(overlaps))


def polygon(alpha: np.ndarray, sides: int, turn: float) -> np.ndarray:
    """The soft mask of a regular polygon, flat side down, with the centre and area of `alpha`."""
    area = alpha.sum()
    y, x = np.indices(alpha.shape)
    x = x - (x * alpha).sum() / area
    y = y - (y * alpha).sum() / area
    apothem = np.sqrt(area / (sides * np.tan(np.pi / sides)))
    angles = np.pi / 2 + turn + 2 * np.pi / sides * np.arange(sides)
    edges = np.cos(angles)[:, None, None] * x + np.sin(angles)[:, None, None] * y
    return np.clip(0.5 + apothem - edges.max(axis=0), 0, 1)


def accuracy(folder: Path) -> dict[str, tuple[int, int]]:
    """Class -> (right, all) for what `sample` wrote to a folder."""
    tally: dict[str, tuple[int, int]] = {}
    for record in json.loads((folder / "samples.json").read_text())["images"]:
        image = np.asarray(Image.open(folder / record["file_name"]))
        right, total = tally.get(record["class"], (0, 0))
        tally[record["class"]] = (right + (read_shape(image).name == record["class"]), total + 1)
    return tally


if __name__ == "__main__":  # python -m tests.oracle runs/shapes/ldm/samples
    result = accuracy(Path(sys.argv[1]))
    for name, (right, total) in result.items():
        print(f"{name:16} {right}/{total}")
    right, total = (sum(column) for column in zip(*result.values(), strict=True))
    print(f"{'all':16} {right}/{total} = {right / total:.1%}")
