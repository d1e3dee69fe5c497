"""The loss of phase 2: predict the noise that was added to a latent.

Source: Rombach et al. 2022, eq. 2 (unconditional) and 3 (conditional); condition dropout: Ho &
Salimans 2021, algorithm 1, which the original code lacks and guidance needs. Off unless asked for,
as in the original code: the variational bound beside that loss (Ho et al. 2020, eq. 12), and a
log-variance of the error for each t.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.conditioning.cond import Cond
from latent_diffusion_jax.diffusion import prediction as predictions
from latent_diffusion_jax.diffusion.schedule import Schedule, add_noise, at
from latent_diffusion_jax.errors import UserError, choose

Array = jax.Array
Params = Any
Batch = dict[str, Array]
Metrics = dict[str, Array]
Loss = Callable[[Params, Params, Batch, Array, bool], tuple[Array, Metrics]]

LOSSES = {"l2": jnp.square, "l1": jnp.abs}
QUARTERS = 4


def make_loss(
    *,
    denoise_network: Callable[[Params, Array, Array, Cond, Array | None], Array],
    condition: Callable[[Params, Params, Batch], Cond],
    null: Callable[[Params, Params, Batch], Batch],
    keys: Sequence[str],
    latents: Callable[[Params, Batch, Array], Array],
    schedule: Schedule,
    prediction: str = "eps",
    loss: str = "l2",
    weighting: str = "uniform",
    min_snr_gamma: float = predictions.GAMMA,
    condition_dropout: float = 0.1,
    elbo_weight: float = 0.0,
    l_simple_weight: float = 1.0,
    logvar_init: float = 0.0,
    learn_logvar: bool = False,
) -> Loss:
    """Builds loss(params, frozen, batch, key, train) -> (scalar, metrics).

    It is l_simple_weight mean(L_t / exp(logvar_t) + logvar_t) + elbo_weight mean(L_vlb), where L_t
    is the error by `weighting`, and L_vlb the unweighted error by `variational_weights`.

    Args:
      denoise_network: (params, z_t [B,h,w,c], t int32 [B], cond, key) -> output [B,h,w,c]; the key
        is for dropout, None in evaluation.
      condition: (params, frozen, inputs) -> Cond, where inputs are the batch's `keys`.
      null: (params, frozen, inputs) -> inputs that mean "no condition".
      keys: the entries of a batch that the condition reads.
      latents: (frozen, batch, key) -> scaled latents [B,h,w,c].
      schedule: the forward process.
      prediction: what the output means, one of PREDICTIONS.
      loss: one of LOSSES.
      weighting: one of WEIGHTINGS.
      min_snr_gamma: the signal-to-noise ratio above which "min_snr" lets errors of x0 count alike;
        the lower, the more a short training is about what is where, not about details.
      condition_dropout: how often an example loses its condition in training, from 0 to 1.
      elbo_weight: of L_vlb, at least 0.
      l_simple_weight: of the rest, at least 0.
      logvar_init: logvar_t, or where it starts.
      learn_logvar: train logvar_t, which the params then hold (`init_logvar`).

    Returns:
      The loss. Its params hold "unet" and what `condition` reads, such as "conditioning", and
      "logvar" if that is learned; with train=False no condition is dropped.

    Raises:
      UserError: an unknown name or a value out of range.
    """
    choose("prediction", prediction, predictions.PREDICTIONS)
    choose("weighting", weighting, predictions.WEIGHTINGS)
    choose("loss", loss, LOSSES)
    if loss == "l1" and weighting != "uniform":
        raise UserError(f"weighting {weighting!r} is defined for squared errors; use loss l2")
    if min_snr_gamma <= 0:
        raise UserError(f"min_snr_gamma {min_snr_gamma} must be above 0")
    if not 0 <= condition_dropout <= 1:
        raise UserError(f"condition_dropout {condition_dropout}; choose from 0 to 1")
    if elbo_weight < 0 or l_simple_weight < 0:
        raise UserError(
            f"elbo_weight {elbo_weight}, l_simple_weight {l_simple_weight}; choose from 0"
        )
    of_bound = jnp.asarray(variational_weights(schedule, prediction)) if elbo_weight else None

    def loss_function(params, frozen, batch, key, train):
        z_key, t_key, eps_key, drop_key, network_key = jax.random.split(key, 5)
        z = latents(frozen, batch, z_key).astype(jnp.float32)
        t, eps = draw(t_key, eps_key, z.shape, len(schedule.alpha))
        inputs = {name: batch[name] for name in keys}
        if train and condition_dropout:
            nothing = null(params, frozen, inputs)
            inputs = drop_condition(drop_key, inputs, nothing, condition_dropout)
        cond = condition(params, frozen, inputs)
        errors = example_errors(
            lambda z_t, t: denoise_network(
                params["unet"], z_t, t, cond, network_key if train else None
            ),
            schedule,
            z,
            t,
            eps,
            prediction=prediction,
            loss=loss,
        )
        levels = at(schedule, t)
        simple = predictions.loss_weight(weighting, prediction, *levels, min_snr_gamma) * errors
        table = params["logvar"]["table"]["bias"] if learn_logvar else None
        logvar = logvar_init if table is None else table[t]
        losses = l_simple_weight * (simple / jnp.exp(logvar) + logvar)
        terms: Metrics = {}
        if of_bound is not None:
            vlb = of_bound[t] * errors
            losses += elbo_weight * vlb
            terms |= {"loss_simple": simple.mean(), "loss_vlb": vlb.mean()}
        if table is not None:
            terms |= {"loss_simple": simple.mean(), "logvar": table.mean()}
        return losses.mean(), loss_metrics(losses, t, len(schedule.alpha)) | terms

    return loss_function


def draw(
    t_key: Array, eps_key: Array, shape: tuple[int, ...], timesteps: int
) -> tuple[Array, Array]:
    """Times int32 [B], uniform in 0 .. timesteps - 1, and normal noise of `shape` [B, ...]."""
    t = jax.random.randint(t_key, shape[:1], 0, timesteps)
    return t, jax.random.normal(eps_key, shape)


def example_errors(
    network: Callable[[Array, Array], Array],
    schedule: Schedule,
    z: Array,
    t: Array,
    eps: Array,
    *,
    prediction: str,
    loss: str,
) -> Array:
    """The error of the network's own target per example, [B] float32, without any weight."""
    z_t = add_noise(schedule, z, t, eps)
    target = predictions.target(prediction, z, eps, *at(schedule, t, z.ndim))
    error = LOSSES[loss](network(z_t, t).astype(jnp.float32) - target)
    return error.mean(axis=tuple(range(1, error.ndim)))


