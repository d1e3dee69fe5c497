"""Vector quantisation (van den Oord et al. 2017; the VQ regularisation of paper section 3.1)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Quantized(NamedTuple):
    """z: straight through [B, h, w, c]; entries: the codebook's own; indices: int32 [B, h, w]."""

    z: jax.Array
    entries: jax.Array
    indices: jax.Array


class VectorQuantizer(nn.Module):
    """A codebook of `size` entries of `dim` channels."""

    size: int
    dim: int

    @nn.compact
    def __call__(self, z: jax.Array) -> Quantized:
        """Nearest entries of z [B, h, w, dim]; the first on ties."""
        bound = 1.0 / self.size

        def init(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        codebook = nn.Embed(self.size, self.dim, embedding_init=init, name="embedding")
        e = codebook.embedding
        # |z - e|^2 without |z|^2, which does not move the minimum
        products = jnp.einsum("bhwc,nc->bhwn", z, e, precision=jax.lax.Precision.HIGHEST)
        distance = jnp.sum(e**2, axis=1)[None, None, None, :] - 2.0 * products
        indices = jnp.argmin(distance, axis=-1).astype(jnp.int32)
        entries = codebook(indices)
        return Quantized(z + jax.lax.stop_gradient(entries - z), entries, indices)


def codebook_loss(z: jax.Array, entries: jax.Array, beta: float, legacy: bool) -> jax.Array:
    """Mean squared distance of entries to z, and of z to entries ("commitment").

    `beta` weighs the commitment term; with `legacy`, as in the published models, the other one.
    """
    codebook = jnp.mean((entries - jax.lax.stop_gradient(z)) ** 2)
    commitment = jnp.mean((jax.lax.stop_gradient(entries) - z) ** 2)
    return beta * codebook + commitment if legacy else codebook + beta * commitment
