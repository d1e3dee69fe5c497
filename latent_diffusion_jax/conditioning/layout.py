"""Layouts, boxes with a class each, as a sequence of tokens (paper section 4.3.1, appendix E.2).

Source: the original's `ObjectsBoundingBoxConditionalBuilder`. 30 times (class, top-left corner,
bottom-right corner), then the two corners of the crop: 92 tokens of a vocabulary of 8192, read by
the paper's transformer. A corner is one token, its cell in a grid of 90 x 90.

The transformer has to learn which corners are of which class, and where each cell of the grid is.
`Boxes` is told so: it learns on little data (docs/tasks.md), and no published model has it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.conditioning.cond import Conditioner
from latent_diffusion_jax.conditioning.text import token_conditioner
from latent_diffusion_jax.errors import UserError, choose
from latent_diffusion_jax.nn.layers import dense, embed
from latent_diffusion_jax.nn.transformer import TextTransformer

Box = tuple[float, float, float, float]  # x0, y0, x1, y1, in 0..1 of the image
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
FLAGS = 4  # annotations of an object, bits beside its class
OCTAVES = 6  # of the sines of a coordinate


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
    encoder: str = "transformer",
    depth: int = 0,
    num_heads: int = 8,
    head_dim: int = 64,
    encode_crop: bool = True,
    dtype: Any = jnp.float32,
) -> Conditioner:
    """Tokens int32 [B, 3 max_objects + 2] -> context; null: no object at all.

    Args:
      vocab_size, max_objects, num_classes: of the tokens, as `layout_tokens` makes them.
      dim: the context's width.
      encoder: "transformer", as published (context [B, 3 max_objects + 2, dim]), or "boxes", of
        `Boxes` (context [B, max_objects + 1, dim]).
      depth, num_heads, head_dim: of the transformer alone.
      encode_crop: whether the last two tokens are the crop's corners; else there are none.

    Raises:
      UserError: an unknown encoder, a transformer without depth, or "boxes" with one.
    """
    length = 3 * max_objects + 2 * encode_crop
    encoders = {
        "transformer": lambda: TextTransformer(
            vocab_size, length, dim, depth, num_heads, head_dim, dtype
        ),
        "boxes": lambda: Boxes(vocab_size, num_classes, dim, dtype),
    }
    make = choose("conditioning.encoder", encoder, encoders)
    if (encoder == "transformer") != (depth > 0):
        raise UserError(
            f"conditioning.depth {depth}: the encoder 'transformer' has at least 1, 'boxes' 0"
        )
    null = layout_tokens([], vocab_size=vocab_size, max_objects=max_objects, num_classes=1)
    return token_conditioner(make(), null[:length], frozen=False)


class Boxes(nn.Module):
    """An object's class and the sines of its box's coordinates, as one token.

    As the grounding tokens of GLIGEN (Li et al. 2023, section 4.1). The crop is an object of a
    class of its own; one that is absent has no box.

    Attributes:
      vocab_size, num_classes: of the tokens, as `layout_tokens` makes them.
      dim: width of the result.
      dtype: compute dtype; parameters and the result are float32.
    """

    vocab_size: int
    num_classes: int
    dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, 3 n] or [B, 3 n + 2], with the crop -> float32 [B, n or n + 1, dim]."""
        absent = self.num_classes << FLAGS
        if tokens.shape[1] % 3:
            crop = jnp.full_like(tokens[:, :1], absent + 1)
            tokens = jnp.concatenate([tokens[:, :-2], crop, tokens[:, -2:]], axis=1)
        objects = tokens.reshape(tokens.shape[0], tokens.shape[1] // 3, 3)
        none = objects[..., :1] == self.vocab_size - 1
        classes = jnp.where(none, absent, objects[..., :1])[..., 0]
        x = embed(absent + 2, self.dim, "classes", self.dtype)(classes)
        side = math.isqrt(self.vocab_size)
        rows, columns = jnp.divmod(objects[..., 1:], side)
        corners = jnp.concatenate([columns, rows], axis=-1) / (side - 1)  # x0, x1, y0, y1
        frequencies = math.pi / 2 * 2.0 ** np.arange(OCTAVES, dtype=np.float32)
        angles = corners[..., None] * frequencies[None, None, None]
        sines = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        sines = jnp.where(none, 0.0, sines.reshape(*classes.shape, 8 * OCTAVES))
        x = jnp.concatenate([x, sines.astype(self.dtype)], axis=-1)
        x = nn.silu(dense(self.dim, "hidden", dtype=self.dtype)(x))
        return dense(self.dim, "out", dtype=self.dtype)(x).astype(jnp.float32)


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
