"""What a network predicts (eps, x0 or v), and how much its error counts at each noise level.

Source: eps: Ho et al. 2020, eq. 12; v = alpha eps - sigma z: Salimans & Ho 2022, section 4 and
appendix D; min-SNR-gamma weights: Hang et al. 2023. eps is canonical: samplers and guidance see
nothing else. alpha and sigma broadcast against z_t throughout, and alpha^2 + sigma^2 = 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_diffusion_jax.diffusion.schedule import Schedule, at
from latent_diffusion_jax.errors import choose

Array = jax.Array
Denoise = Callable[[Array, Array], Array]  # (z_t [B,h,w,c], t int32 [] or [B]) -> eps [B,h,w,c]

GAMMA = 5.0  # Hang et al.'s choice; they find little difference between 1 and 20


class Prediction(NamedTuple):
    """A linear re-expression of (z, eps), given z_t."""

    target: Callable[[Array, Array, Array, Array], Array]  # (z, eps, alpha, sigma)
    to_eps: Callable[[Array, Array, Array, Array], Array]  # (output, z_t, alpha, sigma)
    to_x0: Callable[[Array, Array, Array, Array], Array]  # (output, z_t, alpha, sigma)
    x0_error: Callable[[Array, Array], Array]  # |error of x0| / |error of the output|


PREDICTIONS = {
    "eps": Prediction(
        target=lambda z, eps, alpha, sigma: eps,
        to_eps=lambda output, z_t, alpha, sigma: output,
        to_x0=lambda output, z_t, alpha, sigma: (z_t - sigma * output) / alpha,
        x0_error=lambda alpha, sigma: sigma / alpha,
    ),
    "x0": Prediction(
        target=lambda z, eps, alpha, sigma: z,
        to_eps=lambda output, z_t, alpha, sigma: (z_t - alpha * output) / sigma,
        to_x0=lambda output, z_t, alpha, sigma: output,
        x0_error=lambda alpha, sigma: jnp.ones_like(alpha),
    ),
    "v": Prediction(
        target=lambda z, eps, alpha, sigma: alpha * eps - sigma * z,
        to_eps=lambda output, z_t, alpha, sigma: sigma * z_t + alpha * output,
        to_x0=lambda output, z_t, alpha, sigma: alpha * z_t - sigma * output,
        x0_error=lambda alpha, sigma: sigma,
    ),
}


def target(prediction: str, z: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """What a network of this kind is trained to return for z_t = alpha z + sigma eps."""
    return choose("prediction", prediction, PREDICTIONS).target(z, eps, alpha, sigma)


def to_eps(prediction: str, output: Array, z_t: Array, alpha: Array, sigma: Array) -> Array:
    """The noise in z_t according to the network's output."""
    return choose("prediction", prediction, PREDICTIONS).to_eps(output, z_t, alpha, sigma)


def to_x0(prediction: str, output: Array, z_t: Array, alpha: Array, sigma: Array) -> Array:
    """The clean latent in z_t according to the network's output."""
    return choose("prediction", prediction, PREDICTIONS).to_x0(output, z_t, alpha, sigma)


def make_denoise(
    network: Callable[[Array, Array], Array], schedule: Schedule, prediction: str
) -> Denoise:
    """Wraps a network of any prediction and compute dtype, (z_t, t) -> output, as a Denoise."""
    convert = choose("prediction", prediction, PREDICTIONS).to_eps

    def denoise(z_t: Array, t: Array) -> Array:
        output = network(z_t, t).astype(jnp.float32)
        return convert(output, z_t, *at(schedule, t, z_t.ndim))

    return denoise


def _uniform(prediction: Prediction, alpha: Array, sigma: Array, gamma: float) -> Array:
    """Plain error of the network's own target, as published (L_simple)."""
    return jnp.ones_like(alpha)


def _min_snr(prediction: Prediction, alpha: Array, sigma: Array, gamma: float) -> Array:
    """min(SNR, gamma) on the squared error of x0, whichever target the network has."""
    return jnp.minimum((alpha / sigma) ** 2, gamma) * prediction.x0_error(alpha, sigma) ** 2


WEIGHTINGS = {"uniform": _uniform, "min_snr": _min_snr}


def loss_weight(
    weighting: str, prediction: str, alpha: Array, sigma: Array, gamma: float = GAMMA
) -> Array:
    """The factor on the squared error of the network's output; shaped like alpha and sigma."""
    weigh = choose("weighting", weighting, WEIGHTINGS)
    return weigh(choose("prediction", prediction, PREDICTIONS), alpha, sigma, gamma)
