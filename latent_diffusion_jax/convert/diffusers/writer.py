"""A latent diffusion model -> a folder that diffusers loads."""

import inspect
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.conditioning import text as text_conditioning
from latent_diffusion_jax.convert.diffusers import (
    first_stage,
    layouts,
    scheduler,
    text,
    unet,
    unet_config,
)
from latent_diffusion_jax.convert.diffusers.config import Config, write_json
from latent_diffusion_jax.convert.diffusers.folder import (
    NETWORK,
    TRANSFORMER,
    VERSION,
    write_component,
)
from latent_diffusion_jax.convert.diffusers.layouts import Layout
from latent_diffusion_jax.convert.pairs import CONDITIONING, Tensors, array_of, outgoing
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.autoencoder import Autoencoder
from latent_diffusion_jax.nn.transformer import ClipText, TextTransformer
from latent_diffusion_jax.nn.unet import UNet

SHARD = 10 * 1000**3  # bytes, as diffusers
SECTIONS = {
    "first_stage": ("first_stage",),
    "diffusion": ("first_stage", "unet", "conditioning", "diffusion", "latents", "sample"),
}
TOKENIZER_FILES = (
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)


def export(
    directory: str | os.PathLike,
    tensors: Tensors,
    config: Mapping[str, Any] | ConfigDict,
    *,
    tokenizer: str | os.PathLike | None = None,
    max_shard_size: int = SHARD,
) -> str | None:
    """Writes a model as a diffusers pipeline, or a first stage as a single component.

    The folder appears whole or not at all. One tensor at a time is in memory.

    Args:
      directory: to be made; it may exist if it is empty.
      tensors: by CompVis key, in torch's layout: arrays, or functions that make one and may be
        called more than once. The UNet's are those under `model.diffusion_model.`, not averages.
      config: the model's, with sections `first_stage` and, unless that is all, `unet`,
        `conditioning`, `diffusion`, `latents` (with a scale) and `sample`.
      tokenizer: folder of the text encoder's tokenizer, copied along; else the one that the config
        names, if it is a folder.
      max_shard_size: of a file of weights, in bytes.

    Returns:
      The name of the pipeline; None where diffusers has none and the folder holds components.

    Raises:
      UserError: a model that diffusers does not have, a tensor that is missing, a folder in use.
    """
    plain = _plain(config)
    if plain["phase"] == "first_stage":
        alone = _first_stage(tensors, plain, "", 1.0)
        with _new_folder(Path(directory)) as folder:
            write_component(folder, alone.config, alone.stem, alone.tensors, max_shard_size)
        return None
    if plain["latents"]["scale"] is None:
        raise UserError("diffusers needs the latent scale: set config.latents.scale")
    layout = layouts.layout_of(plain)
    parts = _parts(tensors, plain, layout)
    noise = scheduler.to_config(plain["diffusion"], plain["sample"]["timesteps"])
    with _new_folder(Path(directory)) as folder:
        for name, part in parts.items():
            write_component(folder / name, part.config, part.stem, part.tensors, max_shard_size)
        (folder / "scheduler").mkdir()
        path = folder / "scheduler" / "scheduler_config.json"
        write_json(path, {**noise, "_diffusers_version": VERSION})
        classes = {name: (part.library, part.name) for name, part in parts.items()}
        classes["scheduler"] = "diffusers", noise["_class_name"]
        if layout.text:
            classes["tokenizer"] = _copy_tokenizer(folder, plain, tokenizer)
        if layout.pipeline:
            index = layouts.model_index(layout, classes)
            write_json(folder / "model_index.json", {**index, "_diffusers_version": VERSION})
    return layout.pipeline


class Part(NamedTuple):
    """A component: its library and class, config.json, and weights under its own keys."""

    library: str | None
    name: str | None
    config: Config
    stem: str
    tensors: Tensors


def _plain(config: Mapping[str, Any] | ConfigDict) -> Config:
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    plain = {"phase": "diffusion" if "unet" in plain else "first_stage", **plain}
    lacking = [name for name in SECTIONS[plain["phase"]] if name not in plain]
    if lacking:
        raise UserError(f"cannot export to diffusers: the config lacks {', '.join(lacking)}")
    return plain


