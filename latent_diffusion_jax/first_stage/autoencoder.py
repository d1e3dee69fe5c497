"""The convolutional autoencoder of phase 1 (paper section 3.1 and appendix G).

Encoder and decoder of residual blocks, one non-local attention at the lowest resolution, and a
1x1 convolution on either side of the latent. Module names are the published checkpoints'.
Departure: attention is placed by level instead of by a resolution that presumes 256 pixels.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.first_stage.quantize import VectorQuantizer
from latent_diffusion_jax.nn.attention import attend
from latent_diffusion_jax.nn.layers import conv, dense, group_norm, upsample_nearest
from latent_diffusion_jax.nn.remat import policies, rematerialise


class ResnetBlock(nn.Module):
    """norm, SiLU, 3x3 convolution, twice, with a residual."""

    features: int
    dropout: float = 0.0
    num_groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        """[B, h, w, c] -> [B, h, w, features]."""

        def norm(name):
            groups = self.num_groups
            return group_norm(name, num_groups=groups, epsilon=1e-6, dtype=self.dtype, silu=True)

        h = conv(self.features, "conv1", dtype=self.dtype)(norm("norm1")(x))
        h = norm("norm2")(h)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self.features, "conv2", dtype=self.dtype)(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, "nin_shortcut", dtype=self.dtype)(x)
        return x + h


class NonLocalAttention(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    num_groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, h, w, c] -> [B, h, w, c]."""
        b, h, w, c = x.shape
        norm = group_norm("norm", num_groups=self.num_groups, epsilon=1e-6, dtype=self.dtype)
        y = norm(x).reshape(b, h * w, c)
        q, k, v = (dense(c, name, dtype=self.dtype)(y) for name in "qkv")
        y = dense(c, "proj_out", dtype=self.dtype)(attend(q, k, v, num_heads=1))
        return x + y.reshape(b, h, w, c)


class Downsample(nn.Module):
    """Halves the resolution; pads below and to the right only, as the published first stages do."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, h, w, c] -> [B, h/2, w/2, c]."""
        padding = ((0, 1), (0, 1))
        return conv(x.shape[-1], "conv", stride=2, padding=padding, dtype=self.dtype)(x)


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, h, w, c] -> [B, 2h, 2w, c]."""
        return conv(x.shape[-1], "conv", dtype=self.dtype)(upsample_nearest(x))


class _Coder(nn.Module):
    """What encoder and decoder share: `Autoencoder`'s attributes and the blocks made from them."""

    channels: int
    out_channels: int
    channel_mult: Sequence[int]
    num_res_blocks: int
    attention_levels: Sequence[int]
    mid_attention: bool
    dropout: float
    num_groups: int
    remat: str
    dtype: Any

    def policy(self, level):
        """What is computed again in the backward pass, at a level."""
        return policies(self.remat, len(self.channel_mult))[2**level]

    def block(self, name, features, level):
        """A residual block."""
        block = rematerialise(ResnetBlock, self.policy(level), static_argnums=(2,))
        return block(features, self.dropout, self.num_groups, self.dtype, name=name)

    def attention(self, name, level):
        """A non-local attention block."""
        attention = rematerialise(NonLocalAttention, self.policy(level))
        return attention(self.num_groups, self.dtype, name=name)

    def middle(self, x, train):
        """The blocks at the lowest resolution."""
        level = len(self.channel_mult) - 1
        x = self.block("mid.block_1", x.shape[-1], level)(x, train)
        if self.mid_attention:
            x = self.attention("mid.attn_1", level)(x)
        return self.block("mid.block_2", x.shape[-1], level)(x, train)

    def out(self, x, level):
        """The last norm and its activation."""

        def apply(self, x):
            groups, dtype = self.num_groups, self.dtype
            norm = group_norm("norm_out", num_groups=groups, epsilon=1e-6, dtype=dtype, silu=True)
            return norm(x)

        return rematerialise(apply, self.policy(level))(self, x)

    def last(self, x):
        """The last convolution; float32."""
        return conv(self.out_channels, "conv_out", dtype=self.dtype)(x).astype(jnp.float32)


