"""Optimisers and learning-rate schedules of the original.

Sources: PyTorch's `AdamW` and `Adam` (every parameter decays, norms and biases too, as in the
original's runs); the original's `LambdaLinearScheduler` and `LambdaWarmUpCosineScheduler`, whose
values multiply the base rate. One departure: a single cycle, which is all that its configs use.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from latent_diffusion_jax.errors import UserError, choose

Schedule = Callable[[jax.Array], jax.Array]  # step, int32 [] -> float32 []
Optimizer = Callable[[Schedule], optax.GradientTransformation]  # of the learning rate


def constant() -> Schedule:
    """Always 1."""
    return lambda step: jnp.ones((), jnp.float32)


def warmup_linear(
    *, warm_up_steps: int, f_start: float, f_max: float, f_min: float, cycle_length: float
) -> Schedule:
    """From `f_start` to `f_max` in `warm_up_steps`, then on the line from `f_max` at 0 to `f_min`.

    The line is drawn from step 0, not from the end of the warm-up, as in the original. It ends at
    `cycle_length`; `inf` keeps `f_max` for ever.
    """

    def schedule(step: jax.Array) -> jax.Array:
        n = jnp.asarray(step, jnp.float32)
        rising = f_start + (f_max - f_start) * n / max(warm_up_steps, 1)
        falling = f_min + (f_max - f_min) * jnp.maximum(1 - n / cycle_length, 0)
        return jnp.where(n < warm_up_steps, rising, falling)

    return schedule


def warmup_cosine(
    *, warm_up_steps: int, lr_start: float, lr_max: float, lr_min: float, max_decay_steps: int
) -> Schedule:
    """From `lr_start` to `lr_max` in `warm_up_steps`, then half a cosine to `lr_min`."""

    def schedule(step: jax.Array) -> jax.Array:
        n = jnp.asarray(step, jnp.float32)
        rising = lr_start + (lr_max - lr_start) * n / max(warm_up_steps, 1)
        done = jnp.minimum((n - warm_up_steps) / max(max_decay_steps - warm_up_steps, 1), 1)
        falling = lr_min + 0.5 * (lr_max - lr_min) * (1 + jnp.cos(math.pi * done))
        return jnp.where(n < warm_up_steps, rising, falling)

    return schedule


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "warmup_linear": warmup_linear,
    "warmup_cosine": warmup_cosine,
}


def adam(*, b1: float, b2: float, eps: float, mu_dtype: str | None = None) -> Optimizer:
    """PyTorch's; `mu_dtype`, of the first moment: "bfloat16" halves its memory."""
    return functools.partial(optax.adam, b1=b1, b2=b2, eps=eps, mu_dtype=_float(mu_dtype))


def adamw(
    *, b1: float, b2: float, eps: float, weight_decay: float, mu_dtype: str | None = None
) -> Optimizer:
    """The same with decoupled weight decay (PyTorch's default: 0.01)."""
    options = dict(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=_float(mu_dtype))
    return functools.partial(optax.adamw, **options)


def adafactor(*, weight_decay: float | None = None) -> Optimizer:
    """Shazeer and Stern 2018: sums over rows and columns in place of Adam's two moments.

    Updates are clipped to a root mean square of 1 and not scaled by the parameters.
    """
    return functools.partial(
        optax.adafactor, multiply_by_parameter_scale=False, weight_decay_rate=weight_decay
    )


def _float(name: str | None) -> Any:
    names = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    return None if name is None else choose("mu_dtype", name, names)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": adam,
    "adamw": adamw,
    "adafactor": adafactor,
}


def make_lr_schedule(*, name: str, **options: Any) -> Schedule:
    """Makes the multiplier of the base learning rate; `options` are those of the named function.

    Raises:
      UserError: unknown `name`.
    """
    return choose("learning-rate schedule", name, SCHEDULES)(**options)


def make_optimizer(
    *,
    name: str,
    lr: float,
    schedule: Mapping[str, Any],
    clip_norm: float,
    **options: Any,
) -> tuple[optax.GradientTransformation, Schedule]:
    """Makes the optimiser and its learning rate as a function of the step.

    `options` are those of the named function. `clip_norm` bounds the norm of all gradients
    together; 0 leaves them alone.

    Raises:
      UserError: unknown names; a negative `clip_norm`.
    """
    optimizer = choose("optimizer", name, OPTIMIZERS)(**options)
    multiplier = make_lr_schedule(**schedule)

    def lr_at(step: jax.Array) -> jax.Array:
        return lr * multiplier(step)

    if clip_norm < 0:
        raise UserError(f"clip_norm={clip_norm} is negative; 0 turns clipping off")
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return optax.chain(*clip, optimizer(lr_at)), lr_at
