"""A first stage as pure functions: the boundary where images become latents and back.

Everything outside this package sees the latent only through `FirstStage`. What the diffusion model
works on is z times a latent scale, which is data that lives with the checkpoint, not in here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latent_diffusion_jax.errors import UserError, choose
from latent_diffusion_jax.first_stage import posterior
from latent_diffusion_jax.first_stage.autoencoder import Autoencoder


class FirstStage(NamedTuple):
    """Image [B, H, W, 3] in [-1, 1] <-> latent z [B, H/factor, W/factor, channels].

    init: key -> params.
    encode: (params, image) -> moments, all that is random taken out, so that they can be cached.
    sample: (moments, key) -> z drawn from the posterior, where there is one.
    mode: moments -> the most probable z.
    decode: (params, z) -> image; VQ quantises first (the diffusion model works before that).
    autoencoder: the network, None for the identity.
    """

    init: Callable[[jax.Array], Any]
    encode: Callable[[Any, jax.Array], jax.Array]
    sample: Callable[[jax.Array, jax.Array], jax.Array]
    mode: Callable[[jax.Array], jax.Array]
    decode: Callable[[Any, jax.Array], jax.Array]
    factor: int
    channels: int
    autoencoder: Autoencoder | None


def _identity(*, image_channels: int = 3, dtype: Any = None) -> FirstStage:
    """f = 1: the latent is the image, the diffusion model works on pixels (LDM-1)."""
    del dtype  # there is nothing to compute
    return FirstStage(
        init=lambda key: {},
        encode=lambda params, image: image,
        sample=lambda moments, key: moments,
        mode=lambda moments: moments,
        decode=lambda params, z: z,
        factor=1,
        channels=image_channels,
        autoencoder=None,
    )


def _convolutional(autoencoder: Autoencoder, sample: Callable, mode: Callable) -> FirstStage:
    factor = 2 ** (len(autoencoder.channel_mult) - 1)

    def init(key):
        # parameter shapes do not depend on the image's size
        image = jnp.zeros((1, 2 * factor, 2 * factor, autoencoder.image_channels))
        return autoencoder.init(key, image)["params"]

    def apply(method: str, params: Any, x: Any) -> Any:
        return autoencoder.apply({"params": params}, x, method=method)

    def decode(params, z):
        if autoencoder.codebook_size:
            z = apply("quantized", params, z).entries
        return apply("decode", params, z)

    return FirstStage(
        init=init,
        encode=lambda params, image: apply("encode", params, image),
        sample=sample,
        mode=mode,
        decode=decode,
        factor=factor,
        channels=autoencoder.embed_dim,
        autoencoder=autoencoder,
    )


def _kl(**network: Any) -> FirstStage:
    def sample(moments, key):
        shape = (*moments.shape[:-1], moments.shape[-1] // 2)
        return posterior.sample(moments, jax.random.normal(key, shape))

    if network.get("codebook_size") is not None:
        raise UserError("first stage 'kl' has no codebook: remove codebook_size, or use 'vq'")
    return _convolutional(Autoencoder(**network), sample, posterior.mode)


def _vq(*, codebook_size: int, **network: Any) -> FirstStage:
    autoencoder = Autoencoder(codebook_size=codebook_size, **network)
    return _convolutional(autoencoder, lambda moments, key: moments, lambda moments: moments)


FIRST_STAGES: dict[str, Callable[..., FirstStage]] = {
    "identity": _identity,
    "kl": _kl,
    "vq": _vq,
}


def make_first_stage(*, kind: str, **network) -> FirstStage:
    """The first stage of a kind: "kl", "vq" (see `Autoencoder` for `network`) or "identity"."""
    return choose("first stage", kind, FIRST_STAGES)(**network)


def check_image_size(stage: FirstStage, *sizes: int) -> None:
    """Raises UserError unless the first stage divides each size (pixels) evenly."""
    for size in sizes:
        if size % stage.factor or size <= 0:
            below = size // stage.factor * stage.factor
            near = " or ".join(str(s) for s in (below, below + stage.factor) if s > 0)
            raise UserError(
                f"image size {size} is not divisible by the first stage's f = {stage.factor};"
                f" nearest sizes: {near}"
            )
