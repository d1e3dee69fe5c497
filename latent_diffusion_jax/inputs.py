"""What a person gives (labels, prompts, images, maps, boxes) -> the inputs of a conditioner."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from latent_diffusion_jax.conditioning.label import parse_labels
from latent_diffusion_jax.conditioning.layout import Object, layout_tokens
from latent_diffusion_jax.conditioning.text import make_tokenize
from latent_diffusion_jax.data.folder import SUFFIXES
from latent_diffusion_jax.data.transforms import read_rgb, to_float
from latent_diffusion_jax.errors import UserError


def read_inputs(
    config: ConfigDict, asked: Mapping[str, str | None], class_names: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], tuple[int, int] | None]:
    """Reads what was asked for as inputs, one row per condition.

    Args:
      config: of phase 2.
      asked: option -> its text; None where it was not given. Of OPTIONS.
      class_names: names that labels may be given by.

    Returns:
      Inputs [N, ...] by name, {} where the model takes none, and the image size (height, width)
      that they imply, None where they imply none.

    Raises:
      UserError: an option that the model has no use for, or one that it needs and did not get; a
        file that cannot be read, or images of several sizes.
    """
    parts = {kind: part for kind, part in _parts(config).items() if kind in READERS}
    takes = {option for kind in parts for option in READERS[kind].options}
    for option, text in asked.items():
        if text is not None and option not in takes:
            has = (
                f"it takes {', '.join(f'--{o}' for o in sorted(takes))}" if takes else "it has none"
            )
            raise UserError(f"--{option}={text}: this model has no such condition; {has}")
    inputs: dict[str, np.ndarray] = {}
    size: tuple[int, int] | None = None
    for kind, section in parts.items():
        found, implied = READERS[kind].read(config, section, asked, class_names)
        inputs |= found
        size = implied or size
    return _aligned(inputs), size


def _parts(config: ConfigDict) -> dict[str, ConfigDict]:
    section = config.conditioning
    if section.kind != "several":
        return {section.kind: section}
    return {part.kind: part for name, part in section.items() if name != "kind"}


def _aligned(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All with as many rows as the longest, the others repeated in turn."""
    count = max((len(rows) for rows in inputs.values()), default=0)
    return {name: rows[np.arange(count) % len(rows)] for name, rows in inputs.items()}


def _label(config, section, asked, class_names):
    count = section.num_classes
    if asked.get("labels") is None:
        return {"label": np.arange(count, dtype=np.int32)}, None
    labels = parse_labels(asked["labels"], count, class_names)
    return {"label": np.asarray(labels, np.int32)}, None


def _prompt(config, section, asked, class_names):
    text = asked.get("prompt")
    if text is None:
        raise UserError("this model needs --prompt=TEXT, or --prompt=@FILE with a prompt per line")
    prompts = [text]
    if text.startswith("@"):
        prompts = [line for line in _read(Path(text[1:])).splitlines() if line.strip()]
        if not prompts:
            raise UserError(f"--prompt={text}: no line in the file")
    tokenizer = config.data.get("tokenizer")
    if not tokenizer:
        raise UserError("this model needs a tokeniser: --config.data.tokenizer=DIR")
    tokenize = make_tokenize(section.kind, tokenizer, section.max_length, section.get("pad"))
    return {"tokens": tokenize(prompts)}, None


def _layout(config, section, asked, class_names):
    path = asked.get("layout")
    if path is None:
        raise UserError(
            'this model needs --layout=FILE.json: a list of {"class": 3, "box": [x0, y0, x1, y1]},'
            " or a list of such lists; boxes in 0..1"
        )
    text = _read(Path(path))
    try:
        layouts = json.loads(text)
        layouts = layouts if layouts and isinstance(layouts[0], list) else [layouts]
        objects = [
            [Object(int(thing["class"]), tuple(map(float, thing["box"]))) for thing in each]  # type: ignore[arg-type]
            for each in layouts
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path!r} is not a layout: {type(error).__name__}: {error}") from error
    options = {name: section[name] for name in ("vocab_size", "max_objects", "num_classes")}
    tokens = [
        layout_tokens(each, encode_crop=section.get("encode_crop", True), **options)
        for each in objects
    ]
    return {"tokens": np.stack(tokens)}, None


