"""A phase of training as three pure functions, and the one way to make them from a loss.

`accumulate_gradients` and `keep_if_finite` also serve phases with several optimisers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.state import (
    Params,
    TrainState,
    init_ema,
    sampling_params,
    update_ema,
)

Metrics = dict[str, jax.Array]  # float32 []
Batch = Mapping[str, jax.Array]  # [B, ...]
Loss = Callable[[Params, Any, Batch, jax.Array, bool], tuple[jax.Array, Metrics]]


class Objective(NamedTuple):
    """What a phase optimises; `key` is the run's: the step folds its own number in.

    The metrics of `train_step` hold `finite`, 0 where the update was not applied.
    """

    init: Callable[[jax.Array], TrainState]  # (key)
    start: Callable[..., TrainState]  # (params, ema): step 0 of a training from weights
    train_step: Callable[..., tuple[TrainState, Metrics]]  # (state, frozen, batch, key)
    eval_step: Callable[..., Metrics]  # (state, frozen, batch, key)


def accumulate_gradients(
    loss: Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]],
    params: Any,
    batch: Batch,
    key: jax.Array,
    accumulate: int,
) -> tuple[Any, jax.Array, Metrics]:
    """Gradients, loss and metrics of `loss(params, batch, key)`, means over micro-batches.

    Row i of the batch belongs to micro-batch i mod `accumulate`, so that every device keeps the
    rows it holds: splitting into consecutive blocks would move nearly all of them.

    Raises:
      UserError: the batch does not divide.
    """
    grad = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        (value, metrics), gradients = grad(params, batch, key)
        return gradients, value, metrics

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % accumulate:
            raise UserError(
                f"batch of {x.shape[0]} does not divide into accumulate={accumulate} parts"
            )
        return jnp.moveaxis(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 1, 0)

    def add(total: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        i, micro_batch = part
        return jax.tree.map(
            jnp.add, total, grad(params, micro_batch, jax.random.fold_in(key, i))
        ), None

    parts = (jnp.arange(accumulate), jax.tree.map(split, batch))
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts[1]), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, parts)
    (value, metrics), gradients = jax.tree.map(lambda x: x / accumulate, total)
    return gradients, value, metrics


def keep_if_finite(finite: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `finite` (bool []), else `old`: a bad step never enters the state."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def make_objective(
    *,
    init_params: Callable[[jax.Array], Params],
    loss: Loss,
    tx: optax.GradientTransformation,
    lr_at: Callable[[jax.Array], jax.Array] | None = None,
    accumulate: int = 1,
    ema_decay: float = 0.9999,
    ema_networks: Sequence[str] = (),
) -> Objective:
    """Makes the objective of a phase with one optimiser.

    `loss(params, frozen, batch, key, train)` returns a scalar and scalar metrics. To those the
    step adds loss, grad_norm (before clipping), finite and, with `lr_at(step)`, lr. Evaluation
    uses the averaged weights where there are some.

    Raises:
      UserError: from `init`, an `ema_networks` name that is not trained; from the step, a batch
        that does not divide by `accumulate`.
    """

    def start(params: Params, ema: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema)

    def init(key: jax.Array) -> TrainState:
        params = init_params(key)
        return start(params, init_ema(params, ema_networks))

    def train_step(
        state: TrainState, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        gradients, value, metrics = accumulate_gradients(
            lambda params, part, key: loss(params, frozen, part, key, True),
            state.params,
            batch,
            jax.random.fold_in(key, state.step),
            accumulate,
        )
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, state.step + 1, ema_decay)
        new = keep_if_finite(
            finite,
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        metrics = {
            **metrics,
            "loss": value,
            "grad_norm": grad_norm,
            "finite": finite.astype(jnp.float32),
        }
        if lr_at is not None:
            metrics["lr"] = lr_at(state.step)
        return TrainState(state.step + 1, *new), metrics

    def eval_step(state: TrainState, frozen: Any, batch: Batch, key: jax.Array) -> Metrics:
        value, metrics = loss(sampling_params(state), frozen, batch, key, False)
        return {**metrics, "loss": value}

    return Objective(init, start, train_step, eval_step)
