"""Reads the scenes of the `shapes` data set back from pixels: by synthesis, with nothing learnt.

The background is the median of the border and a pixel's colour the nearest hue of its difference
from it, which is the same at the edge of a shape, where both are mixed, as inside. Regions of one
colour are compared with a circle, a square and a triangle of their own centre and area, turned by
up to 20 degrees. Independent of the code that draws the data set.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from latent_diffusion_jax.data.shapes import CLASS_NAMES, COLOURS, KINDS
from latent_diffusion_jax.errors import UserError

HUES = {"red": 0.0, "green": 130.0, "blue": 228.0, "yellow": 51.0}  # degrees
SIDES = {"square": 4, "triangle": 3}
TURNS = np.deg2rad(np.arange(-20, 21, 4))
LEAST_OVERLAP = 0.75  # with an ideal shape; below it a region is no shape
LEAST_AREA = 0.008  # of the image; below it a region is a blemish. The smallest shape has 0.02
LEAST_CHROMA = 30  # of a coloured pixel, in levels of 255; the faintest shape has 70
WHOLE = 0.9  # overlap above which a region is surely one shape
LEAST_GAIN = 0.08  # of overlap, for two shapes instead of one that is drawn badly


class Seen(NamedTuple):
    """One region as the oracle sees it; lengths are of the image's side, the area of its area.

    `kind` is "none" where no shape is like it, and so is `colour` where it is grey.
    """

    kind: str
    colour: str
    confidence: float  # intersection over union with the ideal shape, 0 to 1
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 of the whole shape
    centre: tuple[float, float]  # x, y
    area: float

    @property
    def name(self) -> str:
        """The name of its class, or "none"."""
        return "none" if "none" in (self.kind, self.colour) else f"{self.colour} {self.kind}"


class Fit(NamedTuple):
    """An ideal shape laid over a soft mask; lengths in pixels, the turn in radians."""

    kind: str
    overlap: float
    x: float
    y: float
    area: float
    turn: float


NOTHING = Seen("none", "none", 0.0, (0.0, 0.0, 0.0, 0.0), (0.0, 0.0), 0.0)


def read_scene(image: np.ndarray) -> list[Seen]:
    """The shapes of an image uint8 [H, W, 3] of any number of them, largest first.

    A region that is as large as a shape and like none is among them, its kind "none".

    Raises:
      UserError: not uint8 [H, W, 3].
    """
    return [seen for seen, _ in _regions(image)]


def segment(image: np.ndarray) -> np.ndarray:
    """What is seen in an image uint8 [H, W, 3]: uint8 [H, W], 0 background, else 1 + class."""
    segmentation = np.zeros(image.shape[:2], np.uint8)
    for seen, mask in _regions(image):
        if seen.name != "none":
            segmentation[mask] = 1 + CLASS_NAMES.index(seen.name)
    return segmentation


def read_shape(image: np.ndarray, least: float = LEAST_OVERLAP) -> Seen:
    """The one shape of an image uint8 [H, W, 3]: all that is not background is taken for it.

    An overlap below `least`, more shapes than one, a grey shape and an empty image read "none".

    Raises:
      UserError: not uint8 [H, W, 3].
    """
    pixels, background = _pixels(image)
    distance = np.linalg.norm(pixels - background, axis=-1)
    strongest = np.quantile(distance, 0.97)
    if strongest < 60:
        return NOTHING
    core = np.median(pixels[distance > 0.7 * strongest], axis=0)
    alpha = _steepen(distance / np.linalg.norm(core - background))
    saturation = 1 - core.min() / max(core.max(), 1)
    if saturation < 0.35 or not 0.05 < alpha.mean() < 0.6:
        return NOTHING
    fit = best_fit(alpha, np.zeros(alpha.shape, bool))
    if fit.overlap < least:
        return NOTHING._replace(confidence=fit.overlap)
    return _seen(fit, str(nearest_colour(core)), image.shape[0], image.shape[1])


def nearest_colour(rgb: np.ndarray) -> np.ndarray:
    """The names of the nearest hues of [..., 3], of which all channels may have one offset."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    hue = np.rad2deg(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))
    away = [np.abs((hue - HUES[name] + 180) % 360 - 180) for name in COLOURS]
    return np.array(list(COLOURS))[np.argmin(away, axis=0)]


def best_fit(alpha: np.ndarray, hidden: np.ndarray) -> Fit:
    """The ideal shape that overlaps most with a soft mask [h, w] where it is not hidden."""
    return max((_fit(alpha, hidden, kind) for kind in KINDS), key=lambda fit: fit.overlap)


def _fit(alpha: np.ndarray, hidden: np.ndarray, kind: str) -> Fit:
    """The best of one kind; what is hidden is filled in from the fit, and the fit made anew."""
    y, x = np.indices(alpha.shape)
    filled = np.where(hidden, 0, alpha)
    for _ in range(4 if hidden.any() else 1):
        area = filled.sum()
        centre = (x * filled).sum() / area, (y * filled).sum() / area
        ideals = ideal_masks(kind, x - centre[0], y - centre[1], area)
        both = np.where(hidden, 0, np.minimum(alpha, ideals)).sum(axis=(1, 2))
        either = np.where(hidden, 0, np.maximum(alpha, ideals)).sum(axis=(1, 2))
        best = int(np.argmax(both / either))
        filled = np.where(hidden, ideals[best], alpha)
    turn = float(TURNS[best]) if kind in SIDES else 0.0
    overlap = float(both[best] / either[best])
    return Fit(kind, overlap, float(centre[0]), float(centre[1]), float(area), turn)


