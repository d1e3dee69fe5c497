"""What images are asked for with, kept inside their PNGs, from which they can be made again.

All of it is there, uploads too: whoever has the file has the photo that was changed.
"""

import base64
import dataclasses
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from latent_diffusion_jax import build
from latent_diffusion_jax.data.transforms import to_uint8
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.inputs import OPTIONS, TEXTS, Given, read_inputs
from latent_diffusion_jax.pipeline import Trained
from latent_diffusion_jax.train.checksum import digest

KEY = "latent_diffusion_jax"  # of the PNG's text
MAX_NUMBER = 16  # images of one run
MAX_PIXELS = 2**22  # of an image that is given, or asked for


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run of the sampler, all that its images depend on but the model.

    Args:
      seed: image i depends on it and i.
      number: images of the run, which are one batch.
      sampler, options, steps, timesteps, scale: as `sampling.make_generate` takes them.
      size: height and width; None where the files given say it, or as in training.
      strength: of the change of an image given; None for the default.
      texts: of the options TEXTS, as the command line takes them.
      files: of the other OPTIONS: the file's name and what is in it.
    """

    seed: int
    number: int
    sampler: str
    options: Mapping[str, float]
    steps: int
    timesteps: str
    scale: float
    size: tuple[int, int] | None = None
    strength: float | None = None
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, tuple[str, bytes]] = dataclasses.field(default_factory=dict)


def read_given(settings: Settings, trained: Trained) -> Given:
    """The inputs of all its images.

    Raises:
      UserError: what the model does not take or lacks, a file that is not what it should be, or
        one that is too large.
    """
    for option, text in settings.texts.items():
        if text.startswith("@"):  # a file of this machine, to `sample`
            raise UserError(f"{option} {text!r} must not begin with @")
    with tempfile.TemporaryDirectory() as folder:
        asked: dict[str, str | None] = dict.fromkeys(OPTIONS) | dict(settings.texts)
        for option, (name, content) in settings.files.items():
            path = Path(folder, option, Path(name).name)
            path.parent.mkdir()
            path.write_bytes(content)
            check_pixels(path)
            asked[option] = str(path)
        try:
            given = read_inputs(trained.config, asked, trained.class_names)
        except UserError as error:
            line = str(error)
            for option in settings.files:
                line = line.replace(f"{Path(folder, option)}/", "")
            raise UserError(line) from error
    _check_sizes(settings, given)
    turn = np.arange(settings.number)
    return given._replace(inputs={k: rows[turn % len(rows)] for k, rows in given.inputs.items()})


def check_pixels(path: Path) -> None:
    """Raises UserError for a huge image, before it is decoded: its file can be small."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise UserError(f"{path.name!r} is too large an image: {error}") from error
    except OSError:
        return  # not an image: who reads it says so, if it was to be one
    if width * height > MAX_PIXELS:
        raise UserError(f"{path.name!r} is {width}x{height} pixels, more than {MAX_PIXELS} in all")


def _check_sizes(settings: Settings, given: Given) -> None:
    if settings.size and given.size and settings.size != given.size:
        asked, made = (f"{height}x{width}" for height, width in (settings.size, given.size))
        raise UserError(f"size {asked}: the image given makes {made}")
    height, width = settings.size or given.size or (1, 1)
    if height * width > MAX_PIXELS:
        raise UserError(f"images of {height}x{width} have more than {MAX_PIXELS} pixels")


def fingerprint(trained: Trained) -> str:
    """Of the weights and of what they are computed in: of other ones come other images."""
    dtype = np.dtype(build.dtype(trained.config)).name
    return f"{digest((trained.params, trained.frozen))} {dtype}"


def write_png(image: np.ndarray, index: int, settings: Settings, model: str) -> bytes:
    """Image `index` of a run, [H, W, 3] in [-1, 1], as a PNG; `model` is its `fingerprint`."""
    made = dataclasses.asdict(settings)
    made["files"] = {
        option: [name, base64.b64encode(content).decode()]
        for option, (name, content) in settings.files.items()
    }
    text = PngImagePlugin.PngInfo()
    text.add_text(KEY, json.dumps({"model": model, "index": index, **made}))
    out = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(out, "png", pnginfo=text)
    return out.getvalue()


def read_png(path: str) -> tuple[Settings, int, str]:
    """What `write_png` was given, but for the image: (settings, index, model).

    Raises:
      UserError: not a PNG, or not one with settings.
    """
    try:
        with Image.open(path) as image:
            image.load()  # text may come after the pixels
            text = image.info.get(KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path!r} cannot be read as an image: {error}") from error
    if text is None:
        raise UserError(f"{path!r} holds no settings: it is not of `demo`, or was saved anew")
    try:
        return _parse(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path!r} holds broken settings: {error}") from error


def _parse(made: dict[str, Any]) -> tuple[Settings, int, str]:
    """Anybody may have written it: only numbers, text of TEXTS and bytes come out."""
    index, model = int(made.pop("index")), str(made.pop("model"))
    whole: dict[str, Any] = {name: int(made.pop(name)) for name in ("seed", "number", "steps")}
    names: dict[str, Any] = {name: str(made.pop(name)) for name in ("sampler", "timesteps")}
    files = {
        _known(option, sorted(set(OPTIONS) - set(TEXTS))): (
            str(name),
            base64.b64decode(content, validate=True),
        )
        for option, (name, content) in made.pop("files").items()
    }
    settings = Settings(
        **whole,
        **names,
        scale=float(made.pop("scale")),
        options={str(name): float(value) for name, value in made.pop("options").items()},
        size=_size(made.pop("size")),
        strength=None if (strength := made.pop("strength")) is None else float(strength),
        texts={_known(option, TEXTS): str(text) for option, text in made.pop("texts").items()},
        files=files,
    )
    if made:
        raise ValueError(f"unknown {', '.join(made)}")
    if not 0 <= index < settings.number <= MAX_NUMBER or not 0 <= settings.seed < 2**32:
        raise ValueError(f"index {index} of {settings.number}, seed {settings.seed}")
    return settings, index, model


def _known(option: str, options: Any) -> str:
    if option not in options:
        raise ValueError(f"unknown {option!r}; one of {', '.join(options)}")
    return option


def _size(pair: Any) -> tuple[int, int] | None:
    if pair is None:
        return None
    height, width = map(int, pair)
    return height, width
