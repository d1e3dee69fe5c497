"""Samplers: from noise to a latent, as pairs of pure functions that one `lax.scan` runs.

Source: DDIM: Song et al. 2021, eq. 12 and 16; DDPM: Ho et al. 2020, algorithm 2, on any subsequence
of the times. The noise of each step is an argument, so a sampler is pure mathematics and image i
depends on the seed and i alone. All in float32, whatever the network computes in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.diffusion.prediction import Denoise, to_x0
from latent_diffusion_jax.diffusion.schedule import Schedule, at, fresh_fraction, posterior
from latent_diffusion_jax.errors import UserError, choose

Array = jax.Array
Carry = Any  # what a multi-step sampler remembers: a pytree of one structure throughout


class Sampler(NamedTuple):
    """init(z) -> carry; step(denoise, carry, z, t, t_next, noise) -> (z, carry)."""

    init: Callable[[Array], Carry]
    step: Callable[[Denoise, Carry, Array, Array, Array, Array], tuple[Array, Carry]]


def ddim(schedule: Schedule, *, eta: float = 0.0) -> Sampler:
    """DDIM: eta 0 maps z_T to an image deterministically, eta 1 adds as much noise as DDPM.

    Raises:
      UserError: eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta} of the sampler 'ddim'; choose from 0 to 1")

    def step(denoise, carry, z, t, t_next, noise):
        alpha, sigma = at(schedule, t, z.ndim)
        alpha_next, sigma_next = at(schedule, t_next, z.ndim)
        eps = denoise(z, t)
        x0 = to_x0("eps", eps, z, alpha, sigma)
        # Eq. 12 with eq. 16's sigma = eta sigma_next sqrt(fresh) in its radicals, which then cannot
        # turn negative by rounding.
        fresh = fresh_fraction(schedule, t, t_next, z.ndim)
        z = alpha_next * x0 + sigma_next * jnp.sqrt(1 - eta**2 * fresh) * eps
        if eta:  # static, so that the deterministic sampler draws nothing
            z += eta * sigma_next * jnp.sqrt(fresh) * noise
        return z, carry

    return Sampler(init=lambda z: (), step=step)


def ddpm(schedule: Schedule) -> Sampler:
    """Ancestral sampling: each step draws from q(z_t_next | z_t, predicted x0)."""

    def step(denoise, carry, z, t, t_next, noise):
        x0 = to_x0("eps", denoise(z, t), z, *at(schedule, t, z.ndim))
        mean, variance = posterior(schedule, x0, z, t, t_next)
        return mean + jnp.sqrt(variance) * noise, carry

    return Sampler(init=lambda z: (), step=step)


SAMPLERS: dict[str, Callable[..., Sampler]] = {"ddim": ddim, "ddpm": ddpm}


def make_sampler(name: str, schedule: Schedule, **options: float) -> Sampler:
    """Builds a sampler; `options` are those of the named one in SAMPLERS.

    Raises:
      UserError: an unknown name or option, or a value out of range.
    """
    make = choose("sampler", name, SAMPLERS)
    try:
        return make(schedule, **options)
    except TypeError as error:
        raise UserError(f"sampler {name!r}: {error}") from error


def sample(
    sampler: Sampler,
    denoise: Denoise,
    z: Array,
    *,
    timesteps: tuple[np.ndarray, np.ndarray],
    noise: Callable[[Array], Array],
    return_path: bool = False,
) -> Any:
    """Runs a sampler from z_T to the latent.

    Args:
      sampler: see SAMPLERS.
      denoise: the model; guidance and conditions are inside it.
      z: z_T [B,h,w,c], standard normal.
      timesteps: (t, t_next) of `make_timesteps`.
      noise: the standard normal noise [B,h,w,c] of step i.
      return_path: whether to keep the latent after every step.

    Returns:
      The latent [B,h,w,c] float32; with `return_path` also the path [steps,B,h,w,c].
    """

    def body(state, times):
        z, carry = state
        i, t, t_next = times
        z, carry = sampler.step(denoise, carry, z, t, t_next, noise(i))
        return (z, carry), (z if return_path else None)

    z = z.astype(jnp.float32)
    t, t_next = timesteps
    times = jnp.arange(len(t)), jnp.asarray(t), jnp.asarray(t_next)
    (z, _), path = jax.lax.scan(body, (z, sampler.init(z)), times)
    return (z, path) if return_path else z


def image_keys(key: Array, indices: Array) -> Array:
    """One key per image from the seed's key and the images' numbers, int [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def image_noise(keys: Array, i: Array | int, shape: tuple[int, ...]) -> Array:
    """Standard normal noise [B, *shape] of step i for each image; i = -1 is z_T itself."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i + 1), shape))(keys)
