"""What a person gives (labels, prompts, images, maps, boxes) -> the inputs of a conditioner."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.conditioning.label import parse_labels
from latent_diffusion_jax.conditioning.layout import Object, layout_tokens
from latent_diffusion_jax.conditioning.text import make_tokenize
from latent_diffusion_jax.data.folder import SUFFIXES
from latent_diffusion_jax.data.transforms import (
    read_box,
    read_classes,
    read_rgb,
    to_float,
)
from latent_diffusion_jax.errors import UserError


class Given(NamedTuple):
    """What a person gave.

    inputs: [N, ...] by name, {} where nothing was given. Of a conditioner, and of an edit: `start`
      (images [N, H, W, 3] to start from) and `hole` ([N, H, W, 1], 1 where to be filled); `guide`
      (images [N, h, w, 3] that samples are to look like).
    size: height and width of the images that it implies, None where it implies none.
    names: of the N rows' files, without suffix; None where they are not from image files.
    about: what to say of each of the N rows, JSON, where files and options do not.
    """

    inputs: dict[str, np.ndarray]
    size: tuple[int, int] | None = None
    names: list[str] | None = None
    about: list[dict[str, Any]] | None = None


def read_inputs(
    config: ConfigDict, asked: Mapping[str, str | None], class_names: Sequence[str] | None
) -> Given:
    """Reads what was asked for as inputs, one row per condition.

    A model that is not conditioned on images takes --image, and --mask, for an edit of them.

    Args:
      config: of phase 2.
      asked: option -> its text; None where it was not given. Of OPTIONS.
      class_names: names that labels may be given by.

    Raises:
      UserError: an option that the model has no use for, or one that it needs and did not get; a
        file that cannot be read, or images of several sizes.
    """
    parts = _parts(config)
    needs, takes = options_of(config)
    edits = "image" not in needs
    for option, text in asked.items():
        if text is not None and option not in takes:
            others = ", ".join(f"--{other}" for other in sorted(takes))
            raise UserError(
                f"--{option}={text}: this model has no such condition; it takes {others}"
            )
    given = [
        READERS[kind].read(section, asked, config, class_names) for kind, section in parts.items()
    ]
    if edits and (asked.get("image") or asked.get("mask")):
        given.append(_edit(asked))
    if asked.get("guide"):
        paths = _paths(asked["guide"], "")
        given.append(Given({"guide": _images(paths)}, names=_stems(paths)))
    inputs = _merged(each.inputs for each in given)
    sizes = {each.size for each in given if each.size}
    if len(sizes) > 1:
        several = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise UserError(f"what is given is of several sizes: {several}")
    count = max((len(rows) for rows in inputs.values()), default=0)
    names = [each.names for each in given if each.names]
    about = [each.about for each in given if each.about]
    turn = np.arange(count)
    return Given(
        {name: rows[turn % len(rows)] for name, rows in inputs.items()},
        next(iter(sizes), None),
        [names[0][i % len(names[0])] for i in turn] if names else None,
        [_merged(each[i % len(each)] for each in about) for i in turn] if about else None,
    )


def options_of(config: ConfigDict) -> tuple[list[str], list[str]]:
    """The OPTIONS that are a model's conditions, and all that it takes."""
    needs = [option for kind in _parts(config) for option in READERS[kind].options]
    edit = ["image", "mask"] if "image" not in needs else []
    return needs, [*needs, *edit, "guide"]


def _parts(config: ConfigDict) -> dict[str, ConfigDict]:
    """The conditions that a person gives, by kind."""
    return {part.kind: part for part in build.conditions(config) if part.kind in READERS}


