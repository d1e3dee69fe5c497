"""Layouts, boxes with a class each, as a sequence of tokens (paper section 4.3.1, appendix E.2).

Source: the original's `ObjectsBoundingBoxConditionalBuilder`. 30 times (class, top-left corner,
bottom-right corner), then the two corners of the crop: 92 tokens of a vocabulary of 8192, read by
the paper's transformer. A corner is one token, its cell in a grid of 90 x 90.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.conditioning.cond import Conditioner
from latent_diffusion_jax.conditioning.text import token_conditioner
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.transformer import TextTransformer

Box = tuple[float, float, float, float]  # x0, y0, x1, y1, in 0..1 of the image
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class Object(NamedTuple):
    """A box of a class, and OpenImages' annotations of it."""

    category: int
    box: Box
    group_of: bool = False
    occluded: bool = False
    depiction: bool = False
    inside: bool = False


def layout(
    *,
    vocab_size: int = 8192,
    max_objects: int = 30,
    num_classes: int,
    dim: int,
    depth: int,
    num_heads: int = 8,
    head_dim: int = 64,
    encode_crop: bool = True,
    dtype: Any = jnp.float32,
) -> Conditioner:
    """Tokens int32 [B, 3 max_objects + 2] -> context [B, tokens, dim]; null: no object at all.

    `num_classes` (of objects) is for `layout_tokens`; without `encode_crop` there are no crop
    tokens.
    """
    del num_classes
    length = 3 * max_objects + 2 * encode_crop
    network = TextTransformer(vocab_size, length, dim, depth, num_heads, head_dim, dtype)
    null = layout_tokens([], vocab_size=vocab_size, max_objects=max_objects, num_classes=1)
    return token_conditioner(network, null[:length], frozen=False)


def corner_token(x: float, y: float, vocab_size: int) -> int:
    """The cell of a point (in 0..1, clipped) in the finest square grid of the vocabulary."""
    side = math.isqrt(vocab_size)
    x, y = (min(max(value, 0.0), 1.0) for value in (x, y))
    return round(y * (side - 1)) * side + round(x * (side - 1))  # round half to even


def token_corner(token: int, vocab_size: int) -> tuple[float, float]:
    """The point (x, y) of a corner token."""
    side = math.isqrt(vocab_size)
    y, x = divmod(token, side)
    return x / (side - 1), y / (side - 1)


def class_token(thing: Object, num_classes: int) -> int:
    """The class, and its annotations as multiples of the number of classes."""
    flags = (thing.group_of, thing.occluded, thing.depiction, thing.inside)
    return thing.category + num_classes * sum(flag << i for i, flag in enumerate(flags))


def layout_tokens(
    objects: Sequence[Object],
    *,
    vocab_size: int,
    max_objects: int,
    num_classes: int,
    crop: Box = WHOLE,
    encode_crop: bool = True,
    flip: bool = False,
) -> np.ndarray:
    """int32 [3 max_objects + 2] (or without the 2) of objects in the order given.

    Args:
      objects: boxes in coordinates of the whole image; those beyond `max_objects` are left out, as
        are those that do not meet the crop.
      crop: the part of the image that is shown. With `encode_crop` it is told as two tokens, and
        boxes stay where they are; without, boxes are rescaled to it.
      flip: mirror left to right.

    Raises:
      UserError: a category that is not one of `num_classes`, or a box whose corners are swapped.
    """
    for thing in objects:
        if not 0 <= thing.category < num_classes:
            raise UserError(f"layout: class {thing.category} is not one of 0..{num_classes - 1}")
        if thing.box[0] > thing.box[2] or thing.box[1] > thing.box[3]:
            raise UserError(f"layout: box {list(thing.box)} is not x0 <= x1, y0 <= y1")
    shown = [thing for thing in objects if _meets(thing.box, crop)]
    tokens: list[int] = []
    for thing in shown[:max_objects]:
        box = thing.box if encode_crop else _within(thing.box, crop)
        tokens += [class_token(thing, num_classes), *_corners(box, vocab_size, flip)]
    tokens += [vocab_size - 1] * (3 * max_objects - len(tokens))
    if encode_crop:
        tokens += _corners(crop, vocab_size, flip)
    return np.asarray(tokens, np.int32)


def _corners(box: Box, vocab_size: int, flip: bool) -> list[int]:
    x0, y0, x1, y1 = box
    if flip:
        x0, x1 = 1 - x1, 1 - x0
    return [corner_token(x0, y0, vocab_size), corner_token(x1, y1, vocab_size)]


def _meets(box: Box, crop: Box) -> bool:
    return box[0] < crop[2] and box[2] > crop[0] and box[1] < crop[3] and box[3] > crop[1]


def _within(box: Box, crop: Box) -> Box:
    """The box in coordinates of the crop.

    As published: one that begins before the crop is moved to its edge and keeps its width there.
    """
    x0, y0, x1, y1 = crop
    left = min(max((box[0] - x0) / (x1 - x0), 0.0), 1.0)
    top = min(max((box[1] - y0) / (y1 - y0), 0.0), 1.0)
    width = min((box[2] - box[0]) / (x1 - x0), 1 - left)
    height = min((box[3] - box[1]) / (y1 - y0), 1 - top)
    return left, top, left + width, top + height
