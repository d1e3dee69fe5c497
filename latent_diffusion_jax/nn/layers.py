"""The UNet's building blocks (paper appendix E; Dhariwal & Nichol 2021), NHWC.

Sub-modules carry the names of the published checkpoints, dots included, so that a checkpoint's key
is the path through the parameter tree, joined by dots.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.nn.group_norm import GroupNorm
from latent_diffusion_jax.nn.products import policy

# flax's default: three times the variance of torch's, with which short runs learn markedly faster
lecun_normal = nn.initializers.lecun_normal()
zeros = nn.initializers.zeros


def conv(
    features: int,
    name: str,
    *,
    dtype: Any,
    width: int = 3,
    stride: int = 1,
    padding=None,
    use_bias: bool = True,
    kernel_init=lecun_normal,
) -> nn.Conv:
    """A convolution with torch's symmetric padding, `width // 2`."""
    padding = width // 2 if padding is None else padding
    dtype, _, product = policy(dtype)
    return nn.Conv(
        features,
        (width, width),
        stride,
        padding,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        conv_general_dilated_cls=product,
        name=name,
    )


def embed(size: int, dim: int, name: str, dtype: Any) -> nn.Embed:
    """A table of `size` tokens."""
    # the original's deviation is 0.02, which the first blocks' outputs drown: all tokens look alike
    init = nn.initializers.normal(1.0)
    return nn.Embed(size, dim, dtype=dtype, embedding_init=init, name=name)


def dense(
    features: int, name: str | None = None, *, dtype: Any, use_bias=True, kernel_init=lecun_normal
):
    """A linear layer over the last axis; the published 1x1 convolutions are this too."""
    dtype, product, _ = policy(dtype)
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        dot_general_cls=product,
        name=name,
    )


def group_norm(
    name: str, *, num_groups: int, epsilon: float, dtype: Any, silu: bool = False
) -> GroupNorm:
    """GroupNorm, with SiLU or not; epsilon is 1e-5 in the UNet, 1e-6 in the first stages."""
    return GroupNorm(num_groups, epsilon, policy(dtype).dtype, silu, name=name)


def layer_norm(name: str, *, dtype: Any) -> nn.LayerNorm:
    """LayerNorm over the last axis, with torch's epsilon and float32 statistics."""
    return nn.LayerNorm(1e-5, dtype=policy(dtype).dtype, use_fast_variance=False, name=name)


def timestep_embedding(t: jax.Array, dim: int, max_period: float = 10_000.0) -> jax.Array:
    """Sinusoids [B, dim] of the integer times t [B]: cosines first, then sines, in float32."""
    half = dim // 2
    # worked out in float64: at t = 999 an error of the frequency is 999 times as large
    frequencies = np.exp(-math.log(max_period) * np.arange(half) / half).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def upsample_nearest(x: jax.Array) -> jax.Array:
    """[B, h, w, c] -> [B, 2h, 2w, c]."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def average_pool(x: jax.Array) -> jax.Array:
    """[B, h, w, c] -> [B, h/2, w/2, c]."""
    return nn.avg_pool(x, (2, 2), (2, 2))


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution with symmetric padding."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, h, w, c] -> [B, h/2, w/2, c]."""
        return conv(x.shape[-1], "op", stride=2, dtype=self.dtype)(x)


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, h, w, c] -> [B, 2h, 2w, c]."""
        return conv(x.shape[-1], "conv", dtype=self.dtype)(upsample_nearest(x))


class ResBlock(nn.Module):
    """A residual block told the time, by addition or by scale and shift after the second norm.

    resample "up" or "down" changes the resolution of both branches, between norm and convolution.
    """

    features: int
    scale_shift: bool = False
    resample: str | None = None
    dropout: float = 0.0
    num_groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, embedding, train: bool = False):
        """x [B, h, w, c], embedding [B, d] -> [B, h', w', features]."""

        def norm(name, silu=True):
            groups = self.num_groups
            return group_norm(name, num_groups=groups, epsilon=1e-5, dtype=self.dtype, silu=silu)

        h = norm("in_layers.0")(x)
        if self.resample is not None:
            change = {"up": upsample_nearest, "down": average_pool}[self.resample]
            h, x = change(h), change(x)
        h = conv(self.features, "in_layers.2", dtype=self.dtype)(h)

        width = 2 * self.features if self.scale_shift else self.features
        e = dense(width, "emb_layers.1", dtype=self.dtype)(nn.silu(embedding))[:, None, None, :]
        if self.scale_shift:
            scale, shift = jnp.split(e, 2, axis=-1)
            h = nn.silu(norm("out_layers.0", silu=False)(h) * (1 + scale) + shift)
        else:
            h = norm("out_layers.0")(h + e)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self.features, "out_layers.3", dtype=self.dtype, kernel_init=zeros)(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, "skip_connection", dtype=self.dtype)(x)
        return x + h
