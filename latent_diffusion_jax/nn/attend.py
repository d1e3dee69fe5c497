"""Dot-product attention in the form that length, width and backend ask for.

Scores and softmax are float32 whatever the operands. The scores of n queries and m keys are a
matrix [n, m] per head; where one image's would fill memory, queries take turns, or a kernel is used
that never has all of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion_jax.nn.products import backend as traced_backend

LARGE = 2**30  # bytes of the scores of one image, of all heads: beyond, not all at once
CHUNK = 2**28  # bytes of them at once
CUDNN_WIDTH = 128  # up to there, in steps of 8, on every GPU since Ampere


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, is_causal: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(width)) v; q [B, n, heads, width], k and v [B, m, heads, width]."""
    if is_causal:  # of captions, which are short
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    _, n, heads, width = q.shape
    form = choose_form(traced_backend(), q.dtype, heads, n, k.shape[1], width)
    return FORMS[form](q, k, v)


def choose_form(backend: str, dtype: Any, heads: int, n: int, m: int, width: int) -> str:
    """One of FORMS, by what one image needs: how many of a batch are on a device is not known.

    cuDNN's kernel, which gains little on short sequences, is only for what would not fit otherwise.
    """
    if 4 * heads * n * m <= LARGE:
        return "plain"
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


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same by a kernel of NVIDIA's, on their GPUs alone."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


FORMS: dict[str, Callable[..., jax.Array]] = {"plain": plain, "chunked": chunked, "cudnn": cudnn}
