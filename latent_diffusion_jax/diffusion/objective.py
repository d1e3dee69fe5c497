"""The loss of phase 2: predict the noise that was added to a latent.

Source: Rombach et al. 2022, eq. 2 (unconditional) and 3 (conditional); condition dropout: Ho &
Salimans 2021, algorithm 1, which the original code lacks and guidance needs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

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
    null: Callable[[Batch], Batch],
    keys: Sequence[str],
    latents: Callable[[Params, Batch, Array], Array],
    schedule: Schedule,
    prediction: str = "eps",
    loss: str = "l2",
    weighting: str = "uniform",
    condition_dropout: float = 0.1,
) -> Loss:
    """Builds loss(params, frozen, batch, key, train) -> (scalar, metrics).

    Args:
      denoise_network: (params, z_t [B,h,w,c], t int32 [B], cond, key) -> output [B,h,w,c]; the key
        is for dropout, None in evaluation.
      condition: (params, frozen, inputs) -> Cond, where inputs are the batch's `keys`.
      null: inputs -> inputs that mean "no condition".
      keys: the entries of a batch that the condition reads.
      latents: (frozen, batch, key) -> scaled latents [B,h,w,c].
      schedule: the forward process.
      prediction: what the output means, one of PREDICTIONS.
      loss: one of LOSSES.
      weighting: one of WEIGHTINGS.
      condition_dropout: how often an example loses its condition in training, from 0 to 1.

    Returns:
      The loss. Its params hold "unet" and what `condition` reads, such as "conditioning"; with
      train=False no condition is dropped.

    Raises:
      UserError: an unknown name or a value out of range.
    """
    choose("prediction", prediction, predictions.PREDICTIONS)
    choose("weighting", weighting, predictions.WEIGHTINGS)
    choose("loss", loss, LOSSES)
    if loss == "l1" and weighting != "uniform":
        raise UserError(f"weighting {weighting!r} is defined for squared errors; use loss l2")
    if not 0 <= condition_dropout <= 1:
        raise UserError(f"condition_dropout {condition_dropout}; choose from 0 to 1")

    def loss_function(params, frozen, batch, key, train):
        z_key, t_key, eps_key, drop_key, network_key = jax.random.split(key, 5)
        z = latents(frozen, batch, z_key).astype(jnp.float32)
        t = jax.random.randint(t_key, z.shape[:1], 0, len(schedule.alpha))
        eps = jax.random.normal(eps_key, z.shape)
        inputs = {name: batch[name] for name in keys}
        if train and condition_dropout:
            inputs = drop_condition(drop_key, inputs, null(inputs), condition_dropout)
        cond = condition(params, frozen, inputs)
        losses = example_losses(
            lambda z_t, t: denoise_network(
                params["unet"], z_t, t, cond, network_key if train else None
            ),
            schedule,
            z,
            t,
            eps,
            prediction=prediction,
            loss=loss,
            weighting=weighting,
        )
        return losses.mean(), loss_metrics(losses, t, len(schedule.alpha))

    return loss_function


def example_losses(
    network: Callable[[Array, Array], Array],
    schedule: Schedule,
    z: Array,
    t: Array,
    eps: Array,
    *,
    prediction: str,
    loss: str,
    weighting: str,
) -> Array:
    """The weighted error per example, [B] float32: the loss without its random draws."""
    z_t = add_noise(schedule, z, t, eps)
    target = predictions.target(prediction, z, eps, *at(schedule, t, z.ndim))
    error = LOSSES[loss](network(z_t, t).astype(jnp.float32) - target)
    weight = predictions.loss_weight(weighting, prediction, *at(schedule, t))
    return weight * error.mean(axis=tuple(range(1, error.ndim)))


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
