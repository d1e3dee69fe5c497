"""A folder of transformers' `CLIPModel` -> `evaluate.clip.Clip`, its parameters and tokeniser."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_diffusion_jax.conditioning.text import make_tokenize
from latent_diffusion_jax.convert.diffusers.config import check, number, read_json
from latent_diffusion_jax.convert.diffusers.folder import open_weights
from latent_diffusion_jax.convert.diffusers.text import clip_section
from latent_diffusion_jax.convert.files import Tensor
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate.clip import Clip, ClipImage

VISION_SAME = dict(layer_norm_eps=1e-5, model_type="clip_vision_model", num_channels=3)
VISION_DEFAULTS = dict(
    hidden_act="quick_gelu",
    hidden_size=768,
    image_size=224,
    intermediate_size=3072,
    num_attention_heads=12,
    num_hidden_layers=12,
    patch_size=32,
)
TOWERS = ("text", "image")  # of parameters: whose keys have no prefix in the file
SUFFIXES = {"kernel": ".weight", "scale": ".weight", "embedding": ".weight", "bias": ".bias"}


def load_clip(folder: str) -> tuple[Clip, Any, Callable[[Sequence[str]], np.ndarray]]:
    """The network, its parameters as float32 numpy arrays, and captions -> tokens.

    Raises:
      UserError: no such folder, another model, or one that lacks a tensor.
    """
    place = Path(folder)
    if not (place / "config.json").is_file():
        raise UserError(
            f"no CLIP in {folder!r}: a CLIP score needs a folder with config.json, weights and"
            " tokeniser, such as openai/clip-vit-large-patch14's"
        )
    config = read_json(place / "config.json")
    if config.get("model_type") != "clip":
        raise UserError(f"{folder!r} holds {config.get('model_type')!r}, not 'clip'")
    section, text = clip_section(config.get("text_config") or {}, str(place / "config.json"))
    image = _image(config.get("vision_config") or {}, str(place / "config.json"))
    config = {"projection_dim": 512, **config}
    network = Clip(text, image, number(config, "projection_dim", folder))
    params = _params(network, open_weights(place), folder)
    return network, params, make_tokenize("clip", folder, text.max_length, section["pad"])


def _image(config: Mapping[str, Any], place: str) -> ClipImage:
    config = {**VISION_SAME, **VISION_DEFAULTS, **config}
    network = ClipImage(
        image_size=number(config, "image_size", place),
        patch_size=number(config, "patch_size", place),
        dim=number(config, "hidden_size", place),
        depth=number(config, "num_hidden_layers", place),
        num_heads=number(config, "num_attention_heads", place),
        activation=config["hidden_act"],
    )
    check(config, dict(VISION_SAME, intermediate_size=4 * network.dim), place)
    return network


def _params(network: Clip, tensors: Mapping[str, Tensor], place: str) -> Any:
    side, length = network.image.image_size, network.text.max_length
    shapes = jax.eval_shape(
        lambda: network.init(
            jax.random.key(0), np.zeros((1, side, side, 3)), np.zeros((1, length), np.int32)
        )
    )["params"]

    def read(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        *layers, last = (str(key.key) for key in path if key.key not in TOWERS)
        name = "".join([*layers, SUFFIXES[last]]) if layers else last
        if name not in tensors:
            raise UserError(f"{place!r} has no tensor {name!r}")
        array = tensors[name].read().astype(np.float32)
        if last == "kernel":
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        if array.shape != leaf.shape:
            raise UserError(f"{place!r}: {name!r} is {list(array.shape)}, not {list(leaf.shape)}")
        return np.ascontiguousarray(array)

    return jax.tree_util.tree_map_with_path(read, shapes)
