"""One component of a pipeline: a folder with a config.json and weights."""

from collections.abc import Mapping
from pathlib import Path

from latent_diffusion_jax.convert.diffusers.config import Config, write_json
from latent_diffusion_jax.convert.files import Tensor, open_tensors, write_tensors
from latent_diffusion_jax.convert.pairs import Tensors
from latent_diffusion_jax.errors import UserError

VERSION = "0.42.0"  # of diffusers, whose format this is
METADATA = {"format": "pt"}
NETWORK, TRANSFORMER = "diffusion_pytorch_model", "model"
STEMS = (NETWORK, TRANSFORMER, "pytorch_model")
SUFFIXES = (
    *("safetensors", "safetensors.index.json", "bin", "bin.index.json"),
    *("fp16.safetensors", "fp16.bin"),
)


def write_component(folder: Path, config: Config, stem: str, tensors: Tensors, limit: int):
    """Writes config.json and the weights, in files of at most `limit` bytes (or one tensor)."""
    folder.mkdir(parents=True, exist_ok=True)
    if "_class_name" in config:
        config = {**config, "_diffusers_version": VERSION}
    write_json(folder / "config.json", config)
    if tensors:
        write_weights(folder, stem, tensors, limit)


def write_weights(folder: Path, stem: str, tensors: Tensors, limit: int) -> None:
    """Writes the weights as one file, which is dealt to several where it is above the limit."""
    whole = folder / f"{stem}.safetensors"
    write_tensors(whole, tensors, METADATA)
    if whole.stat().st_size <= limit:
        return
    stored = open_tensors(whole)
    shards = _deal(stored, limit)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / name, {key: stored[key].read for key in names}, METADATA)
        weight_map.update(dict.fromkeys(names, name))
    total = sum(_nbytes(tensor) for tensor in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", index)
    whole.unlink()


def _nbytes(tensor: Tensor) -> int:
    size = tensor.dtype.itemsize
    for n in tensor.shape:
        size *= n
    return size


def _deal(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = limit
    for name, tensor in tensors.items():
        if shards[-1] and _nbytes(tensor) > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= _nbytes(tensor)
    return shards


def open_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a component, read when asked for; half precision where there is nothing else.

    Raises:
      UserError: no weights are there, or files that are not what they should be.
    """
    for suffix in SUFFIXES:
        for stem in STEMS:
            path = folder / f"{stem}.{suffix}"
            if path.is_file():
                return open_tensors(path)
    raise UserError(f"no weights in {str(folder)!r}: expected {NETWORK}.safetensors or the like")
