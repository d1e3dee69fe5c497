"""Self-attention and the spatial transformer with cross-attention (paper section 3.3, equation 2).

Softmax is in float32 whatever the compute dtype. Names are the published checkpoints'.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.nn.attend import dot_product_attention
from latent_diffusion_jax.nn.layers import dense, group_norm, layer_norm, zeros


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, num_heads: int, is_causal: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(width)) v over heads; q [B, n, heads * width], k and v [B, m, ...]."""

    def split(x):
        return x.reshape(*x.shape[:2], num_heads, -1)

    out = dot_product_attention(split(q), split(k), split(v), is_causal=is_causal)
    return out.reshape(q.shape)


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with a residual (Dhariwal & Nichol 2021)."""

    num_heads: int
    num_groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, h, w, c] -> [B, h, w, c]."""
        b, h, w, c = x.shape
        norm = group_norm("norm", num_groups=self.num_groups, epsilon=1e-5, dtype=self.dtype)
        qkv = dense(3 * c, "qkv", dtype=self.dtype)(norm(x).reshape(b, h * w, c))
        # the published channel order is [head][q, k, v][width]
        q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, self.num_heads, 3, -1), 3, 0)
        out = dot_product_attention(q, k, v).reshape(b, h * w, c)
        out = dense(c, "proj_out", dtype=self.dtype, kernel_init=zeros)(out)
        return x + out.reshape(b, h, w, c)


class CrossAttention(nn.Module):
    """Attention of tokens to a context, or to themselves where there is none."""

    num_heads: int
    head_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context=None):
        """x [B, n, c], context [B, m, d] -> [B, n, c]."""
        context = x if context is None else context
        inner = self.num_heads * self.head_dim
        q = dense(inner, "to_q", use_bias=False, dtype=self.dtype)(x)
        k = dense(inner, "to_k", use_bias=False, dtype=self.dtype)(context)
        v = dense(inner, "to_v", use_bias=False, dtype=self.dtype)(context)
        out = attend(q, k, v, self.num_heads)
        return dense(x.shape[-1], "to_out.0", dtype=self.dtype)(out)


class FeedForward(nn.Module):
    """The transformer's MLP with GEGLU: the first half is the value, the second its gate."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, n, c] -> [B, n, c]."""
        c = x.shape[-1]
        value, gate = jnp.split(dense(8 * c, "net.0.proj", dtype=self.dtype)(x), 2, axis=-1)
        return dense(c, "net.2", dtype=self.dtype)(value * nn.gelu(gate, approximate=False))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, MLP; each behind a LayerNorm, with a residual."""

    num_heads: int
    head_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context=None):
        """x [B, n, c], context [B, m, d] -> [B, n, c]."""

        def norm(name):
            return layer_norm(name, dtype=self.dtype)

        def attention(name):
            return CrossAttention(self.num_heads, self.head_dim, self.dtype, name=name)

        x = x + attention("attn1")(norm("norm1")(x))
        x = x + attention("attn2")(norm("norm2")(x), context)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual."""

    num_heads: int
    head_dim: int
    depth: int = 1
    num_groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context=None):
        """x [B, h, w, c], context [B, m, d] -> [B, h, w, c]."""
        b, h, w, c = x.shape
        norm = group_norm("norm", num_groups=self.num_groups, epsilon=1e-6, dtype=self.dtype)
        inner = self.num_heads * self.head_dim
        y = dense(inner, "proj_in", dtype=self.dtype)(norm(x)).reshape(b, h * w, inner)
        for i in range(self.depth):
            block = TransformerBlock(
                self.num_heads, self.head_dim, self.dtype, name=f"transformer_blocks.{i}"
            )
            y = block(y, context)
        y = dense(c, "proj_out", dtype=self.dtype, kernel_init=zeros)(y)
        return x + y.reshape(b, h, w, c)
