"""Tiles from the host: exact where a tile sees all it needs, without seams, of bounded memory."""

import jax
import numpy as np
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.stage import make_first_stage
from latent_diffusion_jax.first_stage.tiling import observed, tiled, tiled_evenly
from tests.published import weights

RNG = np.random.default_rng(0)
STAGE = make_first_stage(
    kind="kl",
    channels=8,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    z_channels=4,
    embed_dim=4,
    num_groups=2,
)
PARAMS = weights(jax.eval_shape(STAGE.init, jax.random.key(0)))


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [(32, 48), (37, 16), (9, 20)])
def test_pointwise_functions_are_unchanged_at_any_size(size):
    z = normal(2, *size, 4)
    np.testing.assert_allclose(tiled(np.tanh, 16, 4)(z), np.tanh(z), atol=1e-6)


def test_one_shape_for_all_tiles_and_factors_up_and_down():
    shapes = []

    def decode(z):
        shapes.append(z.shape)
        return z.repeat(4, 1).repeat(4, 2)

    z = normal(1, 21, 35, 2)
    image = tiled(decode, 16, 6)(z)
    np.testing.assert_allclose(image, z.repeat(4, 1).repeat(4, 2), atol=1e-6)
    assert set(shapes) == {(1, 16, 16, 2)}
    encoded = tiled(lambda x: x[:, ::4, ::4], 32, 8)(image)
    np.testing.assert_allclose(encoded, z, atol=1e-6)


def test_tiles_that_disagree_fade_into_each_other():
    """The largest step between pixels is that of the ramp, not that of the disagreement."""
    numbers = iter(range(100))

    def disagree(z):
        return np.full_like(z, next(numbers) % 2)

    image = tiled(disagree, 16, 8)(normal(1, 16, 64, 1))
    assert image.min() < 0.01
    assert image.max() > 0.99
    # the slope of sin^2 over 8 pixels
    assert np.abs(np.diff(image, axis=2)).max() < np.pi / 2 / 8


def test_an_array_no_larger_than_the_tile_is_decoded_whole():
    decode = jax.jit(STAGE.decode)
    z = normal(1, 8, 8, 4)
    tiles = tiled(lambda z: decode(PARAMS, z), 16, 4)
    np.testing.assert_allclose(tiles(z), decode(PARAMS, z), atol=1e-6)


def test_one_program_whatever_the_image_and_memory_of_a_tile():
    traced = []

    @jax.jit
    def decode(params, z):
        traced.append(z.shape)
        return STAGE.decode(params, z)

    def temporary(z):
        memory = decode.lower(PARAMS, z).compile().memory_analysis()
        return memory.temp_size_in_bytes

    for size in (24, 40):
        image = tiled(lambda z: decode(PARAMS, z), 16, 8)(normal(1, size, size, 4))
        assert image.shape == (1, 4 * size, 4 * size, 3)
    assert traced == [(1, 16, 16, 4)]
    assert temporary(normal(1, 40, 40, 4)) > 4 * temporary(normal(1, 16, 16, 4))


@pytest.mark.parametrize("overlap", [0, 16])
def test_an_overlap_that_cannot_be_is_named(overlap):
    with pytest.raises(UserError, match=f"overlap of 1 to 15, not {overlap}"):
        tiled(np.tanh, 16, overlap)(normal(1, 32, 32, 1))


def contrasting():
    """A latent whose left half is calm and whose right half is not."""
    z = normal(1, 32, 64, 4)
    z[:, :, :32] *= 0.05
    return z


def test_norms_use_the_statistics_that_they_are_given():
    z = contrasting()
    plain = STAGE.decode(PARAMS, z)
    image, whole = observed(STAGE.decode, None, PARAMS, z)
    np.testing.assert_allclose(image, plain, atol=1e-4)
    assert len(whole) > 5
    again, of_part = observed(STAGE.decode, whole, PARAMS, z[:, :, :32])
    _, own = observed(STAGE.decode, None, PARAMS, z[:, :, :32])
    first = "decoder/mid/block_1.norm1"
    name = first if first in own else next(iter(own))
    np.testing.assert_allclose(of_part[name][1], own[name][1], rtol=1e-4)  # the first norm's input
    assert np.abs(again - STAGE.decode(PARAMS, z[:, :, :32])).max() > 0.1


def test_shared_norms_bring_tiles_closer_to_the_whole():
    stage = make_first_stage(
        kind="kl",
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        z_channels=4,
        embed_dim=4,
        num_groups=2,
        mid_attention=False,
    )
    params = weights(jax.eval_shape(stage.init, jax.random.key(0)))
    z = contrasting()
    whole = np.asarray(stage.decode(params, z))

    def error(image):
        return np.sqrt(np.mean((image - whole) ** 2))

    decode = jax.jit(stage.decode)
    alone = error(tiled(lambda x: decode(params, x), 32, 8)(z))
    shared = error(tiled_evenly(stage.decode, 32, 8)(params, z))
    assert shared < alone / 2
    np.testing.assert_allclose(tiled_evenly(stage.decode, 64, 8)(params, z), whole, atol=1e-4)
