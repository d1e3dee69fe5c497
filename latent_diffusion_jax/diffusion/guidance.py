"""Guidance, as functions from Denoise to Denoise: every sampler takes what they return.

Source: without a classifier: Ho & Salimans 2021, eq. 6, in the published form
e = e_u + s (e_c - e_u), s = 1 + w: scale 1 is the plain condition and needs no guidance, 0 ignores
the condition. With one: Dhariwal & Nichol 2021. By an image: Rombach et al. 2022, appendix C.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from latent_diffusion_jax.diffusion.prediction import Denoise, to_x0
from latent_diffusion_jax.diffusion.schedule import Schedule, at
from latent_diffusion_jax.errors import UserError

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


def within(interval: tuple[float, float], guided: Denoise, plain: Denoise) -> Denoise:
    """Guides at some noise levels only; elsewhere a step costs what the plain model does.

    Source: Kynkaanniemi et al. 2024, who give the interval in sigma / alpha.

    Args:
      interval: (low, high) in t: guided where low <= t < high.
      guided: with guidance, on [B,h,w,c].
      plain: with the condition but without guidance, on [B,h,w,c].

    Returns:
      A Denoise for times t that are scalars, as samplers give them.

    Raises:
      UserError: low is not below high.
    """
    low, high = interval
    if not low < high:
        raise UserError(f"guidance from t = {low} up to {high}; choose low below high")

    def chosen(z_t: Array, t: Array) -> Array:
        return jax.lax.cond((low <= t) & (t < high), guided, plain, z_t, t)

    return chosen


def classifier_guide(
    denoise: Denoise,
    schedule: Schedule,
    log_prob: Callable[[Array, Array], Array],
    scale: Array | float,
) -> Denoise:
    """Moves eps by a classifier of noisy latents: eps - s sigma_t grad log p(y | z_t).

    Source: Dhariwal & Nichol 2021, algorithm 2.

    Args:
      denoise: the model, with or without a condition of its own.
      schedule: the forward process.
      log_prob: (z_t [B,h,w,c], t) -> log p(y | z_t) [B], up to constants; each of its own row.
      scale: s, a number or a traced scalar; 1 is Bayes' rule.
    """

    def guided(z_t: Array, t: Array) -> Array:
        gradient = jax.grad(lambda z: log_prob(z, t).sum())(z_t)
        _, sigma = at(schedule, t, z_t.ndim)
        return denoise(z_t, t) - scale * sigma * gradient

    return guided


def image_guide(
    denoise: Denoise,
    schedule: Schedule,
    log_likelihood: Callable[[Array], Array],
    scale: Array | float,
) -> Denoise:
    """Moves eps by what the predicted x0 says of an observation, through the model's gradient.

    eps - s sigma_t grad_{z_t} log p(y | x0(z_t)): for p(y | z_t), that ignores how uncertain x0 is.
    Source: Rombach et al. 2022, appendix C.

    Args:
      denoise: the model; it is differentiated, which costs memory and about twice a call more.
      schedule: the forward process.
      log_likelihood: x0 [B,h,w,c] -> log p(y | x0) [B], up to constants; each of its own row.
      scale: s, a number or a traced scalar.
    """

    def guided(z_t: Array, t: Array) -> Array:
        alpha, sigma = at(schedule, t, z_t.ndim)

        def likelihood(z):
            eps = denoise(z, t)
            return log_likelihood(to_x0("eps", eps, z, alpha, sigma)).sum(), eps

        gradient, eps = jax.grad(likelihood, has_aux=True)(z_t)
        return eps - scale * sigma * gradient

    return guided


def dynamic_threshold(
    denoise: Denoise, schedule: Schedule, quantile: float, floor: float = 1.0
) -> Denoise:
    """Keeps the predicted x0 within [-floor, floor] as guidance grows, without saturating it.

    Each image's x0 is clipped to its own s = max(quantile of |x0|, floor) and divided by s / floor.
    Source: Saharia et al. 2022, section 2.3, with floor 1: the range of pixels.

    Args:
      denoise: the model, with its guidance.
      schedule: the forward process.
      quantile: of |x0| over an image, in (0, 1]; theirs is 0.995.
      floor: the largest |x0| that data has, in units of z.

    Raises:
      UserError: quantile outside (0, 1] or floor not above 0.
    """
    if not 0 < quantile <= 1:
        raise UserError(f"quantile {quantile} of |x0|; choose above 0, up to 1")
    if not floor > 0:
        raise UserError(f"floor {floor} of |x0|; choose above 0")

    def thresholded(z_t: Array, t: Array) -> Array:
        alpha, sigma = at(schedule, t, z_t.ndim)
        eps = denoise(z_t, t)
        x0 = to_x0("eps", eps, z_t, alpha, sigma)
        axes = tuple(range(1, x0.ndim))
        s = jnp.maximum(jnp.quantile(jnp.abs(x0), quantile, axis=axes, keepdims=True), floor)
        change = jnp.clip(x0, -s, s) / (s / floor) - x0
        return eps - alpha / sigma * change  # an x0 within the range leaves eps exactly as it is

    return thresholded
