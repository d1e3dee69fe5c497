"""The UNet's building blocks against the original's numbers, one module at a time."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.nn.layers import (
    Downsample,
    ResBlock,
    Upsample,
    average_pool,
    group_norm,
    timestep_embedding,
    upsample_nearest,
)
from tests.published import check_module, golden, nhwc

BLOCKS = {
    "resblock": ResBlock(64),
    "resblock_chg": ResBlock(128),
    "resblock_ss": ResBlock(64, scale_shift=True),
    "resblock_down": ResBlock(64, scale_shift=True, resample="down"),
    "resblock_up": ResBlock(128, resample="up"),
    "unet_down": Downsample(),
    "unet_up": Upsample(),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_published_block(name):
    check_module(name, BLOCKS[name])


def test_published_average_pool():
    arrays, _ = golden("modules")
    pooled = average_pool(nhwc(arrays["x"]))
    np.testing.assert_allclose(pooled, nhwc(arrays["out_unet_avgpool/scale1.0"]), atol=1e-6)


@pytest.mark.parametrize("dim", [192, 320])
def test_published_timestep_embedding(dim):
    arrays, _ = golden("timestep_embedding")
    error = np.abs(timestep_embedding(arrays["t"], dim) - arrays[f"dim{dim}"])
    assert error.max() < 5e-5  # of float32 angles near 999: the original's error too
    assert error[arrays["t"] <= 10].max() < 1e-6


def test_timestep_embedding_of_odd_dim_ends_in_a_zero():
    t = jnp.array([0, 7])
    odd, even = timestep_embedding(t, 9), timestep_embedding(t, 8)
    np.testing.assert_array_equal(odd, np.pad(even, ((0, 0), (0, 1))))


def test_upsampling_repeats_and_pooling_undoes_it():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    up = upsample_nearest(x)
    np.testing.assert_array_equal(up, np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))
    np.testing.assert_allclose(average_pool(up), x, atol=1e-6)


def test_block_is_the_identity_at_first():
    """Its last convolution starts at zero."""
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 8)).astype(np.float32)
    init = jax.jit(ResBlock(8, num_groups=4).init_with_output)
    out, _ = init(jax.random.key(1), x, np.ones((1, 16), np.float32))
    np.testing.assert_array_equal(out, x)


def test_group_norm_survives_a_large_mean():
    """E[x^2] - E[x]^2 in float32 would leave noise of the size of the variance."""
    x = 3000 + np.random.default_rng(0).normal(size=(1, 16, 16, 8)).astype(np.float32)
    norm = group_norm("norm", num_groups=4, epsilon=1e-6, dtype=jnp.float32)
    out, _ = jax.jit(norm.init_with_output)(jax.random.key(1), x)
    exact = x.astype(np.float64).reshape(256, 4, 2)
    exact = (exact - exact.mean(axis=(0, 2), keepdims=True)) / exact.std(axis=(0, 2), keepdims=True)
    np.testing.assert_allclose(out, exact.reshape(x.shape), atol=2e-3)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7, 12), (2, 9, 8)])
def test_group_norm_and_its_gradients_are_linens(shape, silu):
    rng = np.random.default_rng(0)
    x, upstream = jnp.asarray(1 + 2 * rng.normal(size=(2, *shape)), jnp.float32)
    scale, bias = jnp.asarray(rng.normal(size=(2, shape[-1])), jnp.float32)
    ours = group_norm("norm", num_groups=4, epsilon=1e-5, dtype=jnp.float32, silu=silu)
    theirs = linen.GroupNorm(4, epsilon=1e-5, use_fast_variance=False)

    def pulled_back(norm, silu=False):
        def apply(x, scale, bias):
            y = norm.apply({"params": {"scale": scale, "bias": bias}}, x)
            return linen.silu(y) if silu else y

        y, back = jax.vjp(apply, x, scale, bias)
        return y, back(upstream)

    found, expected = pulled_back(ours), pulled_back(theirs, silu)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), found, expected
    )


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_keeps_its_input_alone_for_the_backward_pass(silu):
    x = jnp.ones((2, 16, 16, 8))
    params = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    norm = group_norm("norm", num_groups=4, epsilon=1e-5, dtype=jnp.float32, silu=silu)
    back = jax.vjp(lambda x: norm.apply(params, x), x)[1]
    kept = jax.tree.leaves(back)
    assert [leaf.shape for leaf in kept if leaf.size > 64] == [x.shape]
