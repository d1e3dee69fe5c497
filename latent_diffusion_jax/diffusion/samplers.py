"""Samplers: from noise to a latent, as pairs of pure functions that one `lax.scan` runs.

The noise of each step is an argument, so a sampler is pure mathematics and image i depends on the
seed and i alone. All in float32, whatever the network computes in. Time is that of the schedule: t
and t_next are any two of its steps, t_next = -1 is clean.

With lambda = log(alpha / sigma), h = lambda_next - lambda: exp(-h) = alpha sigma_next / (alpha_next
sigma). Solvers of higher order take the step into clean data, where h is infinite, at first order.
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
Revise = Callable[[Array], Array]  # predicted x0 [B,h,w,c] -> the x0 to go on with


class Sampler(NamedTuple):
    """init(z) -> carry; step(denoise, carry, z, t, t_next, noise) -> (z, carry)."""

    init: Callable[[Array], Carry]
    step: Callable[[Denoise, Carry, Array, Array, Array, Array], tuple[Array, Carry]]


def ddim(schedule: Schedule, *, eta: float = 0.0, revise: Revise | None = None) -> Sampler:
    """DDIM (Song et al. 2021, eq. 12 and 16): eta 0 is deterministic, eta 1 as noisy as DDPM.

    `revise` changes the predicted x0, such as to the nearest codes (published: quantize_denoised),
    and leaves eps as it is.

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
        x0 = revise(x0) if revise else x0
        # Eq. 12 with eq. 16's sigma = eta sigma_next sqrt(fresh) in its radicals, which then cannot
        # turn negative by rounding.
        fresh = fresh_fraction(schedule, t, t_next, z.ndim)
        z = alpha_next * x0 + sigma_next * jnp.sqrt(1 - eta**2 * fresh) * eps
        if eta:  # static, so that the deterministic sampler draws nothing
            z += eta * sigma_next * jnp.sqrt(fresh) * noise
        return z, carry

    return Sampler(init=lambda z: (), step=step)


def euler(schedule: Schedule) -> Sampler:
    """Euler's method on the flow d(z / alpha) / d(sigma / alpha) = eps: that is DDIM with eta 0."""
    return ddim(schedule)


def euler_ancestral(schedule: Schedule) -> Sampler:
    """Euler's method to less noise than due, then new noise (k-diffusion): DDIM with eta 1."""
    return ddim(schedule, eta=1.0)


def ddpm(schedule: Schedule, *, revise: Revise | None = None) -> Sampler:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any subsequence of the times.

    Each step draws from q(z_t_next | z_t, predicted x0); `revise` changes that x0, as in `ddim`.
    """

    def step(denoise, carry, z, t, t_next, noise):
        x0 = to_x0("eps", denoise(z, t), z, *at(schedule, t, z.ndim))
        x0 = revise(x0) if revise else x0
        mean, variance = posterior(schedule, x0, z, t, t_next)
        return mean + jnp.sqrt(variance) * noise, carry

    return Sampler(init=lambda z: (), step=step)


def heun(schedule: Schedule) -> Sampler:
    """Heun's method on the probability flow (Karras et al. 2022, algorithm 1): order 2.

    Calls the model twice a step, the second time at t_next.
    """

    def step(denoise, carry, z, t, t_next, noise):
        eps = denoise(z, t)
        eps_next = denoise(_flow(schedule, z, eps, t, t_next), jnp.maximum(t_next, 0))
        eps = jnp.where(t_next < 0, eps, (eps + eps_next) / 2)
        return _flow(schedule, z, eps, t, t_next), carry

    return Sampler(init=lambda z: (), step=step)


def plms(schedule: Schedule) -> Sampler:
    """Pseudo linear multi-step, published with the paper (Liu et al. 2022, eq. 9 to 12): order 2.

    Adams-Bashforth weights of up to four eps on a DDIM step; the first step calls the model twice.
    """
    weights = jnp.array(  # of this eps and those before it, by how many there are
        [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0]]
        + [[55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    )

    def init(z):
        return jnp.zeros((3, *z.shape)), jnp.int32(0)

    def step(denoise, carry, z, t, t_next, noise):
        past, count = carry
        eps = denoise(z, t)
        known = jnp.concatenate([eps[None], past])

        def first():
            guess = _flow(schedule, z, eps, t, t_next)
            return (eps + denoise(guess, jnp.maximum(t_next, 0))) / 2

        def later():
            return jnp.tensordot(weights[jnp.minimum(count, 3)], known, axes=1)

        mean = jax.lax.cond(count == 0, first, later)
        return _flow(schedule, z, mean, t, t_next), (known[:3], count + 1)

    return Sampler(init, step)


def dpmpp_2m(schedule: Schedule) -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): order 2, one call of the model a step."""

    def step(denoise, carry, z, t, t_next, noise):
        x0 = to_x0("eps", denoise(z, t), z, *at(schedule, t, z.ndim))
        z = _to_data(schedule, z, _ahead(schedule, x0, carry, t, t_next), t, t_next)
        return z, (x0, _log_snr(schedule, t))

    return Sampler(_nothing_before, step)


