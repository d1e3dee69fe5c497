"""Vector quantisation against the original's numbers, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.first_stage.quantize import VectorQuantizer, codebook_loss, remap
from tests.published import golden, nhwc, value

ARRAYS, INFO = golden("vector_quantizer")
QUANTIZER = VectorQuantizer(INFO["n_e"], INFO["e_dim"])
CODEBOOK = value(INFO["weight_key"], (INFO["n_e"], INFO["e_dim"]))
Z = nhwc(ARRAYS["z"])


def quantize(codebook, z):
    return QUANTIZER.apply({"params": {"embedding": {"embedding": codebook}}}, z)


@pytest.mark.parametrize("legacy", [True, False])
def test_published(legacy):
    upstream = nhwc(ARRAYS["upstream"])

    def objective(codebook, z):
        quantized = quantize(codebook, z)
        loss = codebook_loss(z, quantized.entries, INFO["beta"], legacy)
        return loss + jnp.sum(quantized.z * upstream), (loss, quantized)

    grad = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
    (grad_codebook, grad_z), (loss, quantized) = grad(CODEBOOK, Z)
    expected = {n: ARRAYS[f"out_legacy{int(legacy)}/{n}"] for n in ("loss", "indices", "zq")}
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
    np.testing.assert_array_equal(quantized.indices, expected["indices"])
    np.testing.assert_allclose(quantized.z, nhwc(expected["zq"]), atol=1e-6)
    np.testing.assert_array_equal(quantized.entries, CODEBOOK[expected["indices"]])
    published = ARRAYS[f"out_legacy{int(legacy)}/grad_codebook"]
    np.testing.assert_allclose(grad_codebook, published, atol=1e-8)
    published = nhwc(ARRAYS[f"out_legacy{int(legacy)}/grad_z"])
    np.testing.assert_allclose(grad_z, published, atol=1e-6)


def test_gradients_pass_straight_through():
    gradient = jax.grad(lambda c, z: jnp.sum(quantize(c, z).z * 3.0), argnums=(0, 1))
    to_codebook, to_z = jax.jit(gradient)(CODEBOOK, Z)
    np.testing.assert_array_equal(to_codebook, 0)
    np.testing.assert_array_equal(to_z, 3)


def test_entries_quantise_to_themselves_and_ties_to_the_first():
    codebook = CODEBOOK.copy()
    codebook[7] = codebook[3]
    quantized = jax.jit(quantize)(codebook, codebook.reshape(1, 8, 8, 4))
    expected = np.arange(64)
    expected[7] = 3
    np.testing.assert_array_equal(quantized.indices.reshape(-1), expected)
    assert quantized.indices.dtype == jnp.int32


def test_new_codebooks_fill_a_small_cube():
    params = jax.jit(QUANTIZER.init)(jax.random.key(0), Z)["params"]
    codebook = np.asarray(params["embedding"]["embedding"])
    assert codebook.shape == (64, 4)
    assert 0.9 / 64 < np.abs(codebook).max() <= 1 / 64


@pytest.mark.parametrize("name,unknown", [("extra", None), ("3", 3)])
def test_published_remapping_to_the_codes_in_use(name, unknown):
    indices = quantize(CODEBOOK, Z).indices
    found = remap(indices, ARRAYS["used"], unknown)
    np.testing.assert_array_equal(found.reshape(-1), ARRAYS[f"out_remap_{name}/indices"])
    if name == "3":
        entries = CODEBOOK[ARRAYS["used"][found]]
        np.testing.assert_array_equal(entries, nhwc(ARRAYS["out_remap_3/entry"]))
