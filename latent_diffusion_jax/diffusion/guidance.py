"""Classifier-free guidance, as a function from Denoise to Denoise.

Source: Ho & Salimans 2021, eq. 6, in the published form e = e_u + s (e_c - e_u), s = 1 + w:
scale 1 is the plain condition and needs no guidance, 0 ignores the condition.
"""

import jax
import jax.numpy as jnp

from latent_diffusion_jax.diffusion.prediction import Denoise

Array = jax.Array


def guide(denoise: Denoise, scale: Array | float) -> Denoise:
    """Extrapolates from the unconditional to the conditional eps, in one call on 2B rows.

    Args:
      denoise: works on [2B,h,w,c]: the first B rows without the condition, the others with it.
      scale: s, a number or a traced scalar.

    Returns:
      A Denoise on [B,h,w,c].
    """

    def guided(z_t: Array, t: Array) -> Array:
        both_t = jnp.concatenate([t, t]) if jnp.ndim(t) else t
        uncond, cond = jnp.split(denoise(jnp.concatenate([z_t, z_t]), both_t), 2)
        return uncond + scale * (cond - uncond)

    return guided
