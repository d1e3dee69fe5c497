"""Decoding and encoding by tiles: device memory grows with the tile, the image is on the host.

The paper's first stages are convolutional but for norms and the attention in the middle, which see
one tile only: the result is not the whole image's, and the closer to it the larger the tile. Tiles
meet without a line, but where their contents differ much, colours can drift from one to the next.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.windows import make_grid, ramp_weight


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
