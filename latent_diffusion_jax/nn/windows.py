"""A function applied to overlapping windows of large arrays, the results blended.

Memory for the function grows with the window, not the array. Source: the original's patch-wise
mode, `split_input_params`, for images beyond what attention can take (paper section 4.3.2).
Departure: where the stride does not divide, the last window moves inwards to end at the border;
the original leaves what is beyond its last whole stride without a value.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from latent_diffusion_jax.conditioning.cond import Cond
from latent_diffusion_jax.errors import UserError

Weight = Callable[[int, int], np.ndarray]  # (height, width) of a window -> weights [h, w], > 0


def border_weight(height: int, width: int) -> np.ndarray:
    """The published weights: the distance to the border, as a fraction, clipped to [0.01, 0.5]."""
    y, x = (np.minimum(at, 1 - at) for at in (np.linspace(0, 1, n) for n in (height, width)))
    return np.clip(np.minimum(y[:, None], x[None, :]), 0.01, 0.5)


def ramp_weight(overlap: float) -> Weight:
    """Weights of 1 that fall off as sin^2 over `overlap`, a fraction of the window, to each side.

    Those of two windows that overlap by as much sum to 1: a seam has neither jump nor kink.
    """

    def ramp(n):
        at = (np.arange(n) + 0.5) / n
        return np.sin(np.pi / 2 * np.minimum(np.minimum(at, 1 - at) / overlap, 1)) ** 2

    return lambda height, width: np.outer(ramp(height), ramp(width))


class Grid(NamedTuple):
    """Where windows lie. size, window: [2], height and width; starts: [n, 2], all int."""

    size: np.ndarray
    window: np.ndarray
    starts: np.ndarray

    def scaled(self, size: Any, of: Any) -> "Grid":
        """The same windows at another resolution, at which what is `of` is `size`; [2] each.

        Raises:
          UserError: they would begin or end within a pixel.
        """

        def scale(x):
            whole, rest = np.divmod(x * np.asarray(size), np.asarray(of))
            if rest.any():
                raise UserError(
                    f"windows of {self.window.tolist()} that begin at {self.starts.tolist()} do not"
                    f" begin and end between pixels at {list(size)} / {list(of)} of the resolution:"
                    " choose a window, a stride and a size that divide"
                )
            return whole

        return Grid(*map(scale, self))

    def total(self, weights: np.ndarray) -> np.ndarray:
        """The sum of all windows' weights [h, w] at each place, [height, width]."""
        total = np.zeros(self.size, weights.dtype)
        for y, x in self.starts:
            total[y : y + self.window[0], x : x + self.window[1]] += weights
        return total


def make_grid(size: Any, window: int, stride: int) -> Grid:
    """Windows every `stride` over an array of `size` [2]; a smaller array makes them smaller.

    Raises:
      UserError: the stride is not 1 to `window`.
    """
    if not 1 <= stride <= window:
        raise UserError(f"windows of {window} need a stride of 1 to {window}, not {stride}")
    axes = [np.r_[np.arange(0, max(n - window, 0), stride), max(n - window, 0)] for n in size]
    starts = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    return Grid(np.asarray(size), np.minimum(size, window), starts)


def windowed(
    function: Callable[[Any], jax.Array],
    window: int,
    stride: int,
    *,
    weight: Weight = border_weight,
    batch: int = 1,
) -> Callable[[Any], jax.Array]:
    """A function of arrays, applied to their overlapping windows; for use inside jit.

    Args:
      function: a tree of arrays [B, h, w, ...] -> [B, h', w', c], of any sizes in proportion. What
        is the same for all windows it closes over.
      window: side in pixels of the tree's first array; `stride` too. The other arrays, and the
        result, are cut in proportion to their sizes.
      weight: of each place of a window of the result.
      batch: how many windows are in one call of `function`, by vmap; 1 where B is sharded, or
        XLA gathers the rows before it merges both axes.

    Returns:
      A function of the whole arrays: the weighted mean of the windows. An array that one window
      covers is passed through whole.

    Raises:
      UserError: batch or, when called, stride is out of range, or windows would cut a pixel.
    """

    if batch < 1:
        raise UserError(f"a call takes at least one window, not {batch}")

    def call(arrays):
        leaves, structure = jax.tree.flatten(arrays)
        grid = make_grid(leaves[0].shape[1:3], window, stride)
        if len(grid.starts) == 1:
            return function(arrays)
        grids = [grid.scaled(x.shape[1:3], of=grid.size) for x in leaves]

        def apply(*cuts):
            return function(jax.tree.unflatten(structure, cuts))

        cut_shapes = [
            jax.ShapeDtypeStruct((x.shape[0], *map(int, g.window), *x.shape[3:]), x.dtype)
            for x, g in zip(leaves, grids)
        ]
        result = jax.eval_shape(apply, *cut_shapes)
        out = grid.scaled(result.shape[1:3], of=grid.window)
        weights = weight(*map(int, out.window)).astype(np.float32)
        apply_all = jax.vmap(apply)

        def step(total, group):
            starts, out_starts, used = group
            cuts = [
                jnp.stack([_cut(x, start, s.shape) for start in at])
                for x, s, at in zip(leaves, cut_shapes, starts)
            ]
            for start, use, value in zip(out_starts, used, apply_all(*cuts)):
                value = use * weights[None, :, :, None] * value
                place = (0, *start, 0)
                value += lax.dynamic_slice(total, place, value.shape)
                total = lax.dynamic_update_slice(total, value, place)
            return total, None

        groups = _groups([g.starts for g in grids], out.starts, batch)
        total = jnp.zeros((result.shape[0], *map(int, out.size), result.shape[3]), jnp.float32)
        total, _ = lax.scan(step, total, groups)
        return (total / out.total(weights)[None, :, :, None]).astype(result.dtype)

    return call


def windowed_network(
    network: Callable[..., jax.Array], window: int, stride: int, batch: int = 1
) -> Callable[..., jax.Array]:
    """A denoising network that sees windows of z_t and, cut alike, of `cond.concat`.

    Args:
      network: (params, z_t [B, h, w, c], t, cond) -> [B, h, w, c].
      window: side in latent pixels; stride, batch: see `windowed`.

    Returns:
      The same for any size. Context and embedding are those of all windows: each is denoised as if
      it were the image that they describe.
    """

    def call(params: Any, z_t: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        def on_window(arrays):
            z_t, concat = arrays
            return network(params, z_t, t, dataclasses.replace(cond, concat=concat))

        return windowed(on_window, window, stride, batch=batch)((z_t, cond.concat))

    return call


def _cut(x: jax.Array, start: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.dynamic_slice(x, (0, *start, *[0] * (x.ndim - 3)), shape)


def _groups(starts: list[np.ndarray], out_starts: np.ndarray, batch: int) -> tuple:
    """Windows in groups of equal size; those that fill up the last group count for nothing."""
    n = len(out_starts)
    number = -(-n // batch)
    index = np.arange(number * -(-n // number)).reshape(number, -1)
    used = (index < n).astype(np.float32)
    index = np.minimum(index, n - 1)
    return [s[index] for s in starts], out_starts[index], used
