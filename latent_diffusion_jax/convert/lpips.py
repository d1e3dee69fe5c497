"""The published weights of LPIPS -> parameters of `first_stage.lpips.Lpips`.

The files that people have: torchvision's VGG16 and the LPIPS heads, the state dict of the `lpips`
package, and the checkpoints of CompVis' and taming-transformers' first stages, which hold both.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from latent_diffusion_jax.convert import compvis
from latent_diffusion_jax.convert.files import Tensor, open_tensors
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.lpips import MIN_SIZE, SCALE, SHIFT, SLICES, Lpips

PREFIX = "loss.perceptual_loss."  # in the checkpoint of a first stage
TORCHVISION = {
    f"features.{layer}.": f"net.slice{i}.{layer}."
    for i, layers in enumerate(SLICES, 1)
    for layer in layers
}
CONSTANTS = {"scaling_layer.shift": SHIFT, "scaling_layer.scale": SCALE}
SOURCES = {  # beginning of keys -> where they are from
    "net.": "torchvision's VGG16 weights for ImageNet (vgg16-397923af.pth of PyTorch's model"
    " downloads)",
    "lin": "the LPIPS heads (vgg.pth, version 0.1, of the lpips package)",
}
HOW_TO_GET = (
    f"the perceptual loss needs {' and '.join(SOURCES.values())}, or a published first stage's"
    " checkpoint, which holds both: give --config.run.lpips=FILE[,FILE], or train without by"
    " --config.loss.perceptual_weight=0"
)


def load_lpips(paths: Sequence[str]) -> Any:
    """The parameters of `Lpips`, float32 numpy arrays, from files that together hold all of them.

    What else the files hold is left. A tensor that several have is read from the first.

    Raises:
      UserError: a file that cannot be read, a tensor that is missing or has another shape, or other
        constants than LPIPS'.
    """
    found: dict[str, tuple[str, str, Tensor]] = {}  # our key -> path, key and tensor there
    for path in paths:
        for key, tensor in open_tensors(path).items():
            found.setdefault(published_key(key), (path, key, tensor))
    shapes = _shapes()
    leaves = list(compvis.leaves(shapes, ""))
    _check_complete([key for key, _, _ in leaves if key not in found], paths)
    for key, constant in CONSTANTS.items():
        if key in found:
            _check_constant(constant, *found[key])
    filled = [_parameter(*found[key], kind, leaf.shape) for key, kind, leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(shapes), filled)


def published_key(key: str) -> str:
    """The name in LPIPS of a tensor of any of the files; keys of something else are kept."""
    key = key.removeprefix(PREFIX)
    layer, kind = key[: key.rfind(".") + 1], key[key.rfind(".") + 1 :]
    return TORCHVISION.get(layer, layer) + kind


def _shapes() -> Any:
    image = jax.ShapeDtypeStruct((1, MIN_SIZE, MIN_SIZE, 3), np.float32)
    return jax.eval_shape(lambda a: Lpips().init(jax.random.key(0), a, a), image)["params"]


def _check_complete(missing: Sequence[str], paths: Sequence[str]) -> None:
    lacks = []
    for start, source in SOURCES.items():
        keys = [key for key in missing if key.startswith(start)]
        if keys:
            lacks.append(f"{keys[0]!r} ({len(keys)} missing), of {source}")
    if lacks:
        files = ", ".join(map(repr, paths)) or "no files"
        raise UserError(f"LPIPS is not complete in {files}: no {'; no '.join(lacks)}")


def _check_constant(constant: np.ndarray, path: str, key: str, tensor: Tensor) -> None:
    theirs = tensor.read().astype(np.float32).reshape(-1)
    ours = constant.astype(tensor.dtype).astype(np.float32)  # half precision rounds them
    if theirs.shape != ours.shape or not np.allclose(theirs, ours, rtol=0, atol=1e-6):
        raise UserError(f"{path!r}: {key!r} is {theirs.tolist()}, in LPIPS {constant.tolist()}")


def _parameter(
    path: str, key: str, tensor: Tensor, kind: str, shape: tuple[int, ...]
) -> np.ndarray:
    if not compvis.fits(tensor.shape, kind, shape):
        raise UserError(
            f"{path!r}: {key!r} is {list(tensor.shape)}, where LPIPS has a {kind} of {list(shape)}"
        )
    return compvis.from_torch(key, tensor, kind, shape)
