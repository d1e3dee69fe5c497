"""Checkpoint files and diffusers folders -> workdirs, and back."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_diffusion_jax import build, pipeline
from latent_diffusion_jax.config import load_config, override, stored_config, to_json
from latent_diffusion_jax.convert import compvis, openclip
from latent_diffusion_jax.convert.files import Tensor, open_tensors, write_tensors
from latent_diffusion_jax.convert.recognise import CONFIGS, recognise
from latent_diffusion_jax.errors import UserError, choose
from latent_diffusion_jax.train.checkpoint import write_config, write_weights

UNREAD = (  # beginnings of keys that published files have beyond the networks
    "loss.",
    compvis.EMA,
    f"{compvis.CONDITIONING}transformer.text_model.embeddings.position_ids",
    openclip.OPENCLIP,  # of OpenCLIP, what Stable Diffusion 2 does not use
)
NETWORKS = {"first_stage", "conditioning", "unet"}
DTYPES = ("float32", "float16", "bfloat16")
ORIGINAL = "original"  # folder in a workdir: what its file held beyond the networks


class Source(NamedTuple):
    """An opened checkpoint and the config that its networks are built by.

    original: its tensors as they are in the file; tensors: under this package's names.
    """

    path: str
    original: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    config: ConfigDict


def open_source(path: str, spec: str | None, overrides: list[str]) -> Source:
    """Opens a checkpoint file or a diffusers folder; without `spec` its config is recognised.

    Raises:
      UserError: not a checkpoint, no config that fits, or a noise schedule of another model.
    """
    if Path(path).is_dir():
        from latent_diffusion_jax.convert import diffusers

        original, sections = diffusers.read(path)
    else:
        original, sections = open_tensors(path), {}
    tensors = original
    if openclip.is_openclip(original):  # Stable Diffusion 2
        tensors, _ = openclip.openclip_to_hf(original)
    if spec is None:
        spec = _recognised(path, tensors, sections)
    config = load_config(spec, overrides)
    with config.unlocked():
        for network in NETWORKS & sections.keys():  # of a diffusers folder, which says itself
            config[network] = ConfigDict(sections[network])
    config.data.image_size = sections.get("data", {}).get("image_size", config.data.image_size)
    _settle(config, tensors, sections)
    if "tokenizer" in config.data and (Path(path) / "tokenizer").is_dir():
        config.data.tokenizer = str(Path(path) / "tokenizer")
    return Source(path, original, tensors, override(config, overrides))


def _recognised(path: str, tensors: Mapping[str, Tensor], sections: Mapping[str, Any]) -> str:
    try:
        spec, others = recognise(tensors)
    except UserError:
        if not NETWORKS & sections.keys():
            raise
        folder = "first_stage" if sections["phase"] == "first_stage" else "diffusion"
        spec, others = str(CONFIGS / folder / "folder64.py"), []  # what is not of the networks
    also = f"; {', '.join(Path(o).name for o in others)} fit too: --config" if others else ""
    print(f"{path}: {spec}{also}", flush=True)
    return spec


def _settle(config: ConfigDict, tensors: Mapping[str, Tensor], sections: Mapping[str, Any]) -> None:
    """Takes over what a checkpoint says itself: its latent scale; its schedule must agree."""
    if config.phase == "first_stage":
        return
    for name in ("prediction", "schedule"):
        if name in sections.get("diffusion", {}):
            config.diffusion[name] = sections["diffusion"][name]
    scale = sections.get("latents", {}).get("scale", config.latents.scale)
    if "scale_factor" in tensors:
        scale = float(tensors["scale_factor"].read())
    if scale is None:
        raise UserError("the checkpoint has no scale_factor: give --config.latents.scale=X")
    config.latents.scale = float(scale)
    if "betas" in tensors:
        theirs, ours = tensors["betas"].read().astype(np.float64), build.betas(config)
        if not compvis.same_schedule(theirs, ours):
            raise UserError(
                f"the checkpoint's noise schedule has {len(theirs)} betas from {theirs[0]:.6g} to"
                f" {theirs[-1]:.6g}, the config {len(ours)} from {ours[0]:.6g} to {ours[-1]:.6g}:"
                " set --config.diffusion.schedule.linear_start and .linear_end"
            )


def load_trained(source: Source, mesh: Mesh, *, raw: bool = False) -> pipeline.Trained:
    """A checkpoint as `pipeline.load` gives a workdir, with nothing written."""
    weights = _load(source, mesh, raw)
    config, params = source.config, {**weights.params, **weights.ema}
    if config.phase == "first_stage":
        return pipeline.Trained(config, params, {}, None, 0)
    frozen = {
        "first_stage": {},
        **weights.frozen,
        "latent_scale": jnp.float32(config.latents.scale),
    }
    return pipeline.Trained(config, params, frozen, None, 0)


def import_workdir(source: Source, workdir: str, mesh: Mesh, *, raw: bool = False) -> None:
    """Writes a checkpoint as step 0 of a new workdir, with what it holds beyond the networks.

    Raises:
      UserError: the workdir is in use.
    """
    place, config = Path(workdir), source.config
    if (place / "checkpoints").exists():
        raise UserError(f"{workdir!r} holds checkpoints already: choose another --workdir")
    weights = _load(source, mesh, raw)
    _write_original(source, weights, place / ORIGINAL)
    for name, params in weights.frozen.items():
        if params:
            write_weights(str(place / name), {pipeline.FROZEN[name]: params}, {}, {})
    if "tokenizer" in config.data and Path(config.data.tokenizer).is_dir():
        shutil.copytree(config.data.tokenizer, place / "tokenizer", dirs_exist_ok=True)
        config.data.tokenizer = str(place / "tokenizer")
    meta: dict[str, Any] = {}
    if config.phase == "diffusion":
        meta = {"latent_scale": config.latents.scale, "class_names": None}
    write_weights(workdir, weights.params, weights.ema, meta)
    write_config(workdir, to_json(config))  # last: it says that the rest is there


def _load(source: Source, mesh: Mesh, raw: bool) -> compvis.Weights:
    """The weights; says what the file holds that is neither read nor known to be of no use."""
    weights = compvis.load(source.tensors, source.config, mesh, raw=raw)
    read = {compvis.twin(key) for key in compvis.named(weights, source.config)}
    unknown = [
        f"{key!r} {list(tensor.shape)}"
        for key, tensor in source.tensors.items()
        if compvis.twin(key) not in read and not key.startswith(UNREAD)
    ]
    if unknown:
        print(f"{source.path}: not read: {len(unknown)} tensors, such as {unknown[0]}", flush=True)
    return weights


def _write_original(source: Source, weights: compvis.Weights, place: Path) -> None:
    """The file's layout, and those of its tensors that no network here holds."""
    made = _named(weights, source.config, source.original)
    extra = {
        key: tensor.read
        for key, tensor in source.original.items()
        if not _is_made(key, tensor, made, source.original)
    }
    place.mkdir(parents=True, exist_ok=True)
    layout = [[k, list(t.shape), t.dtype.name] for k, t in source.original.items()]
    (place / "layout.json").write_text(json.dumps(layout))
    write_tensors(place / "extra.safetensors", extra)


