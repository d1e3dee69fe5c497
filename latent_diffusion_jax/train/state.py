"""What training carries from step to step, and the moving average of its weights.

Source: the original's `LitEma`: decay_n = min(decay, (1 + n) / (10 + n)), n = 1 at first.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from latent_diffusion_jax.errors import choose

Params = dict[str, Any]  # network name -> parameter tree
TRAINING_ONLY = ("discriminator", "logvar")  # networks that no image is made with


@struct.dataclass
class TrainState:
    """Dicts are keyed by network (autoencoder, discriminator | unet); `ema` by some of them.

    `buffers` is what networks carry without gradients, such as running statistics.
    """

    step: jax.Array  # int32 []: updates done
    params: Params
    opt_state: Any
    ema: Params
    buffers: Params = struct.field(default_factory=dict)


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


def update_ema(ema: Params, params: Params, n: jax.Array, decay: float) -> Params:
    """Moves the averages towards `params`, as update `n` (1 at the first)."""
    rate = 1 - ema_decay_at(n, decay)
    return jax.tree.map(lambda e, p: e - rate * (e - p), ema, {name: params[name] for name in ema})
