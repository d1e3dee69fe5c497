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


def remap(indices: jax.Array, used: jax.Array, unknown: int | None = None) -> jax.Array:
    """Position of each index in `used` [n], as a second model on a part of the codebook wants it.

    An index that is not there becomes `unknown`; default n. `used[position]` leads back.
    """
    match = indices[..., None] == used.reshape((1,) * indices.ndim + (-1,))
    position = jnp.argmax(match, axis=-1)
    return jnp.where(jnp.any(match, axis=-1), position, len(used) if unknown is None else unknown)


def init_use(size: int, dim: int) -> dict[str, jax.Array]:
    """What restarts need to know of a codebook [size, dim].

    idle: steps since an entry was used; used: whether it was in this one; fresh: latents to start
    from.
    """
    return {
        "idle": jnp.zeros((size,), jnp.int32),
        "used": jnp.zeros((size,), bool),
        "fresh": jnp.zeros((size, dim)),
    }


def note_use(
    use: dict[str, jax.Array], codes: jax.Array, z: jax.Array, key: jax.Array
) -> dict[str, jax.Array]:
    """Notes a batch: the share [size] of positions that each entry has, and its latents z."""
    rows = z.reshape(-1, z.shape[-1])
    fresh = rows[jax.random.randint(key, codes.shape, 0, len(rows))]
    return {**use, "used": use["used"] | (codes > 0), "fresh": fresh}


def restart_unused(
    entries: jax.Array, use: dict[str, jax.Array], after: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """At the end of a step: entries [size, dim] that were idle for `after` steps become latents."""
    idle = jnp.where(use["used"], 0, use["idle"] + 1)
    dead = idle >= after
    entries = jnp.where(dead[:, None], use["fresh"], entries)
    return entries, {**use, "idle": jnp.where(dead, 0, idle), "used": jnp.zeros_like(dead)}