def variational_weights(schedule: Schedule, prediction: str) -> np.ndarray:
    """The factors, float32 [T], that make squared errors the terms of the variational bound.

    Of eps, and of v = alpha eps - sigma z by the same bound: Ho et al. 2020, eq. 12, with the
    posterior's variance. It is infinite at t = 0, which takes the factor of t = 1, as published.
    Of x0: as published, 0.5 alpha / (2 - alpha^2), which the bound does not give.

    Raises:
      UserError: an unknown prediction.
    """
    alpha = np.asarray(schedule.alpha, np.float64)
    sigma = np.asarray(schedule.sigma, np.float64)
    snr = (alpha / sigma) ** 2
    alpha = alpha[1:]
    of_eps = 0.5 * (snr[:-1] / snr[1:] - 1)  # = beta^2 / (2 variance (1 - beta) sigma^2)
    of_x0 = 0.5 * alpha / (2 - alpha**2)
    factors = {"eps": of_eps, "x0": of_x0, "v": alpha**2 * of_eps}
    found = choose("prediction", prediction, factors)
    return np.concatenate([found[:1], found]).astype(np.float32)


def init_logvar(schedule: Schedule, start: float) -> Params:
    """The parameters "logvar" of `make_loss(learn_logvar=True)`: a number for each t.

    They are trained along and no image is made with them. A tree like those of the networks:
    modules, and their parameters by name.
    """
    return {"table": {"bias": jnp.full(schedule.alpha.shape, start, jnp.float32)}}


def prior_bits_per_dim(schedule: Schedule, z: Array) -> Array:
    """KL(q(z_T | z) || N(0, I)), the bound's last term, [B] in bits per dimension of z [B, ...]."""
    power = schedule.alpha[-1] ** 2
    # log1p: power is about 1e-4 and the mean of the terms 1e-8
    nats = 0.5 * (power * (z**2 - 1) - jnp.log1p(-power))
    return nats.mean(axis=tuple(range(1, z.ndim))) / jnp.log(2.0)


def drop_condition(key: Array, inputs: Batch, null: Batch, rate: float) -> Batch:
    """Replaces each example's inputs, all of them together, by the null ones with this rate."""

    def drop(null_value, value):
        rows = dropped.reshape((-1,) + (1,) * (value.ndim - 1))
        return jnp.where(rows, null_value, value)

    if not inputs:
        return inputs
    size = len(next(iter(inputs.values())))
    dropped = jax.random.bernoulli(key, rate, (size,))
    return jax.tree.map(drop, null, inputs)


def loss_metrics(losses: Array, t: Array, timesteps: int) -> Metrics:
    """The mean loss, and by quarter of t: they differ a hundredfold and hide each other's changes.

    A quarter without examples shows the mean loss, so that averages over steps stay finite.
    """
    loss = losses.mean()
    member = (t * QUARTERS // timesteps)[None] == jnp.arange(QUARTERS)[:, None]
    count = member.sum(axis=1)
    mean = jnp.where(member, losses[None], 0).sum(axis=1) / jnp.maximum(count, 1)
    mean = jnp.where(count > 0, mean, loss)
    return {"loss": loss} | {f"loss_t{quarter}": mean[quarter] for quarter in range(QUARTERS)}
