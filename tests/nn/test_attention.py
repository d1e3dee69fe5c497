"""Attention and transformer blocks against the original's numbers, one module at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.nn.attention import (
    AttentionBlock,
    FeedForward,
    SpatialTransformer,
    TransformerBlock,
    attend,
)
from tests.published import check_module

BLOCKS = {
    "attnblock_legacy": AttentionBlock(num_heads=4),
    "spatial_transformer": SpatialTransformer(num_heads=4, head_dim=16, depth=2),
    "spatial_transformer_wide": SpatialTransformer(num_heads=4, head_dim=24),
    "basic_transformer_block": TransformerBlock(num_heads=4, head_dim=16),
    "basic_transformer_block_nocontext": TransformerBlock(num_heads=4, head_dim=16),
    "geglu_ff": FeedForward(),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_published_block(name):
    check_module(name, BLOCKS[name])


def test_attend_is_softmax_of_scaled_products():
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(2, n, 6)).astype(np.float32) for n in (4, 5, 5))
    out = jax.jit(attend, static_argnums=3)(q, k, v, 2)
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        weights = np.exp(np.einsum("bnc,bmc->bnm", q[..., part], k[..., part]) / np.sqrt(3))
        weights /= weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(out[..., part], weights @ v[..., part], atol=1e-5)


def test_softmax_is_float32_in_bfloat16():
    """Equal weights over 512 keys: a bfloat16 sum of ones would stop at 256."""
    q, k = jnp.zeros((1, 1, 8), jnp.bfloat16), jnp.zeros((1, 512, 8), jnp.bfloat16)
    out = jax.jit(attend, static_argnums=3)(q, k, jnp.ones_like(k), 1)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1)


@pytest.mark.parametrize("block", [AttentionBlock(2, 4), SpatialTransformer(2, 4, num_groups=4)])
def test_block_is_the_identity_at_first(block):
    """Its last projection starts at zero."""
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 8)).astype(np.float32)
    out, _ = jax.jit(block.init_with_output)(jax.random.key(1), x)
    np.testing.assert_array_equal(out, x)