class Encoder(_Coder):
    """Image to features at 1/f of its size."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        """[B, H, W, 3] -> [B, H/f, W/f, out_channels]."""
        x = conv(self.channels, "conv_in", dtype=self.dtype)(x)
        for level, mult in enumerate(self.channel_mult):
            for i in range(self.num_res_blocks):
                x = self.block(f"down.{level}.block.{i}", mult * self.channels, level)(x, train)
                if level in self.attention_levels:
                    x = self.attention(f"down.{level}.attn.{i}", level)(x)
            if level < len(self.channel_mult) - 1:
                x = Downsample(self.dtype, name=f"down.{level}.downsample")(x)
        return self.last(self.out(self.middle(x, train), level))


class Decoder(_Coder):
    """Features to an image of f times their size; one block more per level than the encoder."""

    @nn.compact
    def __call__(self, x, train: bool = False, last: bool = True):
        """[B, h, w, c] -> [B, f h, f w, out_channels]; else what the last convolution reads."""
        x = conv(self.channel_mult[-1] * self.channels, "conv_in", dtype=self.dtype)(x)
        x = self.middle(x, train)
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                x = self.block(f"up.{level}.block.{i}", mult * self.channels, level)(x, train)
                if level in self.attention_levels:
                    x = self.attention(f"up.{level}.attn.{i}", level)(x)
            if level > 0:
                upsample = rematerialise(Upsample, self.policy(level - 1))
                x = upsample(self.dtype, name=f"up.{level}.upsample")(x)
        x = self.out(x, level)
        return self.last(x) if last else x


class Autoencoder(nn.Module):
    """Encoder, latent and decoder; f = 2^(levels - 1).

    Attributes:
      channels: channels at full resolution; channel_mult: their multiples, one per level.
      num_res_blocks: blocks per level (the decoder has one more).
      z_channels: channels of the encoder's result; embed_dim: of the latent.
      codebook_size: entries of the VQ codebook; None for the KL model.
      attention_levels: levels (0 = full resolution) with attention after each block.
      mid_attention: whether there is attention at the lowest resolution.
      remat: what is computed again in the backward pass: a policy of `nn.remat` for all, or pairs
        "1:full,2:dots" of a downsampling factor and a policy.
    """

    channels: int
    channel_mult: Sequence[int]
    num_res_blocks: int
    z_channels: int
    embed_dim: int
    codebook_size: int | None = None
    attention_levels: Sequence[int] = ()
    mid_attention: bool = True
    image_channels: int = 3
    dropout: float = 0.0
    num_groups: int = 32
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):  # noqa: D102
        moments = 1 if self.codebook_size else 2  # mean and log-variance, in the KL model
        shared = (
            self.num_res_blocks,
            self.attention_levels,
            self.mid_attention,
            self.dropout,
            self.num_groups,
            self.remat,
            self.dtype,
        )
        self.encoder = Encoder(self.channels, moments * self.z_channels, self.channel_mult, *shared)
        self.decoder = Decoder(self.channels, self.image_channels, self.channel_mult, *shared)
        self.quant_conv = dense(moments * self.embed_dim, dtype=self.dtype)
        self.post_quant_conv = dense(self.z_channels, dtype=self.dtype)
        if self.codebook_size:
            self.quantize = VectorQuantizer(self.codebook_size, self.embed_dim)

    def encode(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Image [B, H, W, 3] -> moments [B, h, w, 2 embed_dim] (KL) or z [B, h, w, embed_dim]."""
        return self.quant_conv(self.encoder(image, train)).astype(jnp.float32)

    def decode(self, z: jax.Array, train: bool = False) -> jax.Array:
        """Latent [B, h, w, embed_dim], taken as it is -> image [B, H, W, 3], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z), train)

    def features(self, z: jax.Array, train: bool = False) -> jax.Array:
        """As `decode`, up to the last convolution, which `last_convolution` is."""
        return self.decoder(self.post_quant_conv(z), train, last=False)

    def quantized(self, z: jax.Array):
        """The nearest codebook entries, straight through, and what the VQ loss needs."""
        return self.quantize(z)

    def __call__(self, image: jax.Array):
        """Touches every parameter, for initialisation."""
        z = self.encode(image)[..., : self.embed_dim]
        return self.decode(self.quantized(z).z if self.codebook_size else z)


def last_convolution(autoencoder: Autoencoder, params: Any, features: jax.Array) -> jax.Array:
    """`features` to the image [B, H, W, 3]; params of `decoder.conv_out`."""
    network: Any = conv(autoencoder.image_channels, "conv_out", dtype=autoencoder.dtype)
    return network.apply({"params": params}, features).astype(jnp.float32)