def _named(
    weights: compvis.Weights, config: ConfigDict, original: Iterable[str]
) -> dict[str, compvis.Make]:
    """Tensors by key, the text encoder's under the names that the original file has."""
    made = compvis.named(weights, config)
    return openclip.hf_to_openclip(made) if openclip.is_openclip(dict.fromkeys(original)) else made


def _is_made(
    key: str,
    tensor: Tensor,
    made: Mapping[str, compvis.Make],
    tensors: Mapping[str, Tensor],
) -> bool:
    """Whether an export gives this tensor bit for bit without the file it came from."""
    if key in compvis.BUFFERS or key in (f"{compvis.EMA}decay", f"{compvis.EMA}num_updates"):
        return False  # worked out here, they may differ in their last bits
    if key in made:
        return True
    twin = compvis.twin(key)  # inpainting models hold their first stage twice
    return twin in made and np.array_equal(tensor.read(), tensors[twin].read())


def export(workdir: str, target: str, mesh: Mesh, *, dtype: str | None = None) -> None:
    """Writes a workdir as a published checkpoint, `.safetensors` or `.ckpt`, or a diffusers folder.

    A workdir that came from a file gives that file's tensors, in its order and types, with the
    weights as they are now; another one all that a published file of its kind holds. A diffusers
    folder (a target without suffix, or ending in a slash) gets the averaged weights, if any.

    Args:
      workdir: of either phase.
      target: file or folder.
      mesh: to read the weights on.
      dtype: of all weights, one of DTYPES; default: the original's, or float32.

    Raises:
      UserError: nothing to export, or a target of another kind.
    """
    if dtype is not None:
        choose("dtype", dtype, dict.fromkeys(DTYPES))
    config, weights, step = _weights(workdir, mesh)
    if target.endswith("/") or not Path(target).suffix[1:].isalpha():  # sd-v1.5 is a folder
        from latent_diffusion_jax.convert import diffusers

        made = compvis.named(_averaged(weights), config)
        diffusers.export(target, _typed(made, dtype), config.to_dict())
        return
    original = Path(workdir) / ORIGINAL
    if not (original / "layout.json").exists():
        made = compvis.named(weights, config, step)
        write_tensors(target, _typed(made, dtype))
        return
    layout = json.loads((original / "layout.json").read_text())
    if not any(key.startswith(compvis.EMA) for key, _, _ in layout):
        weights = _averaged(weights)
    made = _named(weights, config, [key for key, _, _ in layout])
    extra = open_tensors(original / "extra.safetensors")
    found = {key: _find(key, made, extra) for key, _, _ in layout}
    types = {key: dtype or name for key, _, name in layout}
    shapes = {key: tuple(shape) for key, shape, _ in layout}
    write_tensors(target, {key: _as(make, types[key], shapes[key]) for key, make in found.items()})


def _weights(workdir: str, mesh: Mesh) -> tuple[ConfigDict, compvis.Weights, int]:
    """A workdir's config, its weights and averages, and the step that they are of."""
    config = stored_config(workdir)
    frozen = {} if config.phase == "first_stage" else pipeline.load_frozen(config, workdir, mesh)
    step, state, meta = pipeline.restore(config, workdir, mesh)
    if config.phase == "diffusion":
        config.latents.scale = meta["latent_scale"]
    return config, compvis.Weights(state.params, state.ema, frozen), step


def _averaged(weights: compvis.Weights) -> compvis.Weights:
    return compvis.Weights({**weights.params, **weights.ema}, {}, weights.frozen)


def _find(key: str, made: Mapping[str, Any], extra: Mapping[str, Tensor]) -> Any:
    if key in extra:
        return extra[key].read
    return made[key] if key in made else made[compvis.twin(key)]


def _typed(made: Mapping[str, compvis.Make], dtype: str | None) -> dict[str, compvis.Make]:
    return {key: _as(make, dtype) for key, make in made.items()} if dtype else dict(made)


def _as(make: compvis.Make, dtype: str, shape: tuple[int, ...] | None = None) -> compvis.Make:
    """The same tensor, in another type where it holds numbers that allow it."""

    def convert() -> np.ndarray:
        array = make()
        if jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(jnp.dtype(dtype), copy=False)
        return array if shape is None else array.reshape(shape)

    return convert
