"""LPIPS, the perceptual distance of phase 1 (Zhang et al. 2018), as published with VGG16.

A pixel's features, at five depths of a network for ImageNet, are scaled to length 1; the distance
is a learned positive sum of squared differences, averaged over the pixels of each depth. Module
names are those of the published weights. Departure: never any dropout.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.layers import conv

# from [-1, 1] to about the pixels' mean and standard deviation in ImageNet
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
# the convolutions of each slice, numbered as in torchvision's VGG16, and their channels
SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
CHANNELS = (64, 128, 256, 512, 512)
MIN_SIZE = 2 ** (len(SLICES) - 1)  # pixels, of which the poolings leave one


class Vgg16(nn.Module):
    """The convolutional part of VGG16 (Simonyan & Zisserman 2015), without its last pooling."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array) -> list[jax.Array]:
        """[B, H, W, 3] in [-1, 1] -> features [B, H / 2^i, W / 2^i, channels] of slice i, 0 to 4.

        Raises:
          UserError: an image of less than 16 pixels on a side.
        """
        height, width = image.shape[1:3]
        if min(height, width) < MIN_SIZE:
            raise UserError(
                f"LPIPS takes images of at least {MIN_SIZE} x {MIN_SIZE} pixels, not"
                f" {height} x {width}"
            )
        x = (image.astype(jnp.float32) - SHIFT.reshape(1, 1, 1, 3)) / SCALE.reshape(1, 1, 1, 3)
        features: list[jax.Array] = []
        for i, (layers, channels) in enumerate(zip(SLICES, CHANNELS), 1):
            if features:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for layer in layers:
                x = nn.relu(conv(channels, f"slice{i}.{layer}", dtype=self.dtype)(x))
            features.append(x)
        return features


class Lpips(nn.Module):
    """The distance of two images; `dtype` is that of the features, what follows is float32."""

    dtype: Any = jnp.float32

    @nn.compact
    def layers(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in [-1, 1] -> what each slice adds to their distance, [B, 5]."""
        # called twice, not on both together: of an image that no gradient goes to, nothing is kept
        net = Vgg16(self.dtype, name="net")
        distances = []
        for i, (x, y) in enumerate(zip(net(a), net(b))):
            squares = jnp.mean((normalised(x) - normalised(y)) ** 2, axis=(1, 2))
            # the published 1x1 convolution; being linear, it can as well follow the mean
            precision = jax.lax.Precision.HIGHEST
            head = nn.Dense(1, use_bias=False, precision=precision, name=f"lin{i}.model.1")
            distances.append(head(squares))
        return jnp.concatenate(distances, axis=-1)

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in [-1, 1] -> their distance [B], float32."""
        return jnp.sum(self.layers(a, b), axis=-1)


def normalised(features: jax.Array) -> jax.Array:
    """[..., c] -> float32 of length 1 over the last axis; zeros stay, and have no gradient."""
    x = features.astype(jnp.float32)
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    some = square > 0
    # the root's gradient at 0 is infinite, and times 0 no number: it is not to be taken there
    length = jnp.sqrt(jnp.where(some, square, 1.0))
    return jnp.where(some, x / (length + 1e-10), 0.0)
