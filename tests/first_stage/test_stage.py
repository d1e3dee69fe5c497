"""The boundary between images and latents: shapes, kinds and faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.stage import check_image_size, make_first_stage

KINDS = {"kl": {}, "vq": {"codebook_size": 16}}


def tiny(kind, factor, **options):
    network = dict(
        channels=4,
        channel_mult=(1,) * factor.bit_length(),
        num_res_blocks=1,
        z_channels=5,
        embed_dim=3,
        num_groups=2,
    )
    return make_first_stage(kind=kind, **KINDS[kind], **network, **options)


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_smaller_by_f_and_decode_to_the_image_s_shape(kind, factor):
    stage = tiny(kind, factor)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    moments = jax.eval_shape(stage.encode, params, image)
    z = jax.eval_shape(stage.sample, moments, jax.random.key(0))
    assert (stage.factor, stage.channels) == (factor, 3)
    assert z.shape == (2, 64 // factor, 96 // factor, 3)
    assert jax.eval_shape(stage.mode, moments) == z
    assert jax.eval_shape(stage.decode, params, z) == image


def test_identity_is_f_1_and_changes_nothing():
    stage = make_first_stage(kind="identity")
    image = np.random.default_rng(0).uniform(-1, 1, (2, 5, 7, 3)).astype(np.float32)
    params = stage.init(jax.random.key(0))
    moments = stage.encode(params, image)
    assert (params, stage.factor, stage.channels) == ({}, 1, 3)
    for z in (stage.sample(moments, jax.random.key(0)), stage.mode(moments)):
        np.testing.assert_array_equal(stage.decode(params, z), image)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_computes_inside_and_returns_float32(kind):
    stage = tiny(kind, 2, dtype=jnp.bfloat16)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    moments = jax.eval_shape(stage.encode, params, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    z = jax.eval_shape(stage.mode, moments)
    image = jax.eval_shape(stage.decode, params, z)
    assert {moments.dtype, z.dtype, image.dtype} == {jnp.dtype("float32")}


def test_kl_samples_differ_by_key_around_the_mode():
    stage = tiny("kl", 4)
    moments = np.zeros((1, 2, 2, 6), np.float32) + np.float32([1, 2, 3, -50, -50, -50])
    first, again, other = (stage.sample(moments, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_allclose(first, stage.mode(moments), atol=5e-6)  # logvar is clamped at -30


def test_vq_latents_are_the_encoder_s_and_decoding_quantises():
    """The diffusion model works before quantisation: entries and what is near decode alike."""
    stage = tiny("vq", 2)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: random.normal(size=x.shape).astype(np.float32),
        jax.eval_shape(stage.init, jax.random.key(0)),
    )
    entries = params["quantize"]["embedding"]["embedding"][:4].reshape(1, 2, 2, 3)
    moments = entries + np.float32(1e-4)
    np.testing.assert_array_equal(stage.mode(moments), moments)
    np.testing.assert_array_equal(stage.sample(moments, jax.random.key(0)), moments)
    decode = jax.jit(stage.decode)
    np.testing.assert_array_equal(decode(params, moments), decode(params, entries))


@pytest.mark.parametrize(
    "sizes,message",
    [
        ((64, 30), "image size 30 .* f = 8; nearest sizes: 24 or 32"),
        ((4, 64), "image size 4 .* f = 8; nearest sizes: 8$"),
        ((0,), "image size 0 .* nearest sizes: 8$"),
    ],
)
def test_sizes_that_do_not_divide(sizes, message):
    stage = tiny("kl", 8)
    check_image_size(stage, 8, 64, 96)
    with pytest.raises(UserError, match=message):
        check_image_size(stage, *sizes)


def test_faults_name_the_value_and_the_choices():
    with pytest.raises(UserError, match="unknown first stage 'kll'; did you mean 'kl'?.*vq"):
        make_first_stage(kind="kll")
    with pytest.raises(UserError, match="codebook_size"):
        tiny("kl", 4, codebook_size=16)
