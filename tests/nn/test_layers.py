"""The UNet's building blocks against the original's numbers, one module at a time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.nn.layers import (
    Downsample,
    ResBlock,
    Upsample,
    average_pool,
    timestep_embedding,
    upsample_nearest,
)
from tests.published import check_module, golden

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
    x, expected = (np.moveaxis(arrays[n], 1, -1) for n in ("x", "out_unet_avgpool/scale1.0"))
    np.testing.assert_allclose(average_pool(x), expected, atol=1e-6)


@pytest.mark.parametrize("dim", [192, 320])
def test_published_timestep_embedding(dim):
    arrays, info = golden("timestep_embedding")
    error = np.abs(timestep_embedding(arrays["t"], dim) - arrays[f"dim{dim}"])
    # float32 sinusoids of large angles; the original's are as far from the exact ones
    assert error.max() <= 1.1 * info["f32_max_abs_err"][str(dim)]
    np.testing.assert_allclose(error[arrays["t"] < 10], 0, atol=1e-6)


def test_timestep_embedding_of_odd_dim_ends_in_a_zero():
    t = jnp.array([0, 7])
    odd, even = timestep_embedding(t, 9), timestep_embedding(t, 8)
    np.testing.assert_array_equal(odd, np.pad(even, ((0, 0), (0, 1))))


def test_upsampling_repeats_and_pooling_undoes_it():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    up = upsample_nearest(x)
    np.testing.assert_array_equal(up, np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))
    np.testing.assert_allclose(average_pool(up), x, atol=1e-6)


def test_block_is_the_identity_at_first():
    """Its last convolution starts at zero."""
    block, x = ResBlock(8, num_groups=4), jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    out, _ = block.init_with_output(jax.random.key(1), x, jnp.ones((1, 16)))
    np.testing.assert_array_equal(out, x)


def test_group_norm_survives_a_large_mean():
    """Statistics are float32 and two-pass, also where computing is in bfloat16."""
    from latent_diffusion_jax.nn.layers import group_norm

    x = 1000 + jax.random.normal(jax.random.key(0), (1, 16, 16, 8))
    norm = group_norm("norm", num_groups=4, epsilon=1e-6, dtype=jnp.float32)
    out, _ = norm.init_with_output(jax.random.key(1), x)
    assert isinstance(norm, nn.GroupNorm)
    np.testing.assert_allclose(jnp.std(out), 1, atol=1e-3)
