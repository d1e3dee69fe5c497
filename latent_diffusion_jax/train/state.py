"""What training carries from step to step, and the moving average of its weights.

Source: the original's `LitEma`: decay_n = min(decay, (1 + n) / (10 + n)), n = 1 at first. Or, with
profiles that are powers of the time, Karras et al. 2024 (see `averages.py`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from latent_diffusion_jax.errors import UserError, choose

Params = dict[str, Any]  # network name -> parameter tree
UNIFORM = 12**-0.5  # length of the mean over a whole training: gamma 0
TRAINING_ONLY = ("discriminator", "logvar")  # networks that no image is made with


@struct.dataclass
class TrainState:
    """Dicts are keyed by network (autoencoder, discriminator | unet); `ema` by some of them.

    `buffers` is what networks carry without gradients, such as running statistics; `averages` are
    of other lengths than `ema`, of the same networks, where several are kept (`averages.py`).
    """

    step: jax.Array  # int32 []: updates done
    params: Params
    opt_state: Any
    ema: Params
    buffers: Params = struct.field(default_factory=dict)
    averages: tuple[Params, ...] = ()


def sampling_params(state: TrainState) -> Params:
    """The weights to sample with: averaged where an average is kept, as trained elsewhere."""
    return {**state.params, **state.ema}


def init_ema(params: Mapping[str, Any], networks: Iterable[str]) -> Params:
    """Starts the averages at the initial weights.

    Raises:
      UserError: a name in `networks` is not one of the trained networks.
    """
    return {name: choose("network for ema_networks", name, params) for name in networks}


def ema_decay_at(n: jax.Array, decay: float) -> jax.Array:
    """The decay of update `n` (1 at the first): short memory while the weights still move fast."""
    n = jnp.asarray(n, jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def update_ema(ema: Params, params: Params, rate: jax.Array) -> Params:
    """Moves the averages towards `params`, by `rate` of the way."""
    return jax.tree.map(lambda e, p: e - rate * (e - p), ema, {name: params[name] for name in ema})


def power_exponent(length: float) -> float:
    """The gamma of a length: length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises:
      UserError: no profile is of this length.
    """
    if not 0 < length <= UNIFORM:
        raise UserError(
            f"a length of averages of {length:g}; choose from above 0 to {UNIFORM:.3f} (the mean of"
            " all weights so far), such as 0.1"
        )
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(max(root.real for root in roots))


def power_rate_at(n: jax.Array, gamma: float) -> jax.Array:
    """By how much update `n` (1 at the first) moves the average: 1 - (1 - 1/n)^(gamma + 1).

    Updates then are the integral of weights that stay from one step to the next, exactly.
    """
    n = jnp.asarray(n, jnp.float32)
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / n))
