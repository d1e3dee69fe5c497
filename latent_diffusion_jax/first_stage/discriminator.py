"""The patch discriminator of phase 1's adversarial term (Isola et al. 2017; paper appendix G).

Says for every patch of an image how real it looks. Module names are the published checkpoints'.
Departure: under sharding, batch statistics are those of the global batch, not of each device's.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

normal = nn.initializers.normal(0.02)


def _scale_init(key, shape, dtype):
    return 1 + normal(key, shape, dtype)


class BatchNorm(nn.Module):
    """torch's BatchNorm2d: epsilon 1e-5, momentum 0.1, running variance without bias.

    flax's own keeps the biased variance. Statistics are float32.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        """[B, h, w, c] -> the same; collection `batch_stats` is read, in training also written."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", _scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        x = x.astype(jnp.float32)
        if train:
            m, v = jnp.mean(x, axis=(0, 1, 2)), jnp.var(x, axis=(0, 1, 2))
            count = x.size // x.shape[-1]
            if not self.is_initializing():
                mean.value = 0.9 * mean.value + 0.1 * m
                var.value = 0.9 * var.value + 0.1 * v * (count / max(count - 1, 1))
        else:
            m, v = mean.value, var.value
        factor = scale * jax.lax.rsqrt(v + 1e-5)
        m, factor, bias = (y[None, None, None] for y in (m, factor, bias))
        return ((x - m) * factor + bias).astype(self.dtype)


class PatchDiscriminator(nn.Module):
    """4x4 convolutions, the first `num_layers` of stride 2, doubling the channels up to eightfold.

    Attributes:
      channels: of the first convolution.
      num_layers: halvings; 3 makes patches of 70 x 70 pixels.
    """

    channels: int = 64
    num_layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image, train: bool):
        """[B, H, W, 3] in [-1, 1] -> logits [B, h, w, 1], float32; above 0 means real."""

        def layer(n, features, stride, use_bias):
            return nn.Conv(
                features,
                (4, 4),
                stride,
                1,
                use_bias=use_bias,
                dtype=self.dtype,
                kernel_init=normal,
                name=f"main.{n}",
            )

        x = nn.leaky_relu(layer(0, self.channels, 2, True)(image), 0.2)
        for i in range(1, self.num_layers + 1):
            stride = 2 if i < self.num_layers else 1
            x = layer(3 * i - 1, self.channels * min(2**i, 8), stride, False)(x)
            x = BatchNorm(self.dtype, name=f"main.{3 * i}")(x, train)
            x = nn.leaky_relu(x, 0.2)
        return layer(3 * self.num_layers + 2, 1, 1, True)(x).astype(jnp.float32)
