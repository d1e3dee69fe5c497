"""Products as XLA for CPUs computes them fast: of float32 operands, and of bfloat16 ones.

In float32 the gradient of a linear layer's kernel is written as inputs times gradients. JAX's own
rule multiplies gradients by inputs and transposes the result, for which XLA copies the gradients,
transposed, and multiplies those at half of the speed.

In bfloat16, mixed precision: operands are bfloat16, sums and results float32. CPUs with matrix
units or dot products for bfloat16 multiply them several times faster than float32, but through XLA
only as a product of two matrices with a float32 result, the first of them not transposed; its
convolutions and bfloat16 results are slower than those in float32. So convolutions are written as
such products here, forward and backward. Norms, activations and residuals, between products, are
float32.

Accelerators have kernels of their own: in their programs nothing of this appears.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# with fewer, laying out the operands takes longer than a product in float32
LEAST_CHANNELS = 32
LEAST_ROWS = 128

_assumed: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


class Policy(NamedTuple):
    """What Linen's layers are given: the dtype of arrays, and what makes their products."""

    dtype: Any
    dot_general: Callable[[], Callable[..., jax.Array]] | None = None
    conv_general_dilated: Callable[[], Callable[..., jax.Array]] | None = None


def policy(dtype: Any) -> Policy:
    """How to compute in `dtype` on the backend that networks are traced for."""
    # not `lax.platform_dependent`: accelerators' programs would hold this form beside theirs
    if backend() != "cpu":
        return Policy(dtype)
    if dtype == jnp.bfloat16:
        return Policy(jnp.float32, lambda: dot_general_bfloat16, lambda: conv_general_dilated)
    return Policy(dtype, lambda: dot_general)


def backend() -> str:
    """The one that networks are traced for: this machine's, or what `traced_for` says."""
    return _assumed.get() or jax.default_backend()


@contextlib.contextmanager
def traced_for(other: str) -> Iterator[None]:
    """Networks traced inside are those of another backend, "cpu", "gpu" or "tpu".

    Those of "none" have no form but the plain one, to be counted and not run.
    A function that was traced before must be jitted anew: jit does not see the difference.
    """
    token = _assumed.set(other)
    try:
        yield
    finally:
        _assumed.reset(token)


def dot_general(
    lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, precision: Any = None
) -> jax.Array:
    """`lax.dot_general` as `nn.Dense` calls it: [..., c] and [c, o] -> [..., o]."""
    del dimension_numbers
    return _dot(lhs, rhs, precision)


def dot_general_bfloat16(
    lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, precision: Any = None
) -> jax.Array:
    """The same of float32 arrays by way of bfloat16 operands, where that is faster."""
    rows = lhs.size // lhs.shape[-1]
    if min(rhs.shape) < LEAST_CHANNELS or rows < LEAST_ROWS:
        return dot_general(lhs, rhs, dimension_numbers, precision)
    return _half_dot(lhs.reshape(rows, -1), rhs).reshape(*lhs.shape[:-1], -1)


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, **options
) -> jax.Array:
    """`lax.conv_general_dilated` as `nn.Conv` calls it: float32 NHWC and HWIO -> NHWC.

    Strided, dilated and grouped ones, and those of few channels or pixels, stay float32.
    """
    factors = {*window_strides, *options["lhs_dilation"], *options["rhs_dilation"]}
    dense = factors == {1} and options["feature_group_count"] == 1
    pixels = lhs.size // lhs.shape[-1]
    if not dense or min(rhs.shape[2:]) < LEAST_CHANNELS or pixels < LEAST_ROWS:
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    return _conv(lhs, rhs, tuple(map(tuple, padding)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x, kernel, precision):
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision)


def _dot_forward(x, kernel, precision):
    return _dot(x, kernel, precision), (x, kernel)


def _dot_backward(precision, saved, g):
    x, kernel = saved
    to_x = lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())), precision)
    return to_x, _outer(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), precision)


def _outer(x, g, precision):
    """[n, c] and [n, o] -> [c, o], the sum over rows; XLA is fast with the narrower one first."""
    if x.shape[1] > g.shape[1]:
        # the barrier: else XLA turns the operands round instead of the result
        return lax.optimization_barrier(_outer(g, x, precision)).T
    return lax.dot_general(x, g, (((0,), (0,)), ((), ())), precision)


