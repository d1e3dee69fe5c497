"""The forward process q(z_t | z) = N(alpha_t z, sigma_t^2 I) and the times that a sampler visits.

Source: Rombach et al. 2022, section 3.2 and appendix B; Ho et al. 2020, eq. 4, 6 and 7. With the
betas of DDPM, alpha_t^2 = prod_{s <= t} (1 - beta_s) and sigma_t^2 = 1 - alpha_t^2. t counts
0 .. T-1 as in the published checkpoints: t = 0 is already a little noisy, t = -1 is clean.
Departure: "uniform" takes exactly the number of steps asked for, where the published table takes
ceil(T / (T // steps)) of them or runs over the end. "original" is the published table.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from latent_diffusion_jax.errors import UserError, choose

Array = jax.Array

LAST_ALPHA = 2.0**-12  # stands for 0: an SNR of 2^-24, the rounding of float32


@struct.dataclass
class Schedule:
    """Signal and noise levels, [T] float32 each, alpha_t^2 + sigma_t^2 = 1."""

    alpha: Array
    sigma: Array


def make_schedule(
    *, name: str, timesteps: int = 1000, zero_terminal_snr: bool = False, **options: float
) -> Schedule:
    """Builds a schedule; see `make_betas`, which raises for it."""
    betas = make_betas(
        name=name, timesteps=timesteps, zero_terminal_snr=zero_terminal_snr, **options
    )
    alphas_cumprod = np.cumprod(1 - betas)  # in float64: 1 - alphas_cumprod cancels at small t
    return Schedule(
        alpha=jnp.asarray(np.sqrt(alphas_cumprod), jnp.float32),
        sigma=jnp.asarray(np.sqrt(1 - alphas_cumprod), jnp.float32),
    )


def make_betas(
    *, name: str, timesteps: int = 1000, zero_terminal_snr: bool = False, **options: float
) -> np.ndarray:
    """The variances beta_t, float64 [T].

    Args:
      name: one of SCHEDULES; `options` are its own.
      timesteps: T.
      zero_terminal_snr: whether the last z_t is all noise, which sampling takes it to be: images
        otherwise keep to a medium brightness (Lin et al. 2024). The last alpha is not 0 but at
        most LAST_ALPHA, so that x0 still follows from eps. For v and x0 models (eps is z_t there
        and teaches nothing) and timesteps that visit it, "trailing" and "karras".

    Raises:
      UserError: an unknown name or option, too few timesteps, or a beta outside (0, 1).
    """
    function = choose("schedule", name, SCHEDULES)
    least = 2 if zero_terminal_snr else 1
    if timesteps < least:
        raise UserError(f"a schedule of {timesteps} timesteps; it needs at least {least}")
    try:
        betas = function(timesteps, **options)
    except TypeError as error:
        raise UserError(f"schedule {name!r}: {error}") from error
    if not np.all((betas > 0) & (betas < 1)):
        raise UserError(f"schedule {name!r} with {options} has betas outside (0, 1)")
    return _to_zero_snr(betas) if zero_terminal_snr else betas


def _to_zero_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts and scales alpha: the first stays, the last is 0 (Lin et al. 2024, algorithm 1)."""
    alpha = np.sqrt(np.cumprod(1 - betas))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha[-1] = min(LAST_ALPHA, alpha[-2] / 2)  # where it was nearly 0 before: still noisier
    return 1 - (alpha / np.append(1.0, alpha[:-1])) ** 2


def _linear(timesteps: int, *, linear_start: float, linear_end: float) -> np.ndarray:
    """The published one: linear in sqrt(beta), whatever its name says."""
    return _sqrt_linear(timesteps, linear_start=linear_start**0.5, linear_end=linear_end**0.5) ** 2


def _sqrt_linear(timesteps: int, *, linear_start: float, linear_end: float) -> np.ndarray:
    """Linear in beta; the names are the published ones, kept although they look swapped."""
    return np.linspace(linear_start, linear_end, timesteps, dtype=np.float64)


