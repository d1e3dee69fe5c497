"""GroupNorm (Wu & He 2018), channels last, with a backward pass that keeps its input alone.

Linen's sums pixels and channels of a group at once, which CPUs do several times more slowly than
pixels first and then the few channels, and differentiating it keeps what can be made again; so does
differentiating the SiLU that follows nearly every one.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class GroupNorm(nn.Module):
    """[B, ..., c] -> the same shape in `dtype`; statistics are float32.

    Attributes:
      num_groups: divides c.
      epsilon: added to the variance.
      dtype: of the result; parameters are float32.
      silu: followed by SiLU (float32, as the norm).
    """

    num_groups: int
    epsilon: float
    dtype: Any = jnp.float32
    silu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, ..., c] -> [B, ..., c]."""
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        x = _group_norm(x, scale, bias, self.num_groups, self.epsilon, self.silu)
        return x.astype(self.dtype)


def statistics(x: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each group of [B, ..., c]: float32 [B, groups] each."""
    x = x.astype(jnp.float32)
    pixels = range(1, x.ndim - 1)
    mean = _groups(x.mean(pixels), num_groups).mean(-1)
    # two passes: E[x^2] - E[x]^2 cancels where a group's mean is far from zero
    squares = jnp.square(x - _spread(mean, x)).mean(pixels)
    return mean, _groups(squares, num_groups).mean(-1)


def normalise(
    x: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    silu: bool = False,
) -> jax.Array:
    """x [B, ..., c] with the `statistics` of its groups [B, groups] -> float32 [B, ..., c]."""
    factor = _spread(jax.lax.rsqrt(variance + epsilon), x) * _last(scale, x)
    x = (x.astype(jnp.float32) - _spread(mean, x)) * factor + _last(bias, x)
    return nn.silu(x) if silu else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _group_norm(x, scale, bias, num_groups, epsilon, silu):
    return normalise(x, *statistics(x, num_groups), scale, bias, epsilon, silu)


def _forward(x, scale, bias, num_groups, epsilon, silu):
    found = statistics(x, num_groups)
    return normalise(x, *found, scale, bias, epsilon, silu), (x, *found, scale, bias)


def _backward(num_groups, epsilon, silu, kept, g):
    x, mean, variance, scale, bias = kept
    if silu:
        # the barrier: else XLA keeps what the forward pass made instead of making it again
        x, g = jax.lax.optimization_barrier((x, g))
        normal = normalise(x, mean, variance, scale, bias, epsilon)
        gate = nn.sigmoid(normal)
        g *= gate * (1 + normal * (1 - gate))
    pixels = range(1, x.ndim - 1)
    inverse = jax.lax.rsqrt(variance + epsilon)
    deviation = x.astype(jnp.float32) - _spread(mean, x)
    of_bias = g.sum(pixels)
    of_scale = _channels(inverse, x.shape[-1]) * (g * deviation).sum(pixels)
    # what reaches x by way of its group's mean and variance
    in_group = x[0].size // num_groups
    by_mean, by_variance = (
        _groups(each * scale[None], num_groups).sum(-1) / in_group for each in (of_bias, of_scale)
    )
    of_x = g * _spread(inverse, x) * _last(scale, x)
    of_x -= _spread(inverse * by_mean, x) + deviation * _spread(inverse**2 * by_variance, x)
    return of_x.astype(x.dtype), of_scale.sum(0), of_bias.sum(0)


_group_norm.defvjp(_forward, _backward)


def _groups(values, num_groups):
    """[B, c] -> [B, groups, c / groups]."""
    return values.reshape(values.shape[0], num_groups, -1)


def _channels(of_groups, c):
    """[B, groups] -> [B, c]."""
    return jnp.repeat(of_groups, c // of_groups.shape[1], axis=1)


def _spread(of_groups, x):
    """[B, groups] -> [B, 1, ..., c]."""
    return jnp.expand_dims(_channels(of_groups, x.shape[-1]), range(1, x.ndim - 1))


def _last(of_channels, x):
    """[c] -> [1, ..., c]."""
    return jnp.expand_dims(of_channels, range(x.ndim - 1))
