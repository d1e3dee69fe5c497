"""A phase of training as pure functions, and the one way to make them from its gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.state import (
    Params,
    TrainState,
    ema_decay_at,
    init_ema,
    power_exponent,
    power_rate_at,
    sampling_params,
    update_ema,
)

Metrics = dict[str, jax.Array]  # float32 [], or [n]: one number per channel
Batch = Mapping[str, jax.Array]  # [B, ...]
Loss = Callable[[Params, Any, Batch, jax.Array, bool], tuple[jax.Array, Metrics]]


class Objective(NamedTuple):
    """What a phase optimises; `key` is the run's: the step folds its own number in.

    The metrics of `train_step` hold `finite`, 0 where the update was not applied.
    """

    init: Callable[[jax.Array], TrainState]  # (key)
    start: Callable[..., TrainState]  # (params, ema, key): step 0 of a training from weights
    train_step: Callable[..., tuple[TrainState, Metrics]]  # (state, frozen, batch, key)
    eval_step: Callable[..., Metrics]  # (state, frozen, batch, key)


class Criterion(NamedTuple):
    """What a phase minimises.

    gradients: functions (params, buffers, frozen, batch, key, step) -> (buffers, gradients,
      metrics), gradients of some networks, by name. They take turns within a step: the second sees
      what the first one's gradients made of the parameters.
    evaluate: (params, buffers, frozen, batch, key) -> metrics.
    init_buffers: what networks carry from step to step without gradients.
    revise: (params, buffers) -> (params, buffers), at the end of a step.
    """

    gradients: Sequence[Callable[..., tuple[Params, Params, Metrics]]]
    evaluate: Callable[..., Metrics]
    init_buffers: Callable[[], Params] = dict
    revise: Callable[[Params, Params], tuple[Params, Params]] = lambda *both: both


def from_loss(loss: Loss) -> Criterion:
    """The criterion of `loss(params, frozen, batch, key, train)` -> a scalar and metrics."""

    def gradients(params, buffers, frozen, batch, key, step):
        del step
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), found = grad(params, frozen, batch, key, True)
        return buffers, found, {**metrics, "loss": value}

    def evaluate(params, buffers, frozen, batch, key):
        value, metrics = loss(params, frozen, batch, key, False)
        return {**metrics, "loss": value}

    return Criterion([gradients], evaluate)


def accumulate_gradients(
    gradients: Callable[[Params, Batch, jax.Array], tuple[Params, Params, Metrics]],
    buffers: Params,
    batch: Batch,
    key: jax.Array,
    accumulate: int,
) -> tuple[Params, Params, Metrics]:
    """Means of `gradients(buffers, batch, key)` and its metrics over micro-batches.

    Row i of the batch belongs to micro-batch i mod `accumulate`, so that every device keeps the
    rows it holds: splitting into consecutive blocks would move nearly all of them. Buffers go from
    one micro-batch to the next.

    Raises:
      UserError: the batch does not divide.
    """
    if accumulate == 1:
        return gradients(buffers, batch, key)

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % accumulate:
            raise UserError(
                f"batch of {x.shape[0]} does not divide into accumulate={accumulate} parts"
            )
        return jnp.moveaxis(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 1, 0)

    def add(carry: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        (buffers, *total), (i, micro_batch) = carry, part
        buffers, *found = gradients(buffers, micro_batch, jax.random.fold_in(key, i))
        return (buffers, *jax.tree.map(jnp.add, total, found)), None

    parts = (jnp.arange(accumulate), jax.tree.map(split, batch))
    first = jax.tree.map(lambda x: x[0], parts[1])
    _, *shapes = jax.eval_shape(gradients, buffers, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (buffers, *total), _ = jax.lax.scan(add, (buffers, *zeros), parts)
    found, metrics = jax.tree.map(lambda x: x / accumulate, total)
    return buffers, found, metrics


def keep_if_finite(finite: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `finite` (bool []), else `old`: a bad step never enters the state."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def make_objective(
    *,
    init_params: Callable[[jax.Array], Params],
    criterion: Criterion,
    optimizers: Mapping[str, optax.GradientTransformation],
    lr_at: Callable[[jax.Array], jax.Array] | None = None,
    accumulate: int = 1,
    ema_decay: float = 0.9999,
    ema_networks: Sequence[str] = (),
    ema_lengths: Sequence[float] = (),
) -> Objective:
    """Makes the objective of a phase.

    With `ema_lengths` averages have power-function profiles of these lengths (`averages.py`), the
    first of which is what evaluation uses, and `ema_decay` has no say.

    `optimizers` has one for each network. To the criterion's metrics, which hold loss, the step
    adds grad_norm_NAME of each network (before clipping), finite and, with `lr_at(step)`, lr.
    Evaluation uses the averaged weights where there are some.

    Raises:
      UserError: a length that no profile has, or is there twice; from `init`, an `ema_networks`
        name that is not trained; from the step, a batch that does not divide by `accumulate`.
    """
    gammas = [power_exponent(length) for length in ema_lengths]
    if len(set(gammas)) < len(gammas):
        raise UserError(f"ema_lengths {tuple(ema_lengths)} must differ")
    if gammas and not ema_networks:
        raise UserError("ema_lengths need networks to average: set ema_networks")

    def rates(n: jax.Array) -> list[jax.Array]:
        if not gammas:
            return [1 - ema_decay_at(n, ema_decay)]
        return [power_rate_at(n, gamma) for gamma in gammas]

    def start(params: Params, ema: Params, key: jax.Array) -> TrainState:
        if params.keys() != optimizers.keys():  # a discriminator does not come with weights
            params = {**init_params(key), **params}
        opt_state = {name: optimizers[name].init(tree) for name, tree in params.items()}
        return TrainState(
            jnp.zeros((), jnp.int32),
            params,
            opt_state,
            ema,
            criterion.init_buffers(),
            averages=(ema,) * len(gammas[1:]),
        )

    def init(key: jax.Array) -> TrainState:
        params = init_params(key)
        return start(params, init_ema(params, ema_networks), key)

    def train_step(
        state: TrainState, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        params, opt_state, buffers = dict(state.params), dict(state.opt_state), state.buffers
        metrics: Metrics = {}

        def turn(gradients, params, buffers):
            def of_part(buffers, part, key):
                return gradients(params, buffers, frozen, part, key, state.step)

            return accumulate_gradients(of_part, buffers, batch, key, accumulate)

        for gradients in criterion.gradients:
            buffers, found, seen = turn(gradients, params, buffers)
            metrics |= seen
            for name, gradient in found.items():
                metrics[f"grad_norm_{name}"] = optax.tree.norm(gradient)
                updates, opt_state[name] = optimizers[name].update(
                    gradient, opt_state[name], params[name]
                )
                params[name] = optax.apply_updates(params[name], updates)
        params, buffers = criterion.revise(params, buffers)
        norms = [value for name, value in metrics.items() if name.startswith("grad_norm_")]
        finite = jnp.all(jnp.isfinite(jnp.stack([metrics["loss"], *norms])))
        old = (state.params, state.opt_state, state.buffers)
        params, opt_state, buffers = keep_if_finite(finite, (params, opt_state, buffers), old)
        # else XLA computes the optimiser's update again, from copies, for the averages
        params = jax.lax.optimization_barrier(params)
        averages = (state.ema, *state.averages)
        moved = tuple(
            update_ema(average, params, rate)
            for average, rate in zip(averages, rates(state.step + 1), strict=True)
        )
        ema, *averages = keep_if_finite(finite, moved, averages)
        metrics["finite"] = finite.astype(jnp.float32)
        if lr_at is not None:
            metrics["lr"] = lr_at(state.step)
        state = TrainState(state.step + 1, params, opt_state, ema, buffers, tuple(averages))
        return state, metrics

    def eval_step(state: TrainState, frozen: Any, batch: Batch, key: jax.Array) -> Metrics:
        return criterion.evaluate(sampling_params(state), state.buffers, frozen, batch, key)

    return Objective(init, start, train_step, eval_step)