def _sqrt(timesteps: int, *, linear_start: float, linear_end: float) -> np.ndarray:
    return _sqrt_linear(timesteps, linear_start=linear_start, linear_end=linear_end) ** 0.5


def _cosine(timesteps: int, *, cosine_s: float = 8e-3) -> np.ndarray:
    """Nichol & Dhariwal 2021, eq. 17, betas clipped at 0.999."""
    time = np.arange(timesteps + 1, dtype=np.float64) / timesteps
    alphas_cumprod = np.cos((time + cosine_s) / (1 + cosine_s) * np.pi / 2) ** 2
    return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)


SCHEDULES: dict[str, Callable[..., np.ndarray]] = {
    "linear": _linear,
    "sqrt_linear": _sqrt_linear,
    "sqrt": _sqrt,
    "cosine": _cosine,
}


def at(schedule: Schedule, t: Array | int, ndim: int | None = None) -> tuple[Array, Array]:
    """alpha_t and sigma_t; t = -1 is clean data (1 and 0).

    Args:
      schedule: the forward process.
      t: int32, [] or [B], from -1 to T-1.
      ndim: the number of axes of the arrays that the result multiplies; default: shaped like t.

    Returns:
      Two float32 arrays shaped like t, or [B, 1, ..., 1] with `ndim` axes where t is [B].
    """
    t = jnp.asarray(t)
    if t.ndim and ndim is not None:
        t = t.reshape(t.shape + (1,) * (ndim - t.ndim))
    index, clean = jnp.maximum(t, 0), t < 0  # index -1 would silently be the noisiest
    alpha = jnp.where(clean, 1.0, schedule.alpha[index])
    return alpha, jnp.where(clean, 0.0, schedule.sigma[index])


def add_noise(schedule: Schedule, z: Array, t: Array, eps: Array) -> Array:
    """z_t = alpha_t z + sigma_t eps  (Ho et al., eq. 4); z, eps [B, ...], t [] or [B]."""
    alpha, sigma = at(schedule, t, z.ndim)
    return alpha * z + sigma * eps


def fresh_fraction(schedule: Schedule, t: Array, t_next: Array, ndim: int | None = None) -> Array:
    """1 - SNR_t / SNR_t_next in [0, 1]: the part of z_t_next's noise that z_t and z leave open."""
    return jnp.maximum(1 - _noise_overlap(schedule, t, t_next, ndim) ** 2, 0)  # 0 at t == t_next


def _noise_overlap(schedule: Schedule, t: Array, t_next: Array, ndim: int | None) -> Array:
    """sqrt(SNR_t / SNR_t_next): the correlation of z_t's and z_t_next's noise, given z."""
    alpha, sigma = at(schedule, t, ndim)
    alpha_next, sigma_next = at(schedule, t_next, ndim)
    return alpha * sigma_next / (alpha_next * sigma)


def posterior(
    schedule: Schedule, z: Array, z_t: Array, t: Array, t_next: Array
) -> tuple[Array, Array]:
    """Mean and variance of q(z_t_next | z_t, z) for any t_next < t  (Ho et al., eq. 6 and 7).

    Args:
      schedule: the forward process.
      z: clean latents [B, ...], or a prediction of them.
      z_t: noisy latents [B, ...].
      t: int32, [] or [B], from 0.
      t_next: like t, from -1; t - 1 in the paper.

    Returns:
      The mean [B, ...] and the variance, which broadcasts against it.
    """
    _, sigma = at(schedule, t, z.ndim)
    alpha_next, sigma_next = at(schedule, t_next, z.ndim)
    fresh = fresh_fraction(schedule, t, t_next, z.ndim)
    overlap = _noise_overlap(schedule, t, t_next, z.ndim)
    mean = alpha_next * fresh * z + overlap * sigma_next / sigma * z_t
    return mean, sigma_next**2 * fresh


