"""Each form is attention, and memory does not grow with the square of the length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from latent_diffusion_jax.nn import attend


def operands(n=50, m=30, heads=2, width=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, n, heads, width), (2, m, heads, width), (2, m, heads, width))
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def softmax_of_scores(q, k, v):
    """In float64, from the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhnm,bmhd->bnhd", weights, v)


@pytest.mark.parametrize(
    "form", [attend.plain, attend.heads_first, attend.head_by_head, attend.dot_product_attention]
)
def test_a_form_is_the_definition(form):
    np.testing.assert_allclose(form(*operands()), softmax_of_scores(*operands()), atol=2e-6)


@pytest.mark.parametrize("rows", [1, 7, 25, 50, 64])
def test_chunks_are_the_definition(rows):
    found = attend.chunked(*operands(), rows=rows)
    np.testing.assert_allclose(found, softmax_of_scores(*operands()), atol=2e-6)


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02)])
@pytest.mark.parametrize(
    "form", [functools.partial(attend.chunked, rows=8), attend.heads_first, attend.head_by_head]
)
def test_a_form_has_the_gradients_of_the_plain_one(form, dtype, atol):
    q, k, v = operands(dtype=dtype)

    def gradients(form):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(form(*x))), (0, 1, 2))(q, k, v)

    for mine, theirs in zip(gradients(form), gradients(attend.plain), strict=True):
        assert mine.dtype == theirs.dtype == dtype
        mine, theirs = (np.asarray(x, np.float32) for x in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, atol=atol * np.abs(theirs).max())


BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    "backend, dtype, heads, n, m, width, devices, form",
    [
        ("gpu", BF16, 8, 4096, 4096, 40, 1, "plain"),  # Stable Diffusion at 512 pixels
        ("gpu", BF16, 8, 9216, 9216, 40, 1, "cudnn"),  # at 768
        ("gpu", BF16, 8, 9216, 77, 40, 1, "plain"),  # to a caption
        ("gpu", F32, 8, 9216, 9216, 40, 1, "chunked"),
        ("gpu", BF16, 8, 9216, 9216, 44, 1, "chunked"),
        ("gpu", BF16, 1, 65536, 65536, 512, 1, "chunked"),  # a first stage at 2048 pixels
        ("tpu", BF16, 8, 9216, 9216, 40, 1, "chunked"),
        ("cpu", F32, 8, 256, 256, 40, 1, "heads_first"),
        ("cpu", F32, 8, 4096, 4096, 40, 1, "head_by_head"),
        ("cpu", F32, 8, 4096, 77, 40, 1, "head_by_head"),
        ("cpu", F32, 1, 4096, 4096, 512, 8, "heads_first"),  # images on several devices
        ("cpu", F32, 8, 9216, 9216, 40, 1, "head_by_head"),
        ("cpu", F32, 8, 9216, 9216, 40, 8, "chunked"),
        ("cpu", F32, 1, 65536, 65536, 512, 1, "chunked"),
    ],
)
def test_choice_by_length_width_and_backend(backend, dtype, heads, n, m, width, devices, form):
    assert attend.choose_form(backend, dtype, heads, n, m, width, devices) == form


def memory(form, n=2048, heads=2):
    """Temporary bytes of an image's gradients, by XLA's account."""
    x = [jax.ShapeDtypeStruct((1, n, heads, 8), jnp.float32)] * 3
    run = jax.jit(jax.grad(lambda *x: jnp.sum(form(*x)), (0, 1, 2)))
    return run.lower(*x).compile().memory_analysis().temp_size_in_bytes


def test_what_is_large_takes_turns_in_little_memory(monkeypatch):
    """Of a matrix of scores of 32 MB, a chunk of 1 MB at a time; with gradients, too."""
    monkeypatch.setattr(attend, "LARGE", 2**24)
    monkeypatch.setattr(attend, "CHUNK", 2**20)
    scores = 4 * 2 * 2048**2
    assert memory(attend.plain) >= scores
    assert memory(attend.dot_product_attention) < scores / 4


def test_heads_that_take_turns_need_the_memory_of_one():
    assert memory(attend.head_by_head, heads=8) < memory(attend.plain, heads=8) / 4


def test_a_head_at_a_time_is_exported_for_any_batch():
    (b,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 50, 2, 8), jnp.float32)
    exported = export.export(jax.jit(attend.head_by_head))(x, x, x)
    q, k, v = operands(m=50)
    np.testing.assert_allclose(exported.call(q, k, v), softmax_of_scores(q, k, v), atol=2e-6)


def test_heads_take_turns_where_there_is_one_device(monkeypatch):
    x = jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32)

    def loops():
        attention = jax.jit(lambda *x: attend.dot_product_attention(*x))  # traced anew each time
        return "stablehlo.while" in attention.lower(x, x, x).as_text()

    assert not loops()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert loops()
