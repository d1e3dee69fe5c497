"""Terms of the phase-1 loss (paper section 3.1, appendix G equation 25; Esser et al. 2021)."""

import jax
import jax.numpy as jnp


def l1(a: jax.Array, b: jax.Array) -> jax.Array:
    """|a - b| per element."""
    return jnp.abs(a - b)


def l2(a: jax.Array, b: jax.Array) -> jax.Array:
    """(a - b)^2 per element."""
    return (a - b) ** 2


PIXEL_LOSSES = {"l1": l1, "l2": l2}


def nll_sum(error: jax.Array, logvar: float = 0.0, weights: jax.Array | None = None) -> jax.Array:
    """-log p(image | z) of the KL model: error / exp(logvar) + logvar, summed over an image.

    error: [B, H, W, C], pixel and perceptual; the mean over the batch is taken, of images weighted
    by `weights` [B]. As published, the sum makes the loss grow with the image's size. The original
    meant `logvar` to be learned, but never does: it stays 0.
    """
    nll = jnp.sum(error / jnp.exp(logvar) + logvar, axis=(1, 2, 3))
    return jnp.mean(nll if weights is None else weights * nll)


def generator_loss(fake: jax.Array) -> jax.Array:
    """What the decoder minimises: minus the discriminator's logits of reconstructions."""
    return -jnp.mean(fake)


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """What the discriminator minimises (Lim & Ye 2017): 1 at the start, 0 when it has won."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def vanilla(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator's cross-entropy (Goodfellow et al. 2014): log 2 at the start."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


DISCRIMINATOR_LOSSES = {"hinge": hinge, "vanilla": vanilla}


def adaptive_weight(nll_gradient: jax.Array, generator_gradient: jax.Array) -> jax.Array:
    """lambda of equation 7 in Esser et al. 2021: the ratio of two gradients' norms, up to 1e4.

    Both are taken at the decoder's last kernel. The weight balances the adversarial term with the
    reconstruction, whatever their scales.
    """
    norm = jnp.linalg.norm
    ratio = norm(nll_gradient.reshape(-1)) / (norm(generator_gradient.reshape(-1)) + 1e-4)
    return jnp.clip(ratio, 0.0, 1e4)


def use_of_codes(share: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """How much of a codebook is in use, from the share [size] of positions that each entry has.

    perplexity: exp of the entropy, `size` when all are used alike. codes_used: entries used at all.
    """
    share = jnp.asarray(share)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-10)))
    return {"perplexity": jnp.exp(entropy), "codes_used": jnp.sum(share > 0.0)}
