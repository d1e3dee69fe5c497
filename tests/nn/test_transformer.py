"""Text encoders: the paper's against the original's numbers, CLIP's by what defines it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.transformer import ClipText, TextTransformer
from tests.published import golden, weights

SMALL = dict(vocab_size=30, max_length=9, dim=16, depth=2, num_heads=4)


@pytest.mark.parametrize(
    "name", ["text2img256", pytest.param("txt2img-1p4B", marks=pytest.mark.slow)]
)
def test_published_text_encoder(name):
    a, info = golden(f"cond_bert_{name}")
    dim, depth = info["params"]["n_embed"], info["params"]["n_layer"]
    network = TextTransformer(30_522, 77, dim, depth)
    shapes = jax.eval_shape(network.init, jax.random.key(0), a["tokens"])["params"]
    params = weights(shapes, info["weight_key_prefix"] + "transformer.")
    out = jax.jit(network.apply)({"params": params}, a["tokens"])
    assert np.abs(out - a["out"]).max() < 1e-5


@pytest.fixture(scope="module")
def clip():
    network = ClipText(**SMALL, activation="gelu")
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 30)
    return network, network.init(jax.random.key(0), tokens), tokens


def test_clip_is_causal(clip):
    network, params, tokens = clip
    out = network.apply(params, tokens)
    changed = network.apply(params, tokens.at[:, 5].add(1) % 30)
    np.testing.assert_array_equal(out[:, :5], changed[:, :5])
    assert np.abs(out[:, 5:] - changed[:, 5:]).max() > 1e-3


def test_shorter_captions_take_the_first_positions(clip):
    network, params, tokens = clip
    whole, short = network.apply(params, tokens), network.apply(params, tokens[:, :4])
    np.testing.assert_allclose(short, whole[:, :4], atol=1e-6)


def test_activations_differ_as_they_should(clip):
    _, params, tokens = clip
    exact, quick = (
        ClipText(**SMALL, activation=name).apply(params, tokens) for name in ("gelu", "quick_gelu")
    )
    assert 1e-4 < np.abs(exact - quick).max() < 0.1


def test_unknown_activation_names_the_choices():
    with pytest.raises(UserError, match="'gelu_fast'.*gelu, quick_gelu"):
        ClipText(**SMALL, activation="gelu_fast").init(jax.random.key(0), jnp.zeros((1, 3), int))


@pytest.mark.parametrize(
    "network,count",
    [
        (ClipText(49_408, 77, 768, 12, 12, "quick_gelu"), 123_060_480),
        (ClipText(49_408, 77, 1024, 23, 16, "gelu"), 340_387_840),
        (TextTransformer(30_522, 77, 1280, 32), 581_994_042),
        (TextTransformer(8_192, 92, 512, 16), 58_858_496),
    ],
    ids=["clip-vit-l-14", "openclip-vit-h-14", "text256", "layout256"],
)
def test_published_parameter_counts(network, count):
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(network.init, jax.random.key(0), tokens)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == count
