"""A diffusers folder -> a CompVis state dict and the sections of a config."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_diffusion_jax import build
from latent_diffusion_jax.convert.diffusers import (
    first_stage,
    layouts,
    scheduler,
    text,
    unet,
    unet_config,
)
from latent_diffusion_jax.convert.diffusers.config import Config, read_json
from latent_diffusion_jax.convert.diffusers.folder import open_weights
from latent_diffusion_jax.convert.files import Tensor
from latent_diffusion_jax.convert.pairs import CONDITIONING, incoming
from latent_diffusion_jax.errors import UserError, choose

Tensors = dict[str, Tensor]
Part = tuple[Tensors, Config]

# Names of earlier releases, in a network's attention.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD = re.compile(rf"(attentions\.\d+)\.({'|'.join(OLD_NAMES)})\.(weight|bias)$")
POSITIONS = "embeddings.position_ids"  # a constant that old CLIP folders hold


def read(directory: str | os.PathLike) -> tuple[Tensors, Config]:
    """Opens a diffusers folder: a pipeline, or a single component.

    Returns:
      Tensors by CompVis key, in torch's layout, each read from disk when it is asked for (a first
      stage alone has the keys of a first stage's checkpoint, without prefix); and the sections of a
      config that the folder tells: `phase`, `first_stage`, `unet`, `conditioning`, `diffusion`
      (`schedule`, `prediction`), `latents` (`scale`), `sample` (`timesteps`), `data`
      (`image_size`). What only training needs is not in there.

    Raises:
      UserError: no such folder, or a model that this package does not have.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}")
    if (folder / "config.json").is_file():
        return _component(folder, alone=True)
    if not (folder / "unet").is_dir():
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise UserError(
            f"{str(folder)!r} has neither config.json nor unet/: not a diffusers folder ({names})"
        )
    return _pipeline(folder)


def _component(folder: Path, alone: bool = False) -> Part:
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    architectures = config.get("architectures")
    if name is None and isinstance(architectures, list) and architectures:  # transformers'
        name = architectures[0]
    known = {kind: READERS[kind] for kind in (READERS if alone else FOLDERS[folder.name])}
    reader = choose(f"class in {str(folder / 'config.json')!r}:", str(name), known)
    return reader(folder, {**config, "_class_name": name}, alone)


def _first_stage(folder: Path, config: Config, alone: bool) -> Part:
    place = str(folder / "config.json")
    section, network = first_stage.from_config(config, place)
    prefix = "" if alone else first_stage.PREFIX
    stored = _renamed(open_weights(folder))
    tensors = incoming(first_stage.pairs(network), stored, prefix, str(folder))
    sections: Config = dict(
        phase="first_stage",
        first_stage=section,
        latents=dict(scale=first_stage.scale_of(config, place)),
    )
    size = config.get("sample_size")
    if alone and isinstance(size, int):
        sections["data"] = dict(image_size=size)
    return tensors, sections


def _unet(folder: Path, config: Config, alone: bool) -> Part:
    section, network = unet_config.from_config(config, str(folder / "config.json"))
    stored = _renamed(open_weights(folder))
    tensors = incoming(unet.pairs(network), stored, unet.PREFIX, str(folder))
    config = {**unet_config.DEFAULTS[config["_class_name"]], **config}
    width = network.model_channels
    for name, shape in (
        ("conv_in.weight", (width, config["in_channels"], 3, 3)),
        ("conv_out.weight", (network.out_channels, width, 3, 3)),
    ):
        if stored[name].shape != shape:
            raise UserError(
                f"{str(folder)!r}: {name!r} is {list(stored[name].shape)}; by config.json it is"
                f" {list(shape)}"
            )
    size = config["sample_size"]
    told = dict(sample_size=size) if isinstance(size, int) and not alone else {}
    return tensors, dict(phase="diffusion", unet=section, **told)


def _clip(folder: Path, config: Config, alone: bool) -> Part:
    section, network = text.clip_section(config, str(folder / "config.json"))
    stored = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in open_weights(folder).items()
        if not name.endswith(POSITIONS)
    }
    return _text(
        folder, section, incoming(text.clip_pairs(network), stored, text.PREFIX, str(folder))
    )


def _bert(folder: Path, config: Config, alone: bool) -> Part:
    section, network = text.bert_section(config, str(folder / "config.json"))
    stored = open_weights(folder)
    return _text(
        folder, section, incoming(text.bert_pairs(network), stored, text.PREFIX, str(folder))
    )


