"""LPIPS against the original's numbers, its gradient included, and what a distance must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.lpips import SCALE, SHIFT, Lpips, Vgg16, normalised
from tests.published import golden, named, nhwc, weights

ARRAYS, INFO = golden("lpips")
X, Y = nhwc(ARRAYS["x"]), nhwc(ARRAYS["y"])
SMALL = X[:1, :32, :16], Y[:1, :32, :16]
NOISE = 1e-12  # squared rounding errors: XLA may fuse the two images' passes in different ways
LPIPS = Lpips()


def close(ours, name):
    """To ten times the float32 error of the original, relative to the largest value."""
    about = INFO["accuracy"][name]
    error = max(about["f32_max_abs_err"], np.finfo(np.float32).eps * about["absmax"])
    expected = ARRAYS[f"out_{name}"]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=10 * error)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(LPIPS.init, jax.random.key(0), X, Y)["params"]
    return weights(shapes, INFO["weight_key_prefix"])


@jax.jit
def distance(params, a, b):
    return LPIPS.apply({"params": params}, a, b)


@jax.jit
def gradients(params, a, b):
    """Of the distances' sum, to both images."""
    return jax.grad(lambda a, b: jnp.sum(distance(params, a, b)), argnums=(0, 1))(a, b)


def test_keys_and_constants(params):
    constants = {"scaling_layer.shift": SHIFT, "scaling_layer.scale": SCALE}
    assert {*named(params), *constants} == set(INFO["keys"])
    for key, constant in constants.items():
        expected = np.float32(INFO["scaling"][key.split(".")[1]])
        np.testing.assert_array_equal(constant, expected, strict=True)


def test_published_features(params):
    features = jax.jit(Vgg16().apply)({"params": params["net"]}, X)
    assert len(features) == 5
    for i, x in enumerate(np.asarray(x, np.float64) for x in features):
        close(x.mean(), f"feat{i}_mean")
        close(x.std(ddof=1), f"feat{i}_std")
        close(np.moveaxis(x, -1, 1).reshape(-1)[:8], f"feat{i}_first")


def test_published_distances(params):
    layers = jax.jit(lambda p, a, b: LPIPS.apply({"params": p}, a, b, method="layers"))
    for i, layer in enumerate(np.asarray(layers(params, X, Y)).T):
        close(layer[:, None], f"layer{i}")
    total = distance(params, X, Y)
    assert total.dtype == jnp.float32
    close(total.reshape(2, 1, 1, 1), "total")
    itself = distance(params, X, X).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(itself, ARRAYS["out_self"], atol=NOISE)


def test_published_gradient(params):
    _, to_y = gradients(params, X, Y)
    close(np.moveaxis(to_y, -1, 1), "grad_y")


def test_a_distance(params):
    a, b = SMALL
    np.testing.assert_allclose(distance(params, a, a), 0, atol=NOISE)
    np.testing.assert_allclose(gradients(params, a, a), 0, atol=1e-9)
    assert np.all(distance(params, a, b) > 0)
    np.testing.assert_allclose(distance(params, a, b), distance(params, b, a), rtol=1e-6)
    (to_a, to_b), (swapped_b, swapped_a) = gradients(params, a, b), gradients(params, b, a)
    np.testing.assert_allclose(to_a, swapped_a, atol=1e-8)
    np.testing.assert_allclose(to_b, swapped_b, atol=1e-8)


@pytest.mark.parametrize("scale", [0, 1], ids=["no features", "features"])
def test_gradients_are_finite_where_features_are_zero(params, scale):
    a, b = np.zeros_like(SMALL[0]), SMALL[1]
    params = jax.tree.map(lambda x: np.float32(scale) * x, params)
    for pair in ((a, b), (a, a)):
        assert np.all(np.isfinite(distance(params, *pair)))
        assert np.all(np.isfinite(gradients(params, *pair)))


def test_normalised():
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    x[1] = 0
    x[2] *= 1e-10  # the epsilon is beside the root, not under it
    length = np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    np.testing.assert_allclose(normalised(x), x / (length + 1e-10), rtol=1e-5)
    np.testing.assert_array_equal(normalised(x)[1], 0)
    gradient = jax.grad(lambda x: jnp.sum(jnp.arange(5.0) * normalised(x)[1]))(x)
    np.testing.assert_array_equal(gradient, 0)


def test_half_precision_features(params):
    half = Lpips(dtype=jnp.bfloat16)
    total = jax.jit(half.apply)({"params": params}, *SMALL)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, distance(params, *SMALL), rtol=0.03)
    shapes = jax.eval_shape(half.init, jax.random.key(0), *SMALL)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


def test_small_images(params):
    image = np.zeros((1, 16, 16, 3), np.float32)
    np.testing.assert_allclose(distance(params, image, image), 0, atol=NOISE)
    with pytest.raises(UserError, match="at least 16 x 16 pixels, not 16 x 15"):
        distance(params, image[:, :, :15], image[:, :, :15])
