"""The published weights of FID's Inception -> parameters of `evaluate.inception.Inception`.

The file that people have is pytorch-fid's and torch-fidelity's; both hold the same tensors.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from latent_diffusion_jax.convert.files import Tensor, open_tensors
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate.inception import SIDE, Inception

EPSILON = 1e-3  # of its BatchNorms
NORM = ("weight", "bias", "running_mean", "running_var")
SOURCE = (
    "pt_inception-2015-12-05-6726825d.pth (of pytorch-fid's releases; torch-fidelity's"
    " weights-inception-2015-12-05-6726825d.pth holds the same)"
)


def load_inception(path: str) -> Any:
    """The parameters of `Inception`, float32 numpy arrays, BatchNorms folded into convolutions.

    What else the file holds is left.

    Raises:
      UserError: no file, one that cannot be read, or that lacks a tensor or has another shape.
    """
    if not os.path.exists(path):
        raise UserError(f"no file {path!r}: FID and its kin need {SOURCE}")
    tensors = open_tensors(path)
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32)
    shapes = jax.eval_shape(lambda x: Inception().init(jax.random.key(0), x), image)["params"]
    found = {}
    for name, leaves in shapes.items():
        if name == "fc":
            kernel = _read(path, tensors, "fc.weight", leaves["kernel"].shape[::-1])
            found[name] = {"kernel": np.ascontiguousarray(kernel.T)}
        else:
            found[name] = _folded(path, tensors, name, leaves["kernel"].shape)
    return found


def _folded(
    path: str, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """A convolution that does what it and the BatchNorm behind it did, worked out in float64."""
    height, width, inputs, features = shape
    kernel = _read(path, tensors, f"{name}.conv.weight", (features, inputs, height, width))
    scale, bias, mean, variance = (
        _read(path, tensors, f"{name}.bn.{which}", (features,)).astype(np.float64) for which in NORM
    )
    scale = scale / np.sqrt(variance + EPSILON)
    kernel = kernel.transpose(2, 3, 1, 0) * scale
    return {
        "kernel": np.ascontiguousarray(kernel, np.float32),
        "bias": (bias - mean * scale).astype(np.float32),
    }


def _read(path: str, tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> np.ndarray:
    if key not in tensors:
        raise UserError(f"{path!r} has no {key!r}: FID and its kin need {SOURCE}")
    if tensors[key].shape != shape:
        raise UserError(
            f"{path!r}: {key!r} is {list(tensors[key].shape)}, in FID's Inception {list(shape)}"
        )
    return tensors[key].read().astype(np.float32)