def _text(folder: Path, section: Config, tensors: Tensors) -> Part:
    tokenizer = folder.parent / "tokenizer"
    if tokenizer.is_dir():
        section = {**section, "tokenizer": str(tokenizer)}
    return tensors, dict(phase="diffusion", conditioning=section)


READERS = {
    first_stage.KL: _first_stage,
    first_stage.VQ: _first_stage,
    unet_config.CONDITIONAL: _unet,
    unet_config.PLAIN: _unet,
    text.CLIP: _clip,
    text.BERT: _bert,
}
FOLDERS = {
    **dict.fromkeys(("vae", "vqvae"), (first_stage.KL, first_stage.VQ)),
    "unet": (unet_config.CONDITIONAL, unet_config.PLAIN),
    "text_encoder": (text.CLIP,),
    "bert": (text.BERT,),
}


def _renamed(tensors: Mapping[str, Tensor]) -> Tensors:
    def new(match: re.Match) -> str:
        return f"{match[1]}.{OLD_NAMES[match[2]]}.{match[3]}"

    return {OLD.sub(new, name): tensor for name, tensor in tensors.items()}


def _pipeline(folder: Path) -> Part:
    tensors: Tensors = {}
    sections: Config = dict(
        first_stage=dict(kind="identity"), latents=dict(scale=1.0), conditioning=dict(kind="none")
    )
    for name in FOLDERS:
        if (folder / name).is_dir():
            found, told = _component(folder / name)
            tensors |= found
            sections |= told
    place = folder / "scheduler" / "scheduler_config.json"
    noise, timesteps = scheduler.from_config(read_json(place), str(place))
    sections |= dict(phase="diffusion", diffusion=noise, sample=dict(timesteps=timesteps))
    return tensors | _condition(folder, sections, tensors), sections


def _condition(folder: Path, sections: Config, tensors: Tensors) -> Tensors:
    """Adds what the UNet's channels tell of the condition; weights in `conditioning/`, if any."""
    in_channels = tensors[f"{unet.PREFIX}input_blocks.0.0.weight"].shape[1]
    out_channels = tensors[f"{unet.PREFIX}out.2.weight"].shape[0]
    stage = sections["first_stage"]
    if stage["kind"] == "identity":
        stage["image_channels"] = out_channels
    latent = stage.get("embed_dim", out_channels)
    factor = 2 ** (len(stage.get("channel_mult", (1,))) - 1)
    if latent != out_channels:
        raise UserError(
            f"{str(folder)!r}: the unet gives {out_channels} channels, the first stage's latent has"
            f" {latent}"
        )
    if "sample_size" in sections:
        sections["data"] = dict(image_size=sections.pop("sample_size") * factor)
    place = folder / "conditioning"
    if place.is_dir():
        return _told(place, sections)
    told = _beside(folder, sections["conditioning"], in_channels - latent, latent, factor)
    sections["conditioning"] = told
    reads = sections["unet"]["transformer_depth"] > 0
    if reads != bool(set(layouts.conditions(told)) & layouts.CONTEXT):
        raise UserError(
            f"{str(folder)!r} has no text_encoder/ or bert/ beside a unet that reads one"
        )
    return {}


def _told(place: Path, sections: Config) -> Tensors:
    """The condition of a model for which diffusers has no pipeline."""
    path = place / "config.json"
    sections["conditioning"] = _listless(read_json(path))
    try:
        kinds = set(layouts.conditions(sections["conditioning"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} tells no kind of condition") from error
    for kind in kinds:
        choose(f"condition in {str(path)!r}:", kind, build.CONDITIONERS)
    if kinds <= layouts.WEIGHTLESS:
        return {}
    return {CONDITIONING + key: tensor for key, tensor in open_weights(place).items()}


def _beside(folder: Path, section: Config, more: int, latent: int, factor: int) -> Config:
    """The condition, from the channels that the UNet takes beside the latent."""
    if more == 0:
        return section
    if more == latent + 1 and section["kind"] == "clip":
        image = dict(kind="inpainting", mask="stable_diffusion")
        return dict(kind="several", text=section, inpainting=image)
    index = folder / "model_index.json"
    pipeline = read_json(index).get("_class_name") if index.is_file() else None
    if more == 3 and section["kind"] == "none" and pipeline == layouts.SUPER_RESOLUTION:
        return dict(kind="lowres", factor=factor)
    raise UserError(
        f"{str(folder)!r}: the unet takes {more} channels beside the latent, and nothing says which"
    )


def _listless(section: Any) -> Any:
    """Tuples for lists, as configs have them."""
    if isinstance(section, dict):
        return {key: _listless(value) for key, value in section.items()}
    return tuple(map(_listless, section)) if isinstance(section, list) else section
