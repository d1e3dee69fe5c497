"""Inception v3 as FID uses it: the 2015 network of TensorFlow, with its own poolings.

Sources: Szegedy et al. 2016; Heusel et al. 2017 (FID). Names are those of the published file
(`pt_inception-2015-12-05-6726825d.pth`, pytorch-fid's and torch-fidelity's). Departure: each
BatchNorm is folded into its convolution when a file is read (`convert/inception.py`). Everything is
float32, in full precision on accelerators too: with less, distances change in the third digit.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.errors import choose

SIDE = 299  # pixels that it sees
SPATIAL = 7  # channels of the features of sFID


class Features(NamedTuple):
    """What is measured of images.

    pool: [B, 2048], the last layer averaged over pixels: FID, KID, precision and recall.
    spatial: [B, 2023], the first 7 channels of a layer of 17 x 17: sFID (Nash et al. 2021).
    logits: [B, 1008], without the bias, as the Inception Score is computed everywhere.
    """

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array


class Inception(nn.Module):
    """Images [B, 299, 299, 3], about -1 to 1 (`prepare`) -> Features."""

    @nn.compact
    def __call__(self, x: jax.Array) -> Features:
        """See the class."""
        x = _conv(x, "Conv2d_1a_3x3", 32, 3, stride=2)
        x = _conv(x, "Conv2d_2a_3x3", 32, 3, padding="VALID")
        x = _conv(x, "Conv2d_2b_3x3", 64, 3)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = _conv(x, "Conv2d_3b_1x1", 80, 1)
        x = _conv(x, "Conv2d_4a_3x3", 192, 3, padding="VALID")
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _block_a(x, name, pooled)
        x = _block_b(x, "Mixed_6a")
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160)):
            x, first = _block_c(x, name, inner)
        spatial = first[..., :SPATIAL].reshape(len(x), -1)
        x, _ = _block_c(x, "Mixed_6e", 192)
        x = _block_d(x, "Mixed_7a")
        x = _block_e(x, "Mixed_7b", _average_pool)
        # a maximum here, as only the 2015 network has it
        x = _block_e(x, "Mixed_7c", lambda x: nn.max_pool(x, (3, 3), (1, 1), "SAME"))
        pool = x.mean(axis=(1, 2))
        head = nn.Dense(1008, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")
        return Features(pool, spatial, head(pool))


def _conv(x, name, features, size, stride=1, padding=None):
    """Convolution and ReLU; `size` is a number or (height, width). Strides go without padding."""
    kernel = (size, size) if isinstance(size, int) else size
    return nn.relu(
        nn.Conv(
            features,
            kernel,
            stride,
            padding=padding or ("SAME" if stride == 1 else "VALID"),
            precision=jax.lax.Precision.HIGHEST,
            name=name,
        )(x)
    )


def _average_pool(x):
    """3 x 3, of the pixels that there are: torchvision's divides by 9 at borders too."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _chain(x, name, *layers):
    """Convolutions one after the other: (name, features, size) each."""
    for part, features, size in layers:
        x = _conv(x, f"{name}.{part}", features, size)
    return x


def _join(*branches):
    return jnp.concatenate(branches, axis=-1)


def _block_a(x, name, pooled):
    return _join(
        _chain(x, name, ("branch1x1", 64, 1)),
        _chain(x, name, ("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        _chain(
            x, name, ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)
        ),
        _chain(_average_pool(x), name, ("branch_pool", pooled, 1)),
    )


def _block_b(x, name):
    double = _chain(x, name, ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3))
    return _join(
        _conv(x, f"{name}.branch3x3", 384, 3, stride=2),
        _conv(double, f"{name}.branch3x3dbl_3", 96, 3, stride=2),
        nn.max_pool(x, (3, 3), (2, 2)),
    )


def _block_c(x, name, inner):
    """Also gives its first branch."""
    row, column = (1, 7), (7, 1)
    first = _chain(x, name, ("branch1x1", 192, 1))
    joined = _join(
        first,
        _chain(
            x,
            name,
            ("branch7x7_1", inner, 1),
            ("branch7x7_2", inner, row),
            ("branch7x7_3", 192, column),
        ),
        _chain(
            x,
            name,
            ("branch7x7dbl_1", inner, 1),
            ("branch7x7dbl_2", inner, column),
            ("branch7x7dbl_3", inner, row),
            ("branch7x7dbl_4", inner, column),
            ("branch7x7dbl_5", 192, row),
        ),
        _chain(_average_pool(x), name, ("branch_pool", 192, 1)),
    )
    return joined, first


def _block_d(x, name):
    wide = _chain(
        x,
        name,
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
    )
    return _join(
        _conv(_chain(x, name, ("branch3x3_1", 192, 1)), f"{name}.branch3x3_2", 320, 3, stride=2),
        _conv(wide, f"{name}.branch7x7x3_4", 192, 3, stride=2),
        nn.max_pool(x, (3, 3), (2, 2)),
    )


def _block_e(x, name, pool):
    def fork(x, part):
        sizes = {"a": (1, 3), "b": (3, 1)}
        return [_conv(x, f"{name}.{part}{side}", 384, size) for side, size in sizes.items()]

    double = _chain(x, name, ("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3))
    return _join(
        _chain(x, name, ("branch1x1", 320, 1)),
        *fork(_chain(x, name, ("branch3x3_1", 384, 1)), "branch3x3_2"),
        *fork(double, "branch3x3dbl_3"),
        _chain(pool(x), name, ("branch_pool", 192, 1)),
    )


def half_pixel(size: int) -> np.ndarray:
    """[299, size]: bilinear from pixels' centres, never antialiased, as pytorch-fid does it."""
    places = np.maximum((np.arange(SIDE) + 0.5) * size / SIDE - 0.5, 0)
    return _between(places, size)


def from_corner(size: int) -> np.ndarray:
    """[299, size]: bilinear from corners, as TensorFlow 1 did, and torch-fidelity and ADM do."""
    scale = np.float32(size) / np.float32(SIDE)
    return _between(np.arange(SIDE) * float(scale), size)


def _between(places: np.ndarray, size: int) -> np.ndarray:
    low = np.floor(places).astype(int)
    weights = np.zeros((SIDE, size))
    rows = np.arange(SIDE)
    np.add.at(weights, (rows, np.minimum(low, size - 1)), 1 - (places - low))
    np.add.at(weights, (rows, np.minimum(low + 1, size - 1)), places - low)
    return weights


# name -> matrix of one axis, and what is subtracted from and divided by, of 0..255
PREPARATIONS = {
    "torch-fidelity": (from_corner, 128.0, 128.0),
    "pytorch-fid": (half_pixel, 127.5, 127.5),
}


def prepare(images: np.ndarray, preparation: str) -> np.ndarray:
    """What the network is shown of images of any size: both axes to 299, by themselves.

    On the host, where images of many sizes cost no compilation.

    Args:
      images: [B, H, W, 3] of 0..255.
      preparation: "torch-fidelity" (as TensorFlow's original and ADM) or "pytorch-fid". Distances
        of one and the other are not comparable.

    Returns:
      float32 [B, 299, 299, 3], about -1 to 1.
    """
    matrix, centre, scale = choose("preparation", preparation, PREPARATIONS)
    rows, columns = (matrix(n).astype(np.float32) for n in images.shape[1:3])
    x = images.astype(np.float32)
    x = np.einsum("yh,bhwc,xw->byxc", rows, x, columns, optimize=True)
    return (x - np.float32(centre)) / np.float32(scale)
