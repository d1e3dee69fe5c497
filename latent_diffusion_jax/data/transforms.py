"""Image transforms in numpy and Pillow: to RGB, crop and resize, flip, and the range [-1, 1].

As the published models were trained: the smallest side is resized to the model's size and a square
is cropped (in one step here: the square first, at full resolution), `x / 127.5 - 1`.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
from PIL import Image, ImageOps

Square = tuple[int, int, int]  # top, left, side, in pixels


@contextlib.contextmanager
def _open(file: str | IO[bytes]) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except Image.DecompressionBombError as error:  # which is no OSError
        raise OSError(str(error)) from error


def read_rgb(file: str | IO[bytes]) -> np.ndarray:
    """Reads an image of any mode and size as uint8 [H, W, 3].

    EXIF rotation is honoured, alpha composited on white, 16-bit greyscale scaled to 8 (65535 is
    white), everything else widened to RGB as Pillow does.

    Raises:
      OSError: it is not an image, is broken, or has more pixels than Pillow opens.
    """
    with _open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode == "I" or image.mode.startswith("I;16"):
            grey = np.clip(np.rint(np.asarray(image) / 257), 0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.asarray(image.convert("RGB"))


def read_classes(file: str | IO[bytes]) -> np.ndarray:
    """Reads an image of class numbers (grey or palette) as uint8 or uint16 [H, W].

    Raises:
      OSError: as `read_rgb`.
    """
    with _open(file) as image:
        plain = image if image.mode in ("P", "L", "I", "I;16") else image.convert("L")
        return np.asarray(plain)


def center_square(height: int, width: int, generator: np.random.Generator) -> Square:
    """The largest square in the middle; `generator` is not used."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side


def random_square(height: int, width: int, generator: np.random.Generator) -> Square:
    """The largest square, at a random place along the longer side."""
    side = min(height, width)
    top = generator.integers(height - side + 1)
    return int(top), int(generator.integers(width - side + 1)), side


def zoomed_square(height: int, width: int, generator: np.random.Generator) -> Square:
    """A square of half to all of the shorter side, anywhere: as published for super-resolution."""
    side = int(min(height, width) * generator.uniform(0.5, 1))
    top = generator.integers(height - side + 1)
    return int(top), int(generator.integers(width - side + 1)), side


def resize(
    image: np.ndarray,
    square: Square,
    size: int,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """Cuts `square` out of [H, W] or [H, W, 3] and resizes it, antialiased, to `size`."""
    top, left, side = square
    image = image[top : top + side, left : left + side]
    if side == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), resample))


def read_box(values: Iterable[float]) -> tuple[float, float, float, float]:
    """A box x0, y0, x1, y1, in 0..1 of the image; ValueError where it is none."""
    box = tuple(map(float, values))
    if len(box) == 4:
        x0, y0, x1, y1 = box
        if 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1:
            return x0, y0, x1, y1
    raise ValueError(f"box {list(box)} is not x0 < x1, y0 < y1 in 0..1")


def crop_boxes(boxes: np.ndarray, height: int, width: int, square: Square) -> np.ndarray:
    """Boxes float32 [N, 4] (x0, y0, x1, y1 in 0..1 of the image) in 0..1 of `square`, clipped."""
    top, left, side = square
    pixels = boxes * np.array([width, height, width, height], np.float32)
    return np.clip((pixels - np.array([left, top, left, top], np.float32)) / side, 0, 1)


def flip_boxes(boxes: np.ndarray) -> np.ndarray:
    """Boxes [N, 4] of an image that is mirrored left to right."""
    x0, y0, x1, y1 = boxes.T
    return np.stack([1 - x1, y0, 1 - x0, y1], axis=-1)


def transform(example: dict, square: Square, size: int, flip: bool) -> dict:
    """Crops, resizes and flips `image`, `segmentation` and `boxes` (with `box_labels`) together.

    The image comes out float32 [size, size, 3] in [-1, 1]; boxes that are cropped away become
    padding (0 and label -1); other entries are passed on. Captions are: turn flips off for
    captions that say left or right.
    """
    out = dict(example)
    height, width = example["image"].shape[:2]
    for name, resample in (
        ("image", Image.Resampling.BICUBIC),
        ("segmentation", Image.Resampling.NEAREST),
    ):
        if name in out:
            cropped = resize(out[name], square, size, resample)
            out[name] = cropped[:, ::-1] if flip else cropped
    if "boxes" in out:
        boxes = crop_boxes(out["boxes"], height, width, square)
        boxes = flip_boxes(boxes) if flip else boxes
        seen = (boxes[:, 2:] > boxes[:, :2]).all(axis=-1) & (out["box_labels"] >= 0)
        out["boxes"] = boxes * seen[:, None].astype(np.float32)
        out["box_labels"] = np.where(seen, out["box_labels"], np.int32(-1))
    out["image"] = to_float(out["image"])
    return out


def to_float(image: np.ndarray) -> np.ndarray:
    """Image uint8 -> float32 in [-1, 1]."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Image in [-1, 1] -> uint8, clipped and rounded (the original truncates)."""
    scaled = (np.asarray(image, np.float32) + 1) * np.float32(127.5)
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
