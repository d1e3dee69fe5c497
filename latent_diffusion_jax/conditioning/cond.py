"""What a condition is to the rest of the package (paper section 3.3): the UNet's three ports.

The original's five `conditioning_key`s become which ports are set.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import struct

from latent_diffusion_jax.errors import UserError

Inputs = dict[str, Any]  # [B, ...] each
ToLatent = Callable[[jax.Array], jax.Array]  # image [B, H, W, 3] -> scaled latent [B, h, w, c]


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
    """A condition as pure functions over `inputs`, the batch's entries named by `keys`.

    init: key -> params ({} when there are no weights).
    apply: (params, inputs, to_latent) -> Cond; only those that concatenate images read `to_latent`.
    null: (params, inputs) -> inputs of the same shapes that mean "no condition" (for guidance).
    inputs: (height, width) of the image -> shape and type of each entry of one example.
    frozen: whether the weights come from elsewhere and are not trained.
    encode: (params, inputs) -> what a frozen network makes of them, the same in every step.
    encoded: the same condition, which reads that instead; its params are {"null": what `encode`
      makes of one null example}. None where there is nothing to encode.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., Cond]
    null: Callable[[Any, Inputs], Inputs]
    inputs: Callable[[int, int], dict[str, jax.ShapeDtypeStruct]]
    frozen: bool = False
    encode: Callable[[Any, Inputs], Inputs] = lambda params, inputs: {}
    encoded: "Conditioner | None" = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The entries of a batch that it reads; () for an unconditional model."""
        return tuple(self.inputs(64, 64))


def unconditional() -> Conditioner:
    """The conditioner of a model without condition."""
    return Conditioner(
        init=lambda key: {},
        apply=lambda params, inputs, to_latent=None: Cond(),
        null=lambda params, inputs: inputs,
        inputs=lambda height, width: {},
    )


def together(parts: Mapping[str, Conditioner]) -> Conditioner:
    """Several conditions at once, each for a port of its own: text beside a mask, for one.

    Raises:
      UserError: one has weights to train and another frozen ones.
    """
    frozen = any(part.frozen for part in parts.values())
    for name, part in parts.items():
        if frozen and not part.frozen and jax.eval_shape(part.init, jax.random.key(0)):
            raise UserError(f"conditioning.{name} is to be trained, which a frozen one rules out")

    def merged(dicts):
        return {name: value for each in dicts for name, value in each.items()}

    def init(key):
        keys = jax.random.split(key, len(parts))
        return merged(part.init(k) for part, k in zip(parts.values(), keys, strict=True))

    def own(part, inputs):
        return {name: inputs[name] for name in part.keys}

    def apply(params, inputs, to_latent=None):
        conds = [part.apply(params, own(part, inputs), to_latent) for part in parts.values()]
        ports = merged({k: v for k, v in vars(c).items() if v is not None} for c in conds)
        return Cond(**ports)

    def null(params, inputs):
        return merged(part.null(params, own(part, inputs)) for part in parts.values())

    joined = Conditioner(
        init=init,
        apply=apply,
        null=null,
        inputs=lambda height, width: merged(p.inputs(height, width) for p in parts.values()),
        frozen=frozen,
    )
    if not any(part.encoded for part in parts.values()):
        return joined
    return joined._replace(
        encode=lambda params, inputs: merged(p.encode(params, inputs) for p in parts.values()),
        encoded=together({name: part.encoded or part for name, part in parts.items()}),
    )
