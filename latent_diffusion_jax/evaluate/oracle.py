"""Whether images of the `shapes` data set show what was asked for, as `scene` reads them.

Images are uint8 [H, W, 3], boxes x0, y0, x1, y1 in 0..1, segmentations 0 for the background, else
1 + class: all as `data.shapes` has them.
"""

import itertools
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from latent_diffusion_jax.data.shapes import CLASS_NAMES
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate.scene import Seen, read_scene, read_shape, segment

DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# Captions name the nearest of four directions, 45 degrees away at most; 10 are for the reading.
MAX_ANGLE = np.deg2rad(55)


def class_right(image: np.ndarray, label: int) -> bool:
    """Whether the image shows one shape, and of the class `label`."""
    return read_shape(image).name == CLASS_NAMES[label]


def accuracy(folder: Path) -> dict[str, tuple[int, int]]:
    """Class -> (right, all) for what `sample` wrote to a folder."""
    tally: dict[str, tuple[int, int]] = {}
    for record in json.loads((folder / "samples.json").read_text())["images"]:
        image = np.asarray(Image.open(folder / record["file_name"]))
        right, total = tally.get(record["class"], (0, 0))
        is_right = class_right(image, CLASS_NAMES.index(record["class"]))
        tally[record["class"]] = (right + is_right, total + 1)
    return tally


def parse_caption(caption: str) -> tuple[list[str], list[str]]:
    """`a red circle above a blue square` -> names of all shapes; places of the first by the others.

    Raises:
      UserError: not a caption as `data.shapes.describe` writes them.
    """
    a_shape = f"a ({'|'.join(CLASS_NAMES)})"
    phrase = f"({'|'.join(DIRECTIONS)}) {a_shape}"
    match = re.fullmatch(f"{a_shape}( {phrase}( and {phrase})*)?", caption)
    if not match:
        raise UserError(
            f"caption {caption!r} is not of shapes, like 'a red circle above a blue square and"
            " left of a green triangle'"
        )
    phrases = re.findall(phrase, caption)
    return [match[1], *(name for _, name in phrases)], [place for place, _ in phrases]


def caption_right(image: np.ndarray, caption: str) -> bool:
    """Whether the image shows the shapes named and no others, in the places stated.

    A place is right if the direction from centre to centre is within 55 degrees of it.

    Raises:
      UserError: not a caption as `data.shapes.describe` writes them.
    """
    return all(np.nan_to_num(part, nan=1) == 1 for part in caption_parts(image, caption).values())


def caption_parts(image: np.ndarray, caption: str) -> dict[str, float]:
    """The fractions of a caption that are right: `colours`, `kinds` and `places`.

    The shapes seen are taken for the shapes named so that most colours and kinds agree, then most
    places. Colours and kinds are of the shapes named or seen, whichever are more; places are of
    those stated, NaN where there are none (`np.nanmean` averages over images).

    Raises:
      UserError: not a caption as `data.shapes.describe` writes them.
    """
    names, places = parse_caption(caption)
    seen = read_scene(image)
    most = max(len(names), len(seen))
    candidates: list[Seen | None] = [*seen[:6], *[None] * (len(names) - len(seen))]
    best = max(
        _agreement(names, places, taken) for taken in itertools.permutations(candidates, len(names))
    )
    _, held, colours, kinds = best
    return {
        "colours": colours / most,
        "kinds": kinds / most,
        "places": held / len(places) if places else float("nan"),
    }


def _agreement(names: list[str], places: list[str], taken: tuple) -> tuple[int, int, int, int]:
    """How many colours and kinds agree together, places hold, colours agree, and kinds agree."""
    pairs = [(name.split(), seen) for name, seen in zip(names, taken) if seen]
    colours = sum(seen.colour == colour for (colour, _), seen in pairs)
    kinds = sum(seen.kind == kind for (_, kind), seen in pairs)
    main, *others = taken
    held = sum(_holds(main, place, other) for place, other in zip(places, others) if main and other)
    return colours + kinds, held, colours, kinds


def _holds(a: Seen, place: str, b: Seen) -> bool:
    """Whether `a` lies in that direction from `b`."""
    away = np.subtract(a.centre, b.centre)
    return bool(away @ DIRECTIONS[place] > np.cos(MAX_ANGLE) * np.linalg.norm(away))


def box_iou(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> float:
    """The mean over boxes [N, 4] of the overlap with what is seen of the same class.

    Of several shapes of that class the one that overlaps most counts, where there is none 0. The
    overlap is intersection over union; boxes with labels [N] below 0 are padding.
    """
    seen = read_scene(image)
    overlaps = [
        max((_iou(box, s.box) for s in seen if s.name == CLASS_NAMES[label]), default=0.0)
        for box, label in zip(boxes, labels)
        if label >= 0
    ]
    return float(np.mean(overlaps))


def _iou(a: np.ndarray, b: tuple[float, float, float, float]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    both = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    either = np.prod(a[2:] - a[:2]) + np.prod(np.subtract(b[2:], b[:2])) - both
    return float(both / either)


def segmentation_iou(image: np.ndarray, segmentation: np.ndarray) -> float:
    """The mean over the values in `segmentation` [H, W] of the overlap with what is seen as them.

    The background is one of them; the overlap is intersection over union of pixels.
    """
    found = segment(image)
    pairs = [(found == value, segmentation == value) for value in np.unique(segmentation)]
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two images in dB, over all pixels and channels."""
    return decibels(np.mean((image.astype(np.float64) - truth) ** 2))


def decibels(error: float) -> float:
    """The peak signal-to-noise ratio of a mean squared error, in levels of 255."""
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def inside_outside(image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Mean absolute error inside a mask [H, W] and the largest outside, in levels of 255.

    What an inpainted image needs: a good inside, and an outside that is as it was.
    """
    error = np.abs(image.astype(np.float64) - truth)
    return float(error[mask].mean()), float(error[~mask].max(initial=0))
