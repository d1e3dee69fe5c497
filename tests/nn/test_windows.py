"""Windows against the original's patch-wise mode, and against what they must leave unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from latent_diffusion_jax.conditioning.cond import Cond
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.layers import upsample_nearest
from latent_diffusion_jax.nn.windows import (
    border_weight,
    make_grid,
    ramp_weight,
    windowed,
    windowed_network,
)
from tests.published import golden, nhwc

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def published():
    return golden("patchwise_crossattn_ks16")[0]


def mean(x):
    return x.mean((1, 2), keepdims=True)


def network(params, z, t, cond):
    """The golden case's model in closed form, its condition as context [B, 1, 1]."""
    rest = 0.1 * jnp.sin(t / 100)[:, None] + 0.05 * cond.context[:, 0]
    return 0.6 * z + rest[:, None, None, :] + 0.4 * mean(z)


def close(ours, published):
    published = nhwc(published)
    assert ours.shape == published.shape
    np.testing.assert_allclose(ours, published, rtol=0, atol=1e-5 * np.abs(published).max())


@pytest.mark.parametrize("batch", [1, 4])  # 6 windows: groups of 1; two of 3
def test_published_denoising(published, batch):
    z, t, c = nhwc(published["x"]), published["t"], published["c"]
    run = jax.jit(windowed_network(network, 16, 8, batch))
    close(run({}, z, t, Cond(context=c[:, :, None])), published["out_apply_model"])


def test_published_weights(published):
    weights = border_weight(16, 16)
    flat = np.repeat(weights.reshape(1, -1, 1), 6, axis=-1)  # one column per window
    np.testing.assert_allclose(flat, published["out_weighting"], rtol=1e-5)
    total = make_grid((32, 24), 16, 8).total(weights)
    np.testing.assert_allclose(total, published["out_normalization"][0, 0], rtol=1e-5)


def test_published_decoding_and_encoding(published):
    def decode(z):
        x = upsample_nearest(upsample_nearest(z))
        return x + 0.3 * mean(x)

    def encode(image):
        b, h, w, c = image.shape
        z = image.reshape(b, h // 4, 4, w // 4, 4, c).mean((2, 4))
        return z - 0.5 * mean(z)

    x, image = nhwc(published["x"]), nhwc(published["img"])
    close(jax.jit(windowed(decode, 16, 8))(x), published["out_decode"])
    close(jax.jit(windowed(encode, 32, 16))(image), published["out_encode"])


@pytest.mark.parametrize("weight", [border_weight, ramp_weight(0.25)])
@pytest.mark.parametrize("size", [(24, 32), (19, 21), (9, 40), (5, 8), (4, 19)])
@pytest.mark.parametrize("batch", [1, 3])
def test_pointwise_functions_are_unchanged_at_any_size(size, weight, batch):
    x = RNG.standard_normal((2, *size, 3)).astype(np.float32)
    twice = RNG.standard_normal((2, 2 * size[0], 2 * size[1], 1)).astype(np.float32)

    def function(arrays):  # a second array and a result at twice the first one's resolution
        return upsample_nearest(arrays["x"]) * arrays["y"] + arrays["y"]

    arrays = {"x": x, "y": twice}
    assert function(arrays).shape == (2, 2 * size[0], 2 * size[1], 3)
    run = jax.jit(windowed(function, 8, 5, weight=weight, batch=batch))
    np.testing.assert_allclose(run(arrays), function(arrays), rtol=0, atol=2e-6)


def test_windows_cover_all_and_end_at_the_border():
    grid = make_grid((21, 8), 8, 5)
    assert grid.starts.tolist() == [[0, 0], [5, 0], [10, 0], [13, 0]]
    assert grid.window.tolist() == [8, 8]
    assert make_grid((5, 9), 8, 8).starts.tolist() == [[0, 0], [0, 1]]


def test_what_is_concatenated_is_cut_like_z():
    """A window that saw another place's mask would differ."""
    z = RNG.standard_normal((2, 13, 20, 4)).astype(np.float32)
    mask = RNG.standard_normal((2, 13, 20, 1)).astype(np.float32)
    calls = []

    def network(params, z, t, cond):
        calls.append(z.shape)
        return params * z * cond.concat + t

    run = windowed_network(network, 8, 4)
    ours = run(2.0, z, jnp.float32(7), Cond(concat=mask))
    np.testing.assert_allclose(ours, 2 * z * mask + 7, rtol=1e-5)
    assert set(calls) == {(2, 8, 8, 4)}


def test_ramps_of_neighbours_sum_to_one():
    total = make_grid((8, 26), 8, 6).total(ramp_weight(2 / 8)(8, 8))
    np.testing.assert_allclose(total[2:-2, 2:-2], 1, rtol=1e-6)


def test_memory_does_not_grow_with_the_array():
    """A function that needs 64 channels of an array of 1; only its result grows."""
    kernels = RNG.standard_normal((3, 3, 1, 64)), RNG.standard_normal((3, 3, 64, 1))

    def wide(x):
        for kernel in kernels:
            layout = ("NHWC", "HWIO", "NHWC")
            kernel = kernel.astype(np.float32)
            x = jnp.tanh(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", None, None, layout))
        return x

    def temporary(function, size):
        x = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32)
        return jax.jit(function).lower(x).compile().memory_analysis().temp_size_in_bytes

    small, large = (temporary(windowed(wide, 32, 16), size) for size in (64, 256))
    result = 4 * 256**2  # bytes
    assert large - small <= result
    assert temporary(wide, 256) - temporary(wide, 64) > 30 * result


@pytest.mark.parametrize(
    "window,stride,batch,message",
    [
        (8, 9, 1, "stride of 1 to 8, not 9"),
        (8, 0, 1, "stride of 1 to 8, not 0"),
        (8, 4, 0, "at least one window"),
        (8, 3, 1, "do not begin and end between pixels"),  # 3 pixels are 1.5 of half the size
    ],
)
def test_windows_that_cannot_be_are_named(window, stride, batch, message):
    def half(x):
        return x[:, ::2, ::2]

    with pytest.raises(UserError, match=message):
        windowed(half, window, stride, batch=batch)(jnp.zeros((1, 16, 16, 1)))