def ideal_masks(kind: str, x: np.ndarray, y: np.ndarray, area: float) -> np.ndarray:
    """Soft masks [turns, h, w] of a shape around the origin, flat side down before it is turned."""
    if kind == "circle":
        return np.clip(0.5 + np.sqrt(area / np.pi) - np.hypot(x, y), 0, 1)[None]
    n = SIDES[kind]
    apothem = np.sqrt(area / (n * np.tan(np.pi / n)))
    angles = (np.pi / 2 + TURNS + 2 * np.pi / n * np.arange(n)[:, None])[..., None, None]
    return np.clip(0.5 + apothem - (np.cos(angles) * x + np.sin(angles) * y).max(axis=0), 0, 1)


def _seen(fit: Fit, colour: str, height: int, width: int) -> Seen:
    """A fit in pixels -> fractions of the image, with the box of the whole ideal shape."""
    angles: np.ndarray  # of the corners, or of what is furthest left, right, up and down
    if fit.kind == "circle":
        angles, radius = np.arange(4) * np.pi / 2, math.sqrt(fit.area / math.pi)
    else:
        n = SIDES[fit.kind]
        angles = np.pi / 2 + fit.turn + np.pi / n * (2 * np.arange(n) + 1)
        radius = math.sqrt(2 * fit.area / (n * math.sin(2 * math.pi / n)))
    x = (fit.x + 0.5 + radius * np.cos(angles)) / width
    y = (fit.y + 0.5 + radius * np.sin(angles)) / height
    return Seen(
        fit.kind if fit.overlap >= LEAST_OVERLAP else "none",
        colour,
        fit.overlap,
        (float(x.min()), float(y.min()), float(x.max()), float(y.max())),
        ((fit.x + 0.5) / width, (fit.y + 0.5) / height),
        fit.area / (height * width),
    )


def _regions(image: np.ndarray) -> list[tuple[Seen, np.ndarray]]:
    """What is seen, and the mask [H, W] of its visible pixels; largest first."""
    pixels, background = _pixels(image)
    difference = pixels - background
    distance = np.linalg.norm(difference, axis=-1)
    chroma = np.linalg.norm(difference - difference.mean(axis=-1, keepdims=True), axis=-1)
    colours = np.where(chroma >= LEAST_CHROMA, nearest_colour(difference), "")
    colours = np.where((colours == "") & (distance >= 60), "none", colours)
    found = []
    for colour in (*COLOURS, "none"):
        components, number = ndimage.label(colours == colour)
        for component in range(1, number + 1):
            mask = components == component
            if mask.mean() < LEAST_AREA:
                continue
            core = np.median(difference[mask & (distance >= np.median(distance[mask]))], axis=0)
            if np.linalg.norm(core - core.mean()) < 50 and colour != "none":
                continue  # faint
            others = (colours != "") & ~mask
            near = ndimage.binary_dilation(mask, iterations=2) & ~others
            alpha = np.where(near, _steepen(difference @ core / (core @ core)), 0)
            found += [
                (_seen(fit, colour, *mask.shape), part)
                for fit, part in _split(alpha, others)
                if part.mean() >= LEAST_AREA
            ]
    return sorted(found, key=lambda pair: -pair[0].area)


def _split(alpha: np.ndarray, others: np.ndarray) -> list[tuple[Fit, np.ndarray]]:
    """The shapes of one soft mask [H, W] of one colour, which touch: their fits and masks."""
    mask = alpha >= 0.5
    if not mask.any():
        return []
    window = ndimage.find_objects(mask.astype(np.uint8))[0]
    window = tuple(slice(max(s.start - 4, 0), s.stop + 4) for s in window)
    fit = best_fit(alpha[window], others[window])
    fit = fit._replace(x=fit.x + window[1].start, y=fit.y + window[0].start)
    whole = [(fit, mask)]
    if fit.overlap >= WHOLE:
        return whole
    nearest, number = _cores(mask)
    if number < 2:
        return whole
    parts = []
    for core in range(1, number + 1):
        theirs = nearest != core
        parts += _split(np.where(theirs, 0, alpha), others | (theirs & mask))
    worst = min(fit.overlap for fit, _ in parts)
    return parts if worst > fit.overlap + LEAST_GAIN else whole


def _cores(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The cores that a mask falls into when eroded: the nearest of each pixel, from 1; how many."""
    depth = ndimage.distance_transform_edt(mask)
    for least in np.arange(1, depth.max(), 0.5):
        cores, number = ndimage.label(depth > least)
        if number > 1:
            # Ripples of an outline of pixels are not deep.
            deep = ndimage.maximum(depth, cores, range(1, number + 1)) >= 1.1 * least
            cores = np.concatenate([[0], np.cumsum(deep) * deep])[cores]
            if deep.sum() > 1:
                nearest = ndimage.distance_transform_edt(
                    cores == 0, return_distances=False, return_indices=True
                )
                return cores[tuple(nearest)], int(deep.sum())
    return mask.astype(int), 1


def _pixels(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image as floats [H, W, 3] and its background [3], the median of the border."""
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise UserError(f"an image must be uint8 [H, W, 3], not {image.dtype} {image.shape}")
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return pixels, np.median(border, axis=0)


def _steepen(share: np.ndarray) -> np.ndarray:
    """The share of the foreground in a pixel, steeper than the edge is, against noise and blur."""
    return np.clip((share - 0.2) / 0.6, 0, 1)
