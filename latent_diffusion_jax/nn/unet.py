"""The time-conditional UNet, eps_theta(z_t, t, tau(y)) (paper sections 3.2 and 3.3, appendix E).

Module names are those of the published checkpoints (`input_blocks.N.M`, `middle_block.M`,
`output_blocks.N.M`, `out.N`). Departure: whether attention is a plain block or a spatial
transformer is told by `transformer_depth` alone.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.conditioning.cond import Cond
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.attention import AttentionBlock, SpatialTransformer
from latent_diffusion_jax.nn.layers import (
    Downsample,
    ResBlock,
    Upsample,
    conv,
    dense,
    group_norm,
    timestep_embedding,
    zeros,
)
from latent_diffusion_jax.nn.remat import policies, rematerialise


class UNet(nn.Module):
    """Predicts the noise in z_t (or x0, or v: as trained).

    Attributes:
      model_channels: channels at the latent's own resolution.
      out_channels: channels of the prediction, those of the latent.
      channel_mult: multiples of `model_channels`, one per level, each at half the resolution.
      num_res_blocks: residual blocks per level (one more on the way up).
      attention_resolutions: downsampling factors of the latent at which there is attention;
        the middle block always has it.
      num_heads, num_head_channels: exactly one is set: how many heads, or how wide each is.
      transformer_depth: 0 for plain self-attention, else blocks per spatial transformer.
      use_scale_shift_norm: the time embedding scales and shifts instead of being added.
      resblock_updown: resolution changes inside residual blocks, not by convolutions.
      linear_projections: checkpoints hold a spatial transformer's projections as linear layers, as
        Stable Diffusion 2's, not as 1x1 convolutions; the same numbers.
      remat: which blocks compute their activations again in the backward pass: a policy of
        `nn.remat` for all, or pairs "1:full,2:dots" of a downsampling factor and a policy.
      dtype: compute dtype; parameters and the result are float32.
    """

    model_channels: int
    out_channels: int
    channel_mult: Sequence[int] = (1, 2, 4, 8)
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = ()
    num_heads: int | None = None
    num_head_channels: int | None = None
    transformer_depth: int = 0
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    linear_projections: bool = False
    dropout: float = 0.0
    num_groups: int = 32
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z_t: jax.Array, t: jax.Array, cond: Cond, train: bool = False) -> jax.Array:
        """z_t [B, h, w, c] and t int32 [B] (or a scalar) -> float32 [B, h, w, out_channels].

        h and w must be divisible by 2^(levels - 1).
        """
        t = jnp.broadcast_to(t, z_t.shape[:1])
        embedding = self._time_embedding(t, cond)
        x = z_t if cond.concat is None else jnp.concatenate([z_t, cond.concat], axis=-1)

        levels = len(self.channel_mult)
        remat = policies(self.remat, levels)

        def res(x, name, features, factor, resample=None):
            block = self._res_block(name, features, remat[factor], resample)
            return block(x, embedding, train)

        def attention(x, name, factor):
            return self._attention(x, name, cond.context, remat[factor])

        x = conv(self.model_channels, "input_blocks.0.0", dtype=self.dtype)(x)
        skips = [x]
        for level, mult in enumerate(self.channel_mult):
            factor = 2**level
            for _ in range(self.num_res_blocks):
                name = f"input_blocks.{len(skips)}"
                x = res(x, f"{name}.0", mult * self.model_channels, factor)
                if factor in self.attention_resolutions:
                    x = attention(x, f"{name}.1", factor)
                skips.append(x)
            if level < levels - 1:
                name = f"input_blocks.{len(skips)}.0"
                if self.resblock_updown:
                    x = res(x, name, x.shape[-1], factor, "down")
                else:
                    x = Downsample(self.dtype, name=name)(x)
                skips.append(x)

        x = res(x, "middle_block.0", x.shape[-1], factor)
        x = attention(x, "middle_block.1", factor)
        x = res(x, "middle_block.2", x.shape[-1], factor)

        block = 0
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            factor = 2**level
            for i in range(self.num_res_blocks + 1):
                name = f"output_blocks.{block}"
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = res(x, f"{name}.0", mult * self.model_channels, factor)
                position = 1
                if factor in self.attention_resolutions:
                    x = attention(x, f"{name}.1", factor)
                    position = 2
                if level > 0 and i == self.num_res_blocks:
                    name = f"{name}.{position}"
                    if self.resblock_updown:
                        x = res(x, name, x.shape[-1], factor // 2, "up")
                    else:
                        # kept whatever the policy: to compute it again, XLA splits its gradient
                        # over fsdp and gathers the activations of the whole batch for it
                        x = Upsample(self.dtype, name=name)(x)
                block += 1

        groups = self.num_groups
        x = group_norm("out.0", num_groups=groups, epsilon=1e-5, dtype=self.dtype, silu=True)(x)
        x = conv(self.out_channels, "out.2", dtype=self.dtype, kernel_init=zeros)(x)
        return x.astype(jnp.float32)

    def _time_embedding(self, t, cond):
        width = 4 * self.model_channels
        e = dense(width, "time_embed.0", dtype=self.dtype)(
            timestep_embedding(t, self.model_channels)
        )
        e = dense(width, "time_embed.2", dtype=self.dtype)(nn.silu(e))
        return e if cond.embedding is None else e + cond.embedding

    def _res_block(self, name, features, policy, resample):
        return rematerialise(ResBlock, policy, static_argnums=(3,))(
            features,
            scale_shift=self.use_scale_shift_norm,
            resample=resample,
            dropout=self.dropout,
            num_groups=self.num_groups,
            dtype=self.dtype,
            name=name,
        )

    def _attention(self, x, name, context, policy):
        channels = x.shape[-1]
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise UserError("set exactly one of unet.num_heads and unet.num_head_channels")
        divisor = self.num_heads or self.num_head_channels
        if channels % divisor:
            which = "num_heads" if self.num_heads else "num_head_channels"
            raise UserError(f"{channels} channels do not divide by unet.{which} = {divisor}")
        heads = self.num_heads or channels // divisor
        if self.transformer_depth == 0:
            block = rematerialise(AttentionBlock, policy)
            return block(heads, self.num_groups, self.dtype, name=name)(x)
        transformer = rematerialise(SpatialTransformer, policy)
        return transformer(
            heads, channels // heads, self.transformer_depth, self.num_groups, self.dtype, name=name
        )(x, context)
