"""The KL model's posterior q(z | x) = N(mean, diag(exp(logvar))) (paper section 3.1)."""

import jax
import jax.numpy as jnp


def split_moments(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moments [..., 2c] -> mean, logvar [..., c]; logvar is clamped to [-30, 20]."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def mode(moments: jax.Array) -> jax.Array:
    """The most probable latent: the mean."""
    return split_moments(moments)[0]


def sample(moments: jax.Array, eps: jax.Array) -> jax.Array:
    """mean + std * eps, with eps standard normal of the latent's shape."""
    mean, logvar = split_moments(moments)
    return mean + jnp.exp(0.5 * logvar) * eps


def normal_kl(
    mean: jax.Array, logvar: jax.Array, other_mean: jax.Array, other_logvar: jax.Array
) -> jax.Array:
    """KL(N(mean, exp(logvar)) || N(other_mean, exp(other_logvar))) in nats, per element."""
    ratio = jnp.exp(logvar - other_logvar)
    distance = (mean - other_mean) ** 2 * jnp.exp(-other_logvar)
    return 0.5 * (ratio + distance - 1.0 + other_logvar - logvar)


def kl(moments: jax.Array) -> jax.Array:
    """KL(q || N(0, I)) in nats per example [B], summed over positions and channels."""
    mean, logvar = split_moments(moments)
    terms = normal_kl(mean, logvar, jnp.zeros_like(mean), jnp.zeros_like(mean))
    return jnp.sum(terms, axis=tuple(range(1, terms.ndim)))


def nll(moments: jax.Array, z: jax.Array) -> jax.Array:
    """-log q(z | x) in nats per example [B]."""
    mean, logvar = split_moments(moments)
    terms = jnp.log(2.0 * jnp.pi) + logvar + (z - mean) ** 2 / jnp.exp(logvar)
    return 0.5 * jnp.sum(terms, axis=tuple(range(1, terms.ndim)))