def _merged(dicts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One of all entries."""
    return {name: value for each in dicts for name, value in each.items()}


def _label(section, asked, config, class_names):
    labels = list(range(section.num_classes))
    if asked.get("class") is not None:
        labels = parse_labels(asked["class"], section.num_classes, class_names)
    about = [{"label": i, **({"class": class_names[i]} if class_names else {})} for i in labels]
    return Given({"label": np.asarray(labels, np.int32)}, about=about)


def _prompt(section, asked, config, class_names):
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
    return Given({"tokens": tokenize(prompts)}, about=[{"prompt": prompt} for prompt in prompts])


def _layout(section, asked, config, class_names):
    path = asked.get("layout")
    if path is None:
        raise UserError(
            'this model needs --layout=FILE.json: a list of {"class": 3, "box": [x0, y0, x1, y1]},'
            " or a list of such lists; classes by number or name, boxes in 0..1"
        )
    text = _read(Path(path))
    try:
        layouts = json.loads(text)
        layouts = layouts if layouts and isinstance(layouts[0], list) else [layouts]
        objects = [
            [
                Object(_class(thing["class"], section, class_names), read_box(thing["box"]))
                for thing in each
            ]
            for each in layouts
        ]
    except ValueError as error:  # a UserError is one
        raise UserError(f"{path!r} is not a layout: {error}") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path!r} is not a layout: {type(error).__name__}: {error}") from error
    options = {name: section[name] for name in ("vocab_size", "max_objects", "num_classes")}
    tokens = [
        layout_tokens(each, encode_crop=section.get("encode_crop", True), **options)
        for each in objects
    ]
    return Given({"tokens": np.stack(tokens)})


def _class(value: str | int, section: Mapping, class_names: Sequence[str] | None) -> int:
    return parse_labels(str(value), section["num_classes"], class_names)[0]


def _lowres(section, asked, config, class_names):
    paths = _paths(asked.get("image"), "--image=FILE or folder, of small images")
    images = _images(paths)
    height, width = images.shape[1:3]
    size = height * section.factor, width * section.factor
    return Given({"lowres": images}, size, _stems(paths))


def _segmentation(section, asked, config, class_names):
    paths = _paths(asked.get("segmentation"), "--segmentation=FILE.png, a class number per pixel")
    maps = _same_size(paths, [_class_map(path, section.num_classes) for path in paths])
    return Given({"segmentation": maps}, maps.shape[1:3], _stems(paths))


def _class_map(path: Path, num_classes: int) -> np.ndarray:
    try:
        classes = read_classes(str(path))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read as an image: {error}") from error
    if classes.max(initial=0) >= num_classes:
        raise UserError(f"{str(path)!r} has class {classes.max()}, not one of 0..{num_classes - 1}")
    return classes.astype(np.int32)


def _inpainting(section, asked, config, class_names):
    paths = _paths(asked.get("image"), "--image=FILE and --mask=FILE (white: to be filled)")
    images = _images(paths)
    hole = _holes(asked.get("mask"), images)
    return Given({"image_to_fill": images, "mask": hole}, images.shape[1:3], _stems(paths))


def _edit(asked: Mapping[str, str | None]) -> Given:
    """Images to start from, and where to be filled."""
    paths = _paths(asked.get("image"), "--image=FILE beside --mask=FILE")
    images = _images(paths)
    inputs = {"start": images}
    if asked.get("mask") is not None:
        inputs["hole"] = _holes(asked["mask"], images)
    return Given(inputs, images.shape[1:3], _stems(paths))


def _holes(text: str | None, images: np.ndarray) -> np.ndarray:
    """float32 [M, H, W, 1] of masks as large as the images [N, H, W, 3], 1 where white."""
    paths = _paths(text, "--mask=FILE beside --image=FILE (white: to be filled)")
    masks = _same_size(paths, [_read_image(path) for path in paths])
    if masks.shape[1:3] != images.shape[1:3]:
        here, there = ("x".join(map(str, x.shape[2:0:-1])) for x in (masks, images))
        raise UserError(f"--mask is {here} pixels, --image {there}: they must be of one size")
    return (masks.mean(axis=-1, keepdims=True) >= 127.5).astype(np.float32)


def _embeddings(section, asked, config, class_names):
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
    return Given({"embeddings": array.astype(np.float32)})


class Reader(NamedTuple):
    """How a kind of condition is given: the options, and what makes inputs of them."""

    options: tuple[str, ...]
    read: Callable[..., Given]


READERS = {
    "label": Reader(("class",), _label),
    "text": Reader(("prompt",), _prompt),
    "clip": Reader(("prompt",), _prompt),
    "layout": Reader(("layout",), _layout),
    "lowres": Reader(("image",), _lowres),
    "segmentation": Reader(("segmentation",), _segmentation),
    "inpainting": Reader(("image", "mask"), _inpainting),
    "embeddings": Reader(("embeddings",), _embeddings),
}
TEXTS = ("class", "prompt")  # the other options name files
OPTIONS = tuple(dict.fromkeys([o for r in READERS.values() for o in r.options] + ["guide"]))


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


def _images(paths: Sequence[Path]) -> np.ndarray:
    """float32 [N, H, W, 3] in [-1, 1]."""
    return to_float(_same_size(paths, [_read_image(path) for path in paths]))


def _stems(paths: Sequence[Path]) -> list[str]:
    return [path.stem for path in paths]


def _same_size(paths: Sequence[Path], images: Sequence[np.ndarray]) -> np.ndarray:
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            (h, w), (height, width) = image.shape[:2], images[0].shape[:2]
            raise UserError(
                f"{str(path)!r} is {w}x{h} pixels, {str(paths[0])!r} {width}x{height}: images of"
                " one call must be of one size"
            )
    return np.stack(images)
