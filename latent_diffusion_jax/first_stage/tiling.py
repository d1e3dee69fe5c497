"""Decoding and encoding by tiles: device memory grows with the tile, the image is on the host.

The paper's first stages are convolutional but for norms and the attention in the middle, which see
one tile only: the result is not the whole image's, and the closer to it the larger the tile. Tiles
meet without a line, but where their contents differ much, colours can drift from one to the next.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.group_norm import GroupNorm, normalise, statistics
from latent_diffusion_jax.nn.windows import make_grid, ramp_weight

Statistics = dict[str, tuple[jax.Array, jax.Array]]  # of a norm's groups: mean and mean square


def tiled_evenly(
    function: Callable[[Any, jax.Array], jax.Array], tile: int, overlap: int
) -> Callable[[Any, Any], np.ndarray]:
    """`tiled` for (params, array), in two passes: the first measures what the norms then share.

    Statistics of deeper norms are those of the first pass, whose own norms saw one tile: more
    passes would bring them closer to the whole image's, by little.
    """
    measure = jax.jit(lambda params, x: observed(function, None, params, x)[1])
    apply = jax.jit(lambda found, params, x: observed(function, found, params, x)[0])
    plain = jax.jit(function)

    def call(params, array):
        if max(array.shape[1:3]) <= tile:
            return np.asarray(plain(params, array))
        grid = make_grid(array.shape[1:3], tile, tile - overlap)
        (h, w), array = grid.window, np.asarray(array)
        each = [measure(params, array[:, y : y + h, x : x + w]) for y, x in grid.starts]
        shared = jax.tree.map(lambda *values: sum(values) / len(values), *each)
        return tiled(lambda x: apply(shared, params, x), tile, overlap)(array)

    return call


def observed(
    function: Callable[..., jax.Array], given: Statistics | None, *args: Any
) -> tuple[jax.Array, Statistics]:
    """function(*args) and the statistics of its GroupNorms, which use those given instead."""
    found: Statistics = {}

    def share(call, args, kwargs, context):
        norm = context.module
        if not isinstance(norm, GroupNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        (x,), place, weights = args, "/".join(norm.path), norm.variables["params"]
        mean, variance = statistics(x, norm.num_groups)
        found[place] = mean, variance + mean**2
        mean, square = found[place] if given is None else given[place]
        shared = mean, square - mean**2
        x = normalise(x, *shared, weights["scale"], weights["bias"], norm.epsilon, norm.silu)
        return x.astype(norm.dtype)

    with nn.intercept_methods(share):
        return function(*args), found


def tiled(
    function: Callable[[np.ndarray], Any], tile: int, overlap: int
) -> Callable[[Any], np.ndarray]:
    """A function of an array on the device, applied tile by tile from the host.

    Args:
      function: [B, h, w, c] -> [B, h', w', c'], jitted: all tiles have one shape. A decoder
        enlarges, an encoder reduces.
      tile: side in pixels of what `function` takes; an array no larger is passed whole.
      overlap: of neighbours, 1 to tile - 1, over which one fades into the other.

    Returns:
      A function of the whole array, in numpy as its result.

    Raises:
      UserError (when called): overlap is out of range, or tiles would cut a pixel of the result.
    """

    def call(array):
        if not 1 <= overlap < tile:
            raise UserError(f"tiles of {tile} need an overlap of 1 to {tile - 1}, not {overlap}")
        array = np.asarray(array)
        grid = make_grid(array.shape[1:3], tile, tile - overlap)
        total = None
        for index, (y, x) in enumerate(grid.starts):
            h, w = grid.window
            result = np.asarray(function(array[:, y : y + h, x : x + w]))
            if total is None:
                out = grid.scaled(result.shape[1:3], of=grid.window)
                weights = ramp_weight(overlap / tile)(*out.window).astype(np.float32)
                total = np.zeros((len(result), *out.size, result.shape[-1]), np.float32)
            (y, x), (h, w) = out.starts[index], out.window
            total[:, y : y + h, x : x + w] += weights[None, :, :, None] * result
        total /= out.total(weights)[None, :, :, None]
        return total

    return call