def _lowres(config, section, asked, class_names):
    images = _images(asked.get("image"), "--image=FILE or folder, of small images")
    height, width = images.shape[1:3]
    return {"lowres": images}, (height * section.factor, width * section.factor)


def _segmentation(config, section, asked, class_names):
    paths = _paths(asked.get("segmentation"), "--segmentation=FILE.png, a class number per pixel")
    maps = _same_size(paths, [_class_map(path, section.num_classes) for path in paths])
    return {"segmentation": maps}, maps.shape[1:3]


def _class_map(path: Path, num_classes: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            classes = np.asarray(
                image if image.mode in ("P", "L", "I", "I;16") else image.convert("L")
            )
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read as an image: {error}") from error
    if classes.max(initial=0) >= num_classes:
        raise UserError(f"{str(path)!r} has class {classes.max()}, not one of 0..{num_classes - 1}")
    return classes.astype(np.int32)


def _inpainting(config, section, asked, class_names):
    images = _images(asked.get("image"), "--image=FILE and --mask=FILE (white: to be filled)")
    paths = _paths(asked.get("mask"), "--mask=FILE beside --image=FILE (white: to be filled)")
    masks = _same_size(paths, [_read_image(path) for path in paths])
    if masks.shape[1:3] != images.shape[1:3]:
        here, there = ("x".join(map(str, x.shape[2:0:-1])) for x in (masks, images))
        raise UserError(f"--mask is {here} pixels, --image {there}: they must be of one size")
    hole = (masks.mean(axis=-1, keepdims=True) >= 127.5).astype(np.float32)
    return {"image_to_fill": images, "mask": hole}, images.shape[1:3]


def _embeddings(config, section, asked, class_names):
    path = asked.get("embeddings")
    wanted = (section.number, section.dim)
    if path is None:
        raise UserError(
            f"this model needs --embeddings=FILE.npy, [N, 1 to {wanted[0]}, {wanted[1]}]"
        )
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path!r} is not a .npy file: {error}") from error
    if array.ndim != 3 or not 1 <= array.shape[1] <= wanted[0] or array.shape[2] != wanted[1]:
        raise UserError(f"{path!r} is {list(array.shape)}, not [N, 1 to {wanted[0]}, {wanted[1]}]")
    return {"embeddings": array.astype(np.float32)}, None


class Reader(NamedTuple):
    """How a kind of condition is given: the options, and what makes inputs of them."""

    options: tuple[str, ...]
    read: Callable[..., tuple[dict[str, np.ndarray], tuple[int, int] | None]]


READERS = {
    "label": Reader(("labels",), _label),
    "text": Reader(("prompt",), _prompt),
    "clip": Reader(("prompt",), _prompt),
    "layout": Reader(("layout",), _layout),
    "lowres": Reader(("image",), _lowres),
    "segmentation": Reader(("segmentation",), _segmentation),
    "inpainting": Reader(("image", "mask"), _inpainting),
    "embeddings": Reader(("embeddings",), _embeddings),
}
OPTIONS = tuple(dict.fromkeys(o for reader in READERS.values() for o in reader.options))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from error


def _paths(text: str | None, needs: str) -> list[Path]:
    if text is None:
        raise UserError(f"this model needs {needs}")
    path = Path(text)
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise UserError(f"no images in {text!r}")
        return paths
    return [path]


def _read_image(path: Path) -> np.ndarray:
    try:
        return read_rgb(str(path))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read as an image: {error}") from error


def _images(text: str | None, needs: str) -> np.ndarray:
    """float32 [N, H, W, 3] in [-1, 1] of a file or a folder."""
    paths = _paths(text, needs)
    return to_float(_same_size(paths, [_read_image(path) for path in paths]))


def _same_size(paths: Sequence[Path], images: Sequence[np.ndarray]) -> np.ndarray:
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            (h, w), (height, width) = image.shape[:2], images[0].shape[:2]
            raise UserError(
                f"{str(path)!r} is {w}x{h} pixels, {str(paths[0])!r} {width}x{height}: images of"
                " one call must be of one size"
            )
    return np.stack(images)
