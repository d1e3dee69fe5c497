"""Averages of the weights whose length is chosen after the training.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
section 3 and appendix C. Training keeps two averages with power-function profiles
p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), tau from 0 to t, and stores both now and then. A sum
of what was stored, by least squares of the profiles, is an average of nearly any other length. A
length is the profile's standard deviation over t.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.checkpoint import Checkpointer
from latent_diffusion_jax.train.state import Params, TrainState, power_exponent

STORED = jnp.float16  # as the source stores them: bfloat16 has an eighth of its precision


def inner_products(gamma: Any, t: Any, other_gamma: Any, other_t: Any) -> np.ndarray:
    """Integrals of products of profiles, [N, M], of (gamma, t) [N] by others [M]."""
    a, s = (np.asarray(x, np.float64)[:, None] for x in (gamma, t))
    b, r = (np.asarray(x, np.float64)[None] for x in (other_gamma, other_t))
    sooner, later = np.minimum(s, r), np.maximum(s, r)
    falls = (sooner / later) ** np.where(s < r, b, a)  # the later one's exponent
    return (a + 1) * (b + 1) / (a + b + 1) * falls / later


def coefficients(
    lengths: Sequence[float], steps: Sequence[int], length: float, step: int
) -> tuple[np.ndarray, float]:
    """How to sum averages stored of `lengths` at `steps` to one of `length` at `step`.

    Returns:
      float64 [len(steps), len(lengths)], and the profile's error: the root of its mean square,
      over that of the profile.

    Raises:
      UserError: no profile is of this length.
    """
    gammas = np.tile([power_exponent(x) for x in lengths], len(steps))
    times = np.repeat(steps, len(lengths))
    wanted = [power_exponent(length)], [step]
    products = inner_products(gammas, times, gammas, times)
    aims = inner_products(gammas, times, *wanted)[:, 0]
    found = np.linalg.lstsq(products, aims)[0]
    square = inner_products(*wanted, *wanted).item()
    error = (found @ products @ found - 2 * found @ aims + square) / square
    return found.reshape(len(steps), len(lengths)), float(np.sqrt(max(error, 0)))


@jax.jit
def _stored(state: TrainState) -> tuple[Params, ...]:
    return jax.tree.map(lambda x: x.astype(STORED), (state.ema, *state.averages))


@jax.jit
def _add(total: Params, share: jax.Array, average: Params) -> Params:
    return jax.tree.map(lambda x, y: x + share * y.astype(x.dtype), total, average)


def folder(workdir: str) -> str:
    """Where a workdir keeps what training stored, with checkpoints like its own."""
    return f"{workdir}/averages"


def write(checkpointer: Checkpointer, step: int, state: TrainState, lengths: Sequence[float]):
    """Stores the averages of a step; returns when they are on disk.

    Raises:
      UserError: they cannot be written.
    """
    named = {f"{length:g}": tree for length, tree in zip(lengths, _stored(state), strict=True)}
    checkpointer.save_weights(step, named, {}, {})
    # a later checkpoint may be what the run resumes from: this must not be lost then
    checkpointer.wait()


def synthesise(
    checkpointer: Checkpointer,
    shapes: Params,
    lengths: Sequence[float],
    length: float,
    step: int | None = None,
) -> tuple[Params, int, float]:
    """Makes averages of `length` of what `write` stored up to `step` (default: the last one).

    `shapes` are the networks', with shardings. Returns the averages, float32, their step and the
    error of the profile (see `coefficients`).

    Raises:
      UserError: nothing is stored, not at that step, or it is broken; no profile is of this length.
    """
    steps = checkpointer.steps
    if not steps:
        raise UserError("no averages are stored yet: train longer, or set run.snapshot_every")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"no averages of step {step}; one of {', '.join(map(str, steps))}")
    steps = [s for s in steps if s <= step]
    shares, error = coefficients(lengths, steps, length, step)
    abstract = {f"{x:g}": jax.tree.map(_as_stored, shapes) for x in lengths}
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)
    for at, row in zip(steps, shares):
        stored = checkpointer.read_weights(at, abstract)
        for share, average in zip(row, stored.values(), strict=True):
            total = _add(total, np.float32(share), average)
    return total, step, error


def _as_stored(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, STORED, sharding=x.sharding)
