"""Dot-product attention in the form that length, width and backend ask for.

Scores and softmax are float32 whatever the operands. The scores of n queries and m keys are a
matrix [n, m] per head; where one image's would fill memory, queries take turns, or a kernel is used
that never has all of it. On CPUs products are of whole matrices, and where these are large, heads
take turns, whose scores then stay in the caches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion_jax.nn.products import backend as traced_backend

LARGE = 2**30  # bytes of the scores of one image, of all heads: beyond, not all at once
CHUNK = 2**28  # bytes of them at once
TURN = 2**19  # bytes of a head's: from there on CPUs are faster with one head at a time
CUDNN_WIDTH = 128  # up to there, in steps of 8, on every GPU since Ampere


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, is_causal: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(width)) v; q [B, n, heads, width], k and v [B, m, heads, width]."""
    if is_causal:  # of captions, which are short
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    _, n, heads, width = q.shape
    backend, devices = traced_backend(), jax.device_count()
    form = choose_form(backend, q.dtype, heads, n, k.shape[1], width, devices)
    return FORMS[form](q, k, v)


def choose_form(
    backend: str, dtype: Any, heads: int, n: int, m: int, width: int, devices: int = 1
) -> str:
    """One of FORMS, by what one image needs: how many of a batch are on a device is not known.

    cuDNN's kernel, which gains little on short sequences, is only for what would not fit otherwise.
    Heads take turns on one device alone: of several each would wait for the others' images.
    """
    head = 4 * n * m
    if backend == "none":
        return "plain"
    if backend == "cpu" and devices == 1 and TURN <= head <= LARGE:
        return "head_by_head"
    if heads * head <= LARGE:
        return "heads_first" if backend == "cpu" else "plain"
    fits = dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= CUDNN_WIDTH
    return "cudnn" if backend == "gpu" and fits else "chunked"


def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """All scores at once."""
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, rows: int | None = None) -> jax.Array:
    """The same, of `rows` queries at a time, each time worked out again for the gradients.

    rows: default, as many as have CHUNK bytes of scores.
    """
    b, n, heads, width = q.shape
    rows = min(n, rows or max(1, CHUNK // (4 * heads * k.shape[1])))
    count = -(-n // rows)
    padded = jnp.pad(q, ((0, 0), (0, count * rows - n), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(b, count, rows, heads, width), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda part: plain(part, k, v)), chunks)
    return jnp.moveaxis(out, 0, 1).reshape(b, count * rows, heads, width)[:, :n]


def heads_first(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same with a head's positions side by side, which XLA for CPUs makes one kernel of."""
    return _of_heads(_attention, q, k, v)


def head_by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same of one head of one image at a time, worked out again for the gradients."""
    one = jax.checkpoint(lambda head: _attention(*head))
    return _of_heads(lambda *heads: jax.lax.map(one, heads), q, k, v)


def _of_heads(attention, q, k, v):
    b, n, heads, width = q.shape
    # one axis of both: beside an axis of one head XLA makes no kernel of it
    apart = [jnp.swapaxes(x, 1, 2).reshape(b * heads, -1, width) for x in (q, k, v)]
    return jnp.swapaxes(attention(*apart).reshape(b, heads, n, width), 1, 2)


def _attention(q, k, v):
    """q [..., n, width], k and v [..., m, width] -> [..., n, width]."""
    scores = jnp.einsum("...nd,...md->...nm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5)
    return jnp.einsum("...nm,...md->...nd", weights.astype(v.dtype), v)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same by a kernel of NVIDIA's, on their GPUs alone."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


FORMS: dict[str, Callable[..., jax.Array]] = {
    form.__name__: form for form in (plain, heads_first, head_by_head, chunked, cudnn)
}
