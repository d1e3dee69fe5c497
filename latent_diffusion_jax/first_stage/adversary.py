"""Phase 1's adversary: the discriminator, its loss and its part in a step (Esser et al. 2021)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latent_diffusion_jax.errors import UserError, choose
from latent_diffusion_jax.first_stage.discriminator import PatchDiscriminator
from latent_diffusion_jax.first_stage.losses import DISCRIMINATOR_LOSSES


class Adversary(NamedTuple):
    """The discriminator and its part in the loss; see `make_adversary`."""

    network: Any  # a PatchDiscriminator
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    start: int
    weight: float
    factor: float
    second_forward: bool

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters and running statistics."""
        side = 4 * 2**self.network.num_layers  # which they do not depend on
        variables = self.network.init(key, jnp.zeros((1, side, side, 3)), False)
        return variables["params"], variables["batch_stats"]

    def factor_at(self, step: jax.Array) -> jax.Array:
        """0 before `start`."""
        return jnp.where(step < self.start, 0.0, self.factor)


def make_adversary(
    *,
    channels: int = 64,
    num_layers: int = 3,
    loss: str = "hinge",
    start: int = 0,
    weight: float = 1.0,
    factor: float = 1.0,
    second_forward: bool = False,
    dtype: Any = jnp.float32,
) -> Adversary:
    """The patch discriminator and how it takes part.

    Args:
      channels, num_layers: see `PatchDiscriminator`.
      loss: "hinge" or "vanilla".
      start: the step from which on the adversarial term counts and the discriminator learns.
      weight: of the adversarial term, times the adaptive weight.
      factor: of the adversarial term and of the discriminator's loss, from `start` on.
      second_forward: the discriminator sees, as published, a second reconstruction, made after
        the autoencoder's update with a latent sampled anew; else the one that is there.
    """
    found = choose("discriminator loss", loss, DISCRIMINATOR_LOSSES)
    network = PatchDiscriminator(channels, num_layers, dtype)
    return Adversary(network, found, start, weight, factor, second_forward)


def check_patches(adversary: Adversary | None, size: int) -> None:
    """Raises UserError where images of `size` pixels are too small for the discriminator."""
    if adversary is not None and size // 2**adversary.network.num_layers < 3:
        least = 3 * 2**adversary.network.num_layers
        raise UserError(
            f"a discriminator of num_layers {adversary.network.num_layers} needs images of"
            f" {least} pixels, not {size}"
        )


def judge(adversary: Adversary, params: Any, buffers: Any, image: jax.Array) -> tuple:
    """Logits of a batch, pull(cotangent) -> (by parameters, by image), buffers with it counted.

    In training: by the batch's own statistics, which the running ones take up.
    """

    def apply(params, image):
        variables = {"params": params, "batch_stats": buffers["discriminator"]}
        logits, new = adversary.network.apply(variables, image, True, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    logits, pull, statistics = jax.vjp(apply, params["discriminator"], image, has_aux=True)
    return logits, pull, {**buffers, "discriminator": statistics}


def discriminator_gradients(
    adversary: Adversary, real: tuple, fake: tuple, step: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """Of the discriminator's loss, and metrics; `real` and `fake` are (logits, pull) of `judge`."""
    (on_real, pull_real), (on_fake, pull_fake) = real, fake
    loss, (d_real, d_fake) = jax.value_and_grad(adversary.loss, argnums=(0, 1))(on_real, on_fake)
    factor = adversary.factor_at(step)
    found = jax.tree.map(jnp.add, pull_real(factor * d_real)[0], pull_fake(factor * d_fake)[0])
    return found, {
        "discriminator_loss": loss,
        "discriminator_factor": factor,
        "logits_real": jnp.mean(on_real),
        "logits_fake": jnp.mean(on_fake),
    }