@contextmanager
def _new_folder(directory: Path) -> Iterator[Path]:
    """A folder that takes the directory's name once everything in it is written."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{str(directory)!r} exists: choose another folder")
    partial = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, directory)
    except OSError as error:
        raise UserError(f"cannot write {str(directory)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _parts(tensors: Tensors, config: Config, layout: Layout) -> dict[str, Part]:
    """Every component by its folder."""
    parts: dict[str, Part] = {}
    stage = config["first_stage"]
    channels, factor = stage.get("image_channels", 3), 1
    if stage["kind"] != "identity":
        scale = float(config["latents"]["scale"])
        parts[layout.first_stage] = _first_stage(tensors, config, first_stage.PREFIX, scale)
        channels, factor = stage["embed_dim"], 2 ** (len(stage["channel_mult"]) - 1)
    size = _image_size(config)
    parts["unet"] = _unet(tensors, config, channels, size and size // factor)
    if layout.text:
        parts[layout.text] = _text(tensors, config)
    elif not layout.pipeline:
        parts["conditioning"] = _conditioning(tensors, config["conditioning"])
    return parts


def _image_size(config: Config) -> int | None:
    return config["data"]["image_size"] if "data" in config else None


def _first_stage(tensors: Tensors, config: Config, prefix: str, scale: float) -> Part:
    section = dict(config["first_stage"])
    if section.pop("kind") == "identity":
        raise UserError("diffusers has no first stage 'identity'")
    network = build.unpack("first_stage", Autoencoder, section)
    theirs = first_stage.to_config(network, scale, _image_size(config))
    made = outgoing(first_stage.pairs(network), tensors, prefix)
    return Part("diffusers", theirs["_class_name"], theirs, NETWORK, made)


def _unet(tensors: Tensors, config: Config, channels: int, size: int | None) -> Part:
    network = build.unpack("unet", UNet, config["unet"], out_channels=channels)
    context = None
    if layouts.CONTEXT & set(layouts.conditions(config["conditioning"])):
        to_k = f"{unet.PREFIX}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        context = _shape(tensors, to_k)[1] if network.transformer_depth else 1
    in_channels = _shape(tensors, f"{unet.PREFIX}input_blocks.0.0.weight")[1]
    theirs = unet_config.to_config(network, in_channels, context, size)
    made = outgoing(unet.pairs(network), tensors, unet.PREFIX)
    return Part("diffusers", theirs["_class_name"], theirs, NETWORK, made)


def _shape(tensors: Tensors, key: str) -> tuple[int, ...]:
    if key not in tensors:
        raise UserError(f"cannot export to diffusers: there is no tensor {key!r}")
    shape = array_of(tensors[key]).shape
    if len(shape) < 2:
        raise UserError(f"cannot export to diffusers: {key!r} is {list(shape)}")
    return shape


def _text(tensors: Tensors, config: Config) -> Part:
    kinds = layouts.conditions(config["conditioning"])
    if "clip" in kinds:
        values = _filled(text_conditioning.clip, kinds["clip"])
        clip = _network(ClipText, values)
        library, name = "transformers", text.CLIP
        theirs, pairs = text.clip_config(clip, values["pad"]), text.clip_pairs(clip)
    else:
        bert = _network(TextTransformer, _filled(text_conditioning.text, kinds["text"]))
        library, name = "latent_diffusion", text.BERT
        theirs, pairs = text.bert_config(bert), text.bert_pairs(bert)
    theirs = {**theirs, "architectures": [name], "dtype": "float32"}
    return Part(library, name, theirs, TRANSFORMER, outgoing(pairs, tensors, text.PREFIX))


def _filled(function: Callable, section: Mapping[str, Any]) -> Config:
    """A section with the defaults of what it is unpacked into."""
    keywords = inspect.signature(function).parameters
    defaults = {name: k.default for name, k in keywords.items() if k.default is not k.empty}
    return {**defaults, **section}


def _network(module: Any, values: Config) -> Any:
    names = set(module.__dataclass_fields__) - {"parent", "name"}
    return build.unpack("conditioning", module, {k: v for k, v in values.items() if k in names})


def _conditioning(tensors: Tensors, section: Config) -> Part:
    weights: dict[str, Any] = {}
    if not set(layouts.conditions(section)) <= layouts.WEIGHTLESS:
        for key, value in tensors.items():
            if key.startswith(CONDITIONING):
                weights[key.removeprefix(CONDITIONING)] = value
        if not weights:
            raise UserError(f"cannot export to diffusers: there are no tensors {CONDITIONING}*")
    return Part(None, None, section, TRANSFORMER, weights)


def _copy_tokenizer(
    folder: Path, config: Config, tokenizer: str | os.PathLike | None
) -> tuple[str | None, str | None]:
    """Copies a tokenizer's files; its library and class, or nulls where there is none."""
    kinds = layouts.conditions(config["conditioning"])
    named = next((s["tokenizer"] for s in kinds.values() if "tokenizer" in s), "")
    source = Path(named if tokenizer is None else tokenizer)
    if tokenizer is None and not (named and source.is_dir()):
        return None, None
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not files:
        raise UserError(f"no tokenizer in {str(source)!r}: expected {', '.join(TOKENIZER_FILES)}")
    (folder / "tokenizer").mkdir()
    for file in files:
        shutil.copyfile(file, folder / "tokenizer" / file.name)
    return "transformers", "CLIPTokenizer" if "clip" in kinds else "BertTokenizer"
