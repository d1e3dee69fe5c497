"""Conditions of the image's own layout, concatenated to z_t (paper sections 4.3.2, 4.4 and 4.5)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.conditioning.cond import Cond, Conditioner
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.layers import average_pool


class ChannelMapper(nn.Module):
    """The 1x1 convolution without bias of a one-hot map: a look-up of its columns."""

    num_classes: int
    channels: int

    @nn.compact
    def __call__(self, segmentation):
        """int [B, H, W] -> float32 [B, H, W, channels]; 0 where the class is negative."""
        shape = (self.num_classes, self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        columns = jnp.take(kernel, jnp.maximum(segmentation, 0), axis=0)
        return jnp.where(segmentation[..., None] < 0, 0.0, columns)


def segmentation(*, num_classes: int, channels: int, halvings: int = 2) -> Conditioner:
    """Segmentation maps int32 [B, H, W] -> concat [B, H / 2^halvings, ..., channels].

    The original's SpatialRescaler halves the one-hot map bilinearly (which at 1/2 is the mean of
    2x2) and then maps its channels; that is linear, so here the channels come first: the same
    numbers from a map of 3 channels instead of 182. Null: class -1, an all-zero one-hot map.
    """
    network = ChannelMapper(num_classes, channels)

    def init(key):
        return {"channel_mapper": network.init(key, jnp.zeros((1, 1, 1), jnp.int32))["params"]}

    def apply(params, inputs, to_latent=None):
        x: Any = network.apply({"params": params["channel_mapper"]}, inputs["segmentation"])
        for _ in range(halvings):
            x = average_pool(x)
        return Cond(concat=x)

    def inputs(height, width):
        return {"segmentation": jax.ShapeDtypeStruct((height, width), jnp.int32)}

    def null(params, inputs):
        return {"segmentation": jnp.full_like(inputs["segmentation"], -1)}

    return Conditioner(init, apply, null, inputs)


def lowres(*, factor: int = 4) -> Conditioner:
    """Images at 1/factor of the size, [B, H/factor, W/factor, 3] in [-1, 1] -> concat as they are.

    `factor` must be the first stage's f. Null: grey.
    """

    def inputs(height, width):
        shape = (height // factor, width // factor, 3)
        return {"lowres": jax.ShapeDtypeStruct(shape, jnp.float32)}

    return Conditioner(
        init=lambda key: {},
        apply=lambda params, inputs, to_latent=None: Cond(concat=inputs["lowres"]),
        null=lambda params, inputs: {"lowres": jnp.zeros_like(inputs["lowres"])},
        inputs=inputs,
    )


MASKS = ("ldm", "stable_diffusion")


def inpainting(*, mask: str = "ldm") -> Conditioner:
    """A masked image [B, H, W, 3] and its mask [B, H, W, 1] (1 = to be filled) -> concat.

    mask "ldm": latent of the image, then the mask as -1 and 1, holes of the image black (-1), as
    published for inpainting. "stable_diffusion": the mask as 0 and 1, then the latent, holes grey
    (0). The mask is reduced to the latent's size by nearest neighbour. It is never dropped: null is
    the same mask and image.
    """
    if mask not in MASKS:
        raise UserError(f"unknown mask {mask!r}; one of {', '.join(MASKS)}")

    def apply(params, inputs, to_latent=None):
        hole = (inputs["mask"] >= 0.5).astype(jnp.float32)
        image = inputs["image_to_fill"]
        if mask == "ldm":
            z = to_latent((1 - hole) * (image + 1) - 1)
        else:
            z = to_latent((1 - hole) * image)
        small = nearest(hole, z.shape[1], z.shape[2])
        parts = (z, 2 * small - 1) if mask == "ldm" else (small, z)
        return Cond(concat=jnp.concatenate(parts, axis=-1))

    def inputs(height, width):
        return {
            "image_to_fill": jax.ShapeDtypeStruct((height, width, 3), jnp.float32),
            "mask": jax.ShapeDtypeStruct((height, width, 1), jnp.float32),
        }

    return Conditioner(lambda key: {}, apply, lambda params, inputs: inputs, inputs)


def nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    """[B, H, W, c] -> [B, height, width, c] by torch's nearest neighbour: floor(i H / height)."""
    rows = jnp.arange(height) * x.shape[1] // height
    columns = jnp.arange(width) * x.shape[2] // width
    return x[:, rows][:, :, columns]


def embeddings(*, number: int, dim: int) -> Conditioner:
    """Embeddings [B, number, dim], such as CLIP's of retrieved images -> context; null: zeros.

    Training takes `number` of them; a model can be sampled with fewer.
    """

    def inputs(height, width):
        return {"embeddings": jax.ShapeDtypeStruct((number, dim), jnp.float32)}

    return Conditioner(
        init=lambda key: {},
        apply=lambda params, inputs, to_latent=None: Cond(context=inputs["embeddings"]),
        null=lambda params, inputs: {"embeddings": jnp.zeros_like(inputs["embeddings"])},
        inputs=inputs,
    )
