"""Text encoders: the paper's own transformer, and the text tower of CLIP.

Sources: Rombach et al. 2022, appendix E.2.1 (the code's `BERTEmbedder`, an x-transformers encoder
that sees neither a padding mask nor a causal one); Radford et al. 2021 (CLIP). Module names are
those of the published checkpoints, CLIP's those of transformers' `CLIPTextModel`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.errors import choose
from latent_diffusion_jax.nn.attention import attend
from latent_diffusion_jax.nn.layers import dense, embed, layer_norm


def _quick_gelu(x):
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": _quick_gelu,
}


class TextTransformer(nn.Module):
    """The paper's tau_theta: pre-LayerNorm blocks of full self-attention and a plain GELU MLP.

    Attributes:
      vocab_size: tokens; max_length: positions that have an embedding.
      dim: width of the tokens; depth: blocks; num_heads x head_dim: the attention's inner width.
      dtype: compute dtype; parameters and the result are float32.

    The published checkpoints hold a projection to logits, `to_logits`, which nothing reads; it is
    a parameter here too, so that they load and go back out whole.
    """

    vocab_size: int
    max_length: int
    dim: int
    depth: int
    num_heads: int = 8
    head_dim: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, n], n <= max_length -> float32 [B, n, dim]."""
        x = embed(self.vocab_size, self.dim, "token_emb", self.dtype)(tokens)
        positions = jnp.arange(tokens.shape[1])[None]
        x = x + embed(self.max_length, self.dim, "pos_emb.emb", self.dtype)(positions)
        for block in range(self.depth):
            x = x + self._attention(x, f"attn_layers.layers.{2 * block}")
            x = x + self._mlp(x, f"attn_layers.layers.{2 * block + 1}")
        x = layer_norm("norm", dtype=self.dtype)(x)
        if self.is_initializing():
            dense(self.vocab_size, "to_logits", dtype=self.dtype)(x)
        return x.astype(jnp.float32)

    def _attention(self, x, name):
        y = layer_norm(f"{name}.0", dtype=self.dtype)(x)
        inner = self.num_heads * self.head_dim
        q, k, v = (
            dense(inner, f"{name}.1.to_{which}", use_bias=False, dtype=self.dtype)(y)
            for which in "qkv"
        )
        y = attend(q, k, v, self.num_heads)
        return dense(self.dim, f"{name}.1.to_out", dtype=self.dtype)(y)

    def _mlp(self, x, name):
        y = layer_norm(f"{name}.0", dtype=self.dtype)(x)
        y = dense(4 * self.dim, f"{name}.1.net.0.0", dtype=self.dtype)(y)
        return dense(self.dim, f"{name}.1.net.2", dtype=self.dtype)(ACTIVATIONS["gelu"](y))


class ClipText(nn.Module):
    """CLIP's text tower up to its final LayerNorm: causal self-attention, pre-LayerNorm.

    Attributes:
      vocab_size, max_length, dim, depth, num_heads: as for `TextTransformer`.
      activation: of the MLP: "quick_gelu" (OpenAI's weights) or "gelu" (OpenCLIP's).

    Stable Diffusion 2 takes the last layer but one of OpenCLIP ViT-H: there `depth` is 23 of 24.
    """

    vocab_size: int
    max_length: int
    dim: int
    depth: int
    num_heads: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, n], n <= max_length -> float32 [B, n, dim]."""
        place = "text_model.embeddings"
        x = embed(self.vocab_size, self.dim, f"{place}.token_embedding", self.dtype)(tokens)
        positions = jnp.arange(tokens.shape[1])[None]
        x = x + embed(self.max_length, self.dim, f"{place}.position_embedding", self.dtype)(
            positions
        )
        x = clip_layers(
            x,
            "text_model.encoder.layers",
            depth=self.depth,
            num_heads=self.num_heads,
            activation=self.activation,
            is_causal=True,
            dtype=self.dtype,
        )
        return layer_norm("text_model.final_layer_norm", dtype=self.dtype)(x).astype(jnp.float32)


def clip_layers(
    x: jax.Array,
    place: str,
    *,
    depth: int,
    num_heads: int,
    activation: str,
    is_causal: bool,
    dtype: Any,
) -> jax.Array:
    """The blocks of either tower of CLIP, [B, n, dim] -> [B, n, dim]; to be called in a module."""
    dim, activate = x.shape[-1], choose("activation", activation, ACTIVATIONS)

    def attention(x, name):
        q, k, v = (dense(dim, f"{name}.{which}_proj", dtype=dtype)(x) for which in "qkv")
        return dense(dim, f"{name}.out_proj", dtype=dtype)(
            attend(q, k, v, num_heads, is_causal=is_causal)
        )

    def mlp(x, name):
        return dense(dim, f"{name}.fc2", dtype=dtype)(
            activate(dense(4 * dim, f"{name}.fc1", dtype=dtype)(x))
        )

    for layer in range(depth):
        name = f"{place}.{layer}"
        x = x + attention(layer_norm(f"{name}.layer_norm1", dtype=dtype)(x), f"{name}.self_attn")
        x = x + mlp(layer_norm(f"{name}.layer_norm2", dtype=dtype)(x), f"{name}.mlp")
    return x
