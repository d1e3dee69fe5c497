"""Holes for training inpainting: thick strokes or boxes, as LaMa draws them at 256 pixels.

Source: Suvorov et al., *Resolution-robust Large Mask Inpainting with Fourier Convolutions*, WACV
2022 (LaMa), whose protocol the paper follows (section 4.5). Lengths are those of its 256 x 256
training and scale with the shorter side. Departures: a hole that is next to nothing or next to
everything is drawn again; lines, Pillow's, are up to a pixel thinner.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from latent_diffusion_jax.errors import UserError

COVERED = (0.01, 0.95)  # of the image, at least and at most
ATTEMPTS = 1000


def draw_mask(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Draws a hole of strokes or of boxes, with equal probability.

    Returns float32 [H, W, 1]: 1 in the hole, 0 outside.

    Raises:
      UserError: no hole fits: the image is a few pixels, or a narrow strip.
    """
    draw = generator.choice(list(KINDS))
    for _ in range(ATTEMPTS):
        mask = KINDS[draw](height, width, generator)
        if COVERED[0] <= mask.mean() <= COVERED[1]:
            return mask[..., None].astype(np.float32)
    low, high = (f"{share:.0%}" for share in COVERED)
    raise UserError(f"no mask of {height} x {width} pixels covers {low} to {high} of them")


def draw_strokes(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Draws 1 to 6 strokes: uint8 [H, W], 1 in them."""
    image = Image.new("L", (width, height))
    for i in range(generator.integers(1, 7)):
        draw_stroke(image, generator, mirrored=i % 2 == 0)
    return np.asarray(image)


def draw_stroke(image: Image.Image, generator: np.random.Generator, mirrored: bool) -> None:
    """Draws a chain of 1 to 5 thick lines with round ends into `image`, from a random pixel."""
    scale = min(image.size) / 256
    last = np.subtract(image.size, 1)
    canvas = ImageDraw.Draw(image)
    start = generator.integers(image.size)
    for _ in range(generator.integers(1, 6)):
        angle = 0.01 + generator.integers(4)
        length = scale * generator.integers(10, 210)
        brush = max(1, round(scale * generator.integers(5, 105)))
        x = -math.sin(angle) if mirrored else math.sin(angle)
        end = np.clip(start + length * np.array([x, math.cos(angle)]), 0, last).astype(int)
        canvas.line([*start.tolist(), *end.tolist()], fill=1, width=brush)
        for point in (start, end):
            canvas.circle(point.tolist(), brush / 2, fill=1)
        start = end


def draw_boxes(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Draws 1 to 4 boxes, away from the border: uint8 [H, W], 1 in them."""
    scale = min(height, width) / 256
    margin = round(10 * scale)
    smallest, largest = (max(1, round(side * scale)) for side in (30, 150))
    mask = np.zeros((height, width), np.uint8)
    for _ in range(generator.integers(1, 5)):
        tall, wide = generator.integers(smallest, largest, size=2, endpoint=True)
        top = generator.integers(margin, height - margin - tall, endpoint=True)
        left = generator.integers(margin, width - margin - wide, endpoint=True)
        mask[top : top + tall, left : left + wide] = 1
    return mask


KINDS = {"strokes": draw_strokes, "boxes": draw_boxes}