_dot.defvjp(_dot_forward, _dot_backward)


@jax.custom_vjp
def _half_dot(x, kernel):
    return _half_dot_forward(x, kernel)[0]


def _half_dot_forward(x, kernel):
    x = _half(x)
    return _product(x, _half(kernel)), (x, kernel)


def _half_dot_backward(saved, g):
    x, kernel = saved
    g = _half(g)
    return _product(g, _half(kernel), transposed=True), _product(_transpose(x), g)


_half_dot.defvjp(_half_dot_forward, _half_dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x, kernel, padding):
    return _conv_forward(x, kernel, padding)[0]


def _conv_forward(x, kernel, padding):
    """A product by each row of the kernel, all at once; the results are added, rows apart."""
    height, width, c, o = kernel.shape
    x = _half(x)
    seen = _seen(x, width, padding[1])
    k = _half(kernel).transpose(1, 2, 0, 3).reshape(width * c, height * o)
    y = _product(seen.reshape(-1, width * c), k).reshape(*seen.shape[:3], -1)
    return _sum_rows(y, height, padding[0]), (x, kernel)


def _conv_backward(padding, saved, g):
    x, kernel = saved
    g = _half(g)
    return _input_gradient(g, kernel, padding), _kernel_gradient(x, g, kernel.shape, padding)


_conv.defvjp(_conv_forward, _conv_backward)


def _input_gradient(g, kernel, padding):
    """A convolution of g, by the kernel turned round."""
    height, width, c, o = kernel.shape
    rows, columns = ((n - 1 - low, n - 1 - high) for n, (low, high) in zip(kernel.shape, padding))
    seen = _seen(g, width, columns)
    k = _half(kernel)[::-1, ::-1].transpose(0, 2, 1, 3).reshape(height * c, width * o)
    y = _product(seen.reshape(-1, width * o), k, transposed=True).reshape(*seen.shape[:3], -1)
    return _sum_rows(y, height, rows)


def _kernel_gradient(x, g, shape, padding):
    """What was seen along a row of x, times the pixels of g to which it went."""
    height, width, c, o = shape
    rows, low = x.shape[1], padding[0][0]
    seen = _seen(x, width, padding[1]).reshape(-1, width * c)
    pixels = _bits(_transpose(g.reshape(-1, o))).reshape(o, *g.shape[:3])
    went = [_pad(pixels, 2, i - low, rows - g.shape[1] + low - i) for i in range(height)]
    y = _product(_values(jnp.concatenate(went)).reshape(height * o, -1), seen)
    return y.reshape(height, o, width, c).transpose(0, 2, 3, 1)


def _seen(x, width, padding):
    """What a row of the kernel sees: [B, h, w, c] -> [B, h, w', width, c], bfloat16."""
    b, h, _, c = x.shape
    x = _pad(_bits(x), 2, *padding)
    w = x.shape[2] - width + 1
    # the barrier: from an array in memory, each is a copy of one block in a row
    x = lax.optimization_barrier(x.reshape(b, h, -1))
    columns = [x[:, :, j * c : (j + w) * c].reshape(b, h, w, c) for j in range(width)]
    return _values(jnp.stack(columns, axis=3))


def _sum_rows(y, height, padding):
    """Results by row of the kernel, [B, h, w, height * o] -> where they belong, [B, h', w, o]."""
    low, high = padding
    more = low + high - height + 1
    slabs = jnp.split(y, height, axis=-1)
    return sum(_pad(slab, 1, low - i, more - low + i) for i, slab in enumerate(slabs))


def _product(a, b, transposed=False):
    numbers = (((1,), (int(transposed),)), ((), ()))
    return lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _transpose(x):
    # the barrier: else XLA multiplies by x as it lies, which is slow
    return lax.optimization_barrier(x.T)


def _pad(x, axis, low, high):
    """Zeros before and after along an axis; a negative number of them cuts off."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (low, high, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _half(x):
    return x.astype(jnp.bfloat16)


def _bits(x):
    # XLA moves bfloat16 numbers by way of float32
    return lax.bitcast_convert_type(x, jnp.uint16)


def _values(x):
    return lax.bitcast_convert_type(x, jnp.bfloat16)