def dpmpp_2m_sde(schedule: Schedule) -> Sampler:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5): DDPM with an extrapolated x0."""

    def step(denoise, carry, z, t, t_next, noise):
        x0 = to_x0("eps", denoise(z, t), z, *at(schedule, t, z.ndim))
        ahead = _ahead(schedule, x0, carry, t, t_next)
        mean, variance = posterior(schedule, ahead, z, t, t_next)
        return mean + jnp.sqrt(variance) * noise, (x0, _log_snr(schedule, t))

    return Sampler(_nothing_before, step)


def unipc(schedule: Schedule) -> Sampler:
    """UniPC-2 with B(h) = e^h - 1 (Zhao et al. 2023, algorithms 5 and 6): order 3, one call a step.

    The x0 found at t first corrects how z came there, then predicts: the predictor is
    DPM-Solver++(2M).
    """

    def init(z):
        nothing = _nothing_before(z)
        return jnp.zeros_like(z), jnp.int32(0), nothing, nothing

    def step(denoise, carry, z, t, t_next, noise):
        z_before, t_before, (x0_1, lambda_1), (x0_2, lambda_2) = carry
        x0, now = to_x0("eps", denoise(z, t), z, *at(schedule, t, z.ndim)), _log_snr(schedule, t)
        one = jnp.isfinite(lambda_1) & (now > lambda_1)  # is there one before? times may repeat
        two = jnp.isfinite(lambda_2) & (lambda_1 > lambda_2)
        h = jnp.where(one, now - lambda_1, 1.0)
        r = jnp.where(two, lambda_2 - lambda_1, -1.0) / h
        # eq. 9's coefficients for two x0 before; 1/2 for one
        phi_2 = jnp.expm1(-h) / -h - 1
        phi_3 = phi_2 / -h - 1 / 2
        b_1, b_2 = phi_2 / jnp.expm1(-h), 2 * phi_3 / jnp.expm1(-h)
        rho = jnp.where(two, (b_1 - b_2) / (1 - r), 0.0)
        weight = jnp.where(two, b_1 - rho, 0.5)
        mean = x0_1 + rho / r * (x0_2 - x0_1) + weight * (x0 - x0_1)
        z = jnp.where(one, _to_data(schedule, z_before, mean, t_before, t), z)
        ahead = _ahead(schedule, x0, (x0_1, lambda_1), t, t_next)
        carry = z, t, (x0, now), (x0_1, lambda_1)
        return _to_data(schedule, z, ahead, t, t_next), carry

    return Sampler(init, step)


def _flow(schedule: Schedule, z: Array, eps: Array, t: Array, t_next: Array) -> Array:
    """Along the probability flow from t to t_next, with one eps all the way."""
    alpha_next, sigma_next = at(schedule, t_next, z.ndim)
    x0 = to_x0("eps", eps, z, *at(schedule, t, z.ndim))
    return alpha_next * x0 + sigma_next * eps


def _to_data(schedule: Schedule, z: Array, x0: Array, t: Array, t_next: Array) -> Array:
    """The same with one x0 all the way."""
    alpha, sigma = at(schedule, t, z.ndim)
    alpha_next, sigma_next = at(schedule, t_next, z.ndim)
    return sigma_next / sigma * (z - alpha * x0) + alpha_next * x0


def _nothing_before(z: Array) -> tuple[Array, Array]:
    """The x0 before the first step, infinitely long ago: it does not count."""
    return jnp.zeros_like(z), jnp.float32(-jnp.inf)


def _ahead(schedule: Schedule, x0: Array, before: tuple, t: Array, t_next: Array) -> Array:
    """x0 half a step ahead in lambda, on the line through the one before it."""
    x0_before, lambda_before = before
    now = _log_snr(schedule, t)
    since = now - lambda_before
    usable = (t_next >= 0) & (since > 0)  # times may repeat
    step = jnp.where(usable, _log_snr(schedule, t_next) - now, 0.0)
    return x0 + step / jnp.where(usable, since, 1.0) / 2 * (x0 - x0_before)


def _log_snr(schedule: Schedule, t: Array) -> Array:
    """lambda = log(alpha / sigma)."""
    alpha, sigma = at(schedule, t)
    return jnp.log(alpha) - jnp.log(sigma)


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "plms": plms,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
}


def make_sampler(name: str, schedule: Schedule, **options: Any) -> Sampler:
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


def advance(
    sampler: Sampler,
    denoise: Denoise,
    state: tuple[Array, Carry, Array],
    schedule: Schedule,
    *,
    timesteps: tuple[Array, Array],
    noise: Callable[[Array], Array],
    first: Array | int,
    last: Array | int,
) -> tuple[Array, Carry, Array]:
    """Runs the steps `first` to `last` - 1 of `sample` alone, so that it can be stopped and seen.

    Args:
      sampler, denoise, timesteps, noise: as `sample` takes them; all may be traced, as may the
        ends, so that one program serves any number of steps.
      state: (z, carry, x0) before the first of them: at step 0 (z_T, sampler.init(z_T), anything).
      schedule: the sampler's.

    Returns:
      The same after the last of them; x0 [B,h,w,c] is what the last step took for clean.
    """
    t, t_next = map(jnp.asarray, timesteps)

    def body(i, state):
        z, carry, _ = state
        x0: list[Array] = []

        def watched(z_t, at_t):  # samplers first call the model where they are
            eps = denoise(z_t, at_t)
            if not x0:
                x0.append(to_x0("eps", eps, z_t, *at(schedule, at_t, z_t.ndim)))
            return eps

        z, carry = sampler.step(watched, carry, z, t[i], t_next[i], noise(i))
        return z, carry, x0[0]

    return jax.lax.fori_loop(first, last, body, state)


def image_keys(key: Array, indices: Array) -> Array:
    """One key per image from the seed's key and the images' numbers, int [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def image_noise(keys: Array, i: Array | int, shape: tuple[int, ...]) -> Array:
    """Standard normal noise [B, *shape] of step i for each image; i = -1 is z_T itself."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i + 1), shape))(keys)
