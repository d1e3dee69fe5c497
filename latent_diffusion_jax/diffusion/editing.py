"""Sampling that starts from latents of images: masks, image-to-image, interpolation. No training.

Source: masks: Rombach et al. 2022, as in their samplers; image-to-image: Meng et al. 2022 (SDEdit).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.diffusion.samplers import Sampler
from latent_diffusion_jax.diffusion.schedule import Schedule, add_noise
from latent_diffusion_jax.errors import UserError, choose

Array = jax.Array
Timesteps = tuple[np.ndarray, np.ndarray]  # (t, t_next) of `make_timesteps`

MINIMAL_SINE = 1e-3  # below it, weights along an arc and along a line agree to float32


def keep_known(
    sampler: Sampler,
    schedule: Schedule,
    z0: Array,
    known: Array,
    noise: Callable[[Array], Array],
    *,
    when: str = "before",
) -> Sampler:
    """Samples what is unknown around what is known, which each step sees at its own noise level.

    As published, the result still has the noise of the last level: paste z0 into it.

    Args:
      sampler: any; one that remembers earlier steps remembers them with the known part in place.
      schedule: the sampler's.
      z0: the known latent [B,h,w,c], scaled.
      known: [B,h,w,1], 1 where z0 is kept, 0 where it is sampled.
      noise: the standard normal noise [B,h,w,c] of step i on z0, independent of the sampler's.
      when: whether z0 at noise level t is put in "before" the step from t (the published DDIM and
        PLMS) or "after" it (the published ancestral sampling, where it is late by a step).

    Raises:
      UserError: an unknown `when`.
    """
    before = choose("when", when, {"before": True, "after": False})

    def put_in(z, t, i):
        return known * add_noise(schedule, z0, t, noise(i)) + (1 - known) * z

    def init(z):
        return sampler.init(z), jnp.int32(0)

    def step(denoise, carry, z, t, t_next, step_noise):
        inner, i = carry
        z = put_in(z, t, i) if before else z
        z, inner = sampler.step(denoise, inner, z, t, t_next, step_noise)
        return z if before else put_in(z, t, i), (inner, i + 1)

    return Sampler(init, step)


def last_steps(timesteps: Timesteps, strength: float) -> Timesteps:
    """The steps that keep something of an image: SDEdit, from its latent at noise level t[0].

    Args:
      timesteps: (t, t_next) of sampling from noise alone, S steps.
      strength: in (0, 1]: how much of the way is sampled; at 1 little is left of the image.

    Returns:
      The last round(strength * S) of the steps, at least 1.

    Raises:
      UserError: strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength}; choose above 0, up to 1")
    t, t_next = timesteps
    steps = max(round(strength * len(t)), 1)
    return t[-steps:], t_next[-steps:]


def slerp(a: Array, b: Array, weight: Array | float) -> Array:
    """Between two noises along the arc, which has their norm: a line's midpoint is too short.

    Each image is one vector; where two of them are all but parallel or opposite, the line is taken.
    Source: Shoemake 1985; for z_T: Song et al. 2021 (DDIM), section 5.3.

    Args:
      a: [B, ...], the result at weight 0.
      b: [B, ...], the result at weight 1.
      weight: a number, or [B].
    """

    def per_image(values: Array) -> Array:
        return values.reshape(values.shape + (1,) * (a.ndim - 1))

    def norm(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, a.ndim))))

    def unit(x: Array) -> Array:
        return x / per_image(jnp.maximum(norm(x), jnp.finfo(x.dtype).tiny))

    weight = jnp.broadcast_to(weight, a.shape[:1])
    # not arccos, which is blind to small angles
    angle = 2 * jnp.arctan2(norm(unit(a) - unit(b)), norm(unit(a) + unit(b)))
    sine = jnp.sin(angle)
    straight = sine < MINIMAL_SINE
    sine = jnp.where(straight, 1.0, sine)
    of_a = jnp.where(straight, 1 - weight, jnp.sin((1 - weight) * angle) / sine)
    of_b = jnp.where(straight, weight, jnp.sin(weight * angle) / sine)
    return per_image(of_a) * a + per_image(of_b) * b