def make_timesteps(name: str, steps: int, schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """The times that a sampler visits, noisiest first.

    Args:
      name: one of TIMESTEPS.
      steps: how many; only the published tables may return another number.
      schedule: of T times.

    Returns:
      t and t_next, int32 [steps]: step i goes from t[i] to t_next[i]. t_next[i] is t[i + 1]; the
      last one is 0 in the published tables (which leave sigma_0 in the result) and -1 otherwise.

    Raises:
      UserError: an unknown name, steps outside 1 .. T, or a published table that leaves 0 .. T-1.
    """
    make_table = choose("timesteps", name, TIMESTEPS)
    timesteps = len(schedule.alpha)
    if not 1 <= steps <= timesteps:
        raise UserError(f"{steps} sampling steps; choose from 1 to {timesteps}")
    t, last = make_table(steps, schedule)
    if t.max() >= timesteps:
        raise UserError(
            f"the published table {name!r} reaches t = {t.max()} of {timesteps} with {steps} "
            "steps; choose other steps, or timesteps uniform"
        )
    t_next = np.append(t[1:], last)
    return t.astype(np.int32), t_next.astype(np.int32)


def _uniform(steps: int, schedule: Schedule) -> tuple[np.ndarray, int]:
    timesteps = len(schedule.alpha)
    shift = int(steps < timesteps)  # the published shift by one; the full grid has no room for it
    return (np.arange(steps) * timesteps // steps + shift)[::-1], shift - 1


def _trailing(steps: int, schedule: Schedule) -> tuple[np.ndarray, int]:
    """From T-1 itself: Lin et al. 2024, section 3.3 and table 2."""
    timesteps = len(schedule.alpha)
    return np.round(timesteps - np.arange(steps) * timesteps / steps).astype(int) - 1, -1


def _quad(steps: int, schedule: Schedule) -> tuple[np.ndarray, int]:
    """Dense where there is little noise; as "original_quad", with as many steps as asked for."""
    last = 0.8 * len(schedule.alpha)
    times = np.round(np.linspace(0, np.sqrt(last), steps) ** 2).astype(int)
    return _distinct(times, len(schedule.alpha))[::-1], -1


def _karras(steps: int, schedule: Schedule) -> tuple[np.ndarray, int]:
    """The times of noise levels by Karras et al. 2022, eq. 5, rho = 7, from T-1 down to 0."""
    rho = 7
    noise = np.asarray(schedule.sigma, np.float64) / np.asarray(schedule.alpha, np.float64)
    ends = noise[0] ** (1 / rho), noise[-1] ** (1 / rho)
    wanted = np.linspace(*ends, steps) ** rho if steps > 1 else noise[-1:]
    # the nearest in log noise, which grows with t
    times = np.interp(np.log(wanted), np.log(noise), np.arange(len(noise)))
    return _distinct(np.round(times).astype(int), len(noise))[::-1], -1


def _distinct(times: np.ndarray, timesteps: int) -> np.ndarray:
    """Ascending times, moved up, then down, as little as makes them distinct and below T."""
    order = np.arange(len(times))
    times = np.maximum.accumulate(times - order) + order
    return np.minimum(times, timesteps - len(times) + order)


def _original(steps: int, schedule: Schedule) -> tuple[np.ndarray, int]:
    timesteps = len(schedule.alpha)
    return (np.arange(0, timesteps, timesteps // steps) + 1)[::-1], 0


def _original_quad(steps: int, schedule: Schedule) -> tuple[np.ndarray, int]:
    """Quadratic spacing; many steps repeat the smallest times, where a step changes nothing."""
    last = 0.8 * len(schedule.alpha)
    return ((np.linspace(0, np.sqrt(last), steps) ** 2).astype(int) + 1)[::-1], 0


TIMESTEPS: dict[str, Callable[[int, Schedule], tuple[np.ndarray, int]]] = {
    "uniform": _uniform,
    "trailing": _trailing,
    "quad": _quad,
    "karras": _karras,
    "original": _original,
    "original_quad": _original_quad,
}
