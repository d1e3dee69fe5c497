"""Terms of the phase-1 loss (paper section 3.1, appendix G equation 25)."""

import jax
import jax.numpy as jnp


def l1(a: jax.Array, b: jax.Array) -> jax.Array:
    """|a - b| per element."""
    return jnp.abs(a - b)


def l2(a: jax.Array, b: jax.Array) -> jax.Array:
    """(a - b)^2 per element."""
    return (a - b) ** 2


PIXEL_LOSSES = {"l1": l1, "l2": l2}


def perplexity(indices: jax.Array, size: int) -> jax.Array:
    """exp of the entropy of the codebook's use: `size` when all entries are used alike."""
    p = jnp.bincount(indices.reshape(-1), length=size) / indices.size
    return jnp.exp(-jnp.sum(p * jnp.log(jnp.maximum(p, 1e-10))))
