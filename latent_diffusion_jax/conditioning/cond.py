"""What a condition is to the rest of the package (paper section 3.3): the UNet's three ports.

The original's five `conditioning_key`s become which ports are set.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import struct


@struct.dataclass
class Cond:
    """The UNet's ports, each optional.

    concat: [B, h, w, c], concatenated to z_t along the channels (masks, low-resolution images).
    context: [B, tokens, d], attended to by cross-attention (text, classes, layouts).
    embedding: [B, d], added to the time embedding.
    """

    concat: jax.Array | None = None
    context: jax.Array | None = None
    embedding: jax.Array | None = None


class Conditioner(NamedTuple):
    """A condition as three pure functions over `inputs`, the batch's entries named by `keys`.

    init: key -> params ({} when nothing is learned).
    apply: (params, inputs) -> Cond.
    null: inputs -> inputs of the same shapes that mean "no condition" (for guidance).
    keys: the entries of a batch that it reads; () for an unconditional model.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, dict], Cond]
    null: Callable[[dict], dict]
    keys: tuple[str, ...]


def unconditional() -> Conditioner:
    """The conditioner of a model without condition."""
    return Conditioner(lambda key: {}, lambda params, inputs: Cond(), lambda inputs: inputs, ())
