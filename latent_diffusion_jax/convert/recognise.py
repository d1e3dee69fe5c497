"""Which of the shipped configs a checkpoint belongs to, told from its keys and shapes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.convert import compvis
from latent_diffusion_jax.convert.files import Tensor
from latent_diffusion_jax.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
Tensors = Mapping[str, Tensor]


def recognise(tensors: Tensors) -> tuple[str, list[str]]:
    """The config file whose model a checkpoint holds, and the others that fit as well.

    Some published models have the same networks (CelebA-HQ, FFHQ and LSUN bedrooms): nothing in a
    file tells them apart.

    Raises:
      UserError: none fits, or the configs are not there.
    """
    if not CONFIGS.is_dir():
        raise UserError(
            f"no configs in {str(CONFIGS)!r} to recognise a checkpoint by: give --config"
        )
    diffusion = f"{compvis.UNET}out.2.weight" in tensors
    if not diffusion and "encoder.conv_in.weight" not in tensors:
        raise UserError(
            f"not a checkpoint of a first stage or of a latent diffusion model: {len(tensors)}"
            f" tensors, such as {next(iter(tensors), None)!r}"
        )
    folder = CONFIGS / ("diffusion" if diffusion else "first_stage")
    near, fitting = [], []
    for path in sorted(folder.glob("*.py")):
        config = load_config(str(path))
        if "published" not in config or _outline(config) != _outline_of(tensors, config):
            continue
        why = mismatch(tensors, config)
        near.append(f"{path.name}: {why}")
        if why is None:
            fitting.append((_rank(tensors, config), str(path)))
    if not fitting:
        nearest = f"; nearest: {near[0]}" if near else ""
        raise UserError(
            f"no config in {str(folder)!r} fits this checkpoint{nearest}; give --config"
        )
    best, *others = (path for _, path in sorted(fitting))
    return best, others


def _rank(tensors: Tensors, config: ConfigDict) -> tuple[int, bool, bool]:
    """Lowest for the config that reads most of the file, has its schedule, and was published."""
    read = sum(len(jax.tree.leaves(part)) for part in compvis.shapes(config))
    another = False
    if config.phase == "diffusion" and "betas" in tensors:
        another = not compvis.same_schedule(tensors["betas"].read(), build.betas(config))
    return -read, another, "checkpoint" not in config.published


def mismatch(tensors: Tensors, config: ConfigDict) -> str | None:
    """What keeps a checkpoint from filling the networks of a config; None where it does."""
    wanted, prefix = compvis.shapes(config), compvis.prefixes(config)
    for network, tree in {**wanted.params, **wanted.frozen}.items():
        for key, kind, leaf in compvis.leaves(tree, prefix[network]):
            if key not in tensors:
                return f"{key!r} is missing"
            if not compvis.fits(tensors[key].shape, kind, leaf.shape):
                return f"{key!r} is {list(tensors[key].shape)}"
    return None


def _outline(config: ConfigDict) -> tuple[Any, ...]:
    """What tells most configs apart without building anything."""
    stage = config.first_stage
    outline = (stage.get("codebook_size"), stage.channels, len(stage.channel_mult))
    if config.phase == "first_stage":
        return outline
    unet = config.unet
    return (*outline, unet.model_channels, len(unet.channel_mult), unet.channel_mult[-1])


def _outline_of(tensors: Tensors, config: ConfigDict) -> tuple[Any, ...]:
    prefix = "" if config.phase == "first_stage" else compvis.FIRST_STAGE

    def size(key: str) -> int | None:
        return tensors[key].shape[0] if key in tensors and tensors[key].shape else None

    def count(place: str) -> int:
        """How many numbers follow the place in keys."""
        keys = (key for key in tensors if key.startswith(place))
        return len({key.removeprefix(place).split(".")[0] for key in keys})

    outline = (
        size(f"{prefix}quantize.embedding.weight"),
        size(f"{prefix}encoder.conv_in.weight"),
        count(f"{prefix}encoder.down."),
    )
    if config.phase == "first_stage":
        return outline
    channels = size(f"{compvis.UNET}input_blocks.0.0.weight")
    deepest = size(f"{compvis.UNET}middle_block.0.in_layers.0.weight")
    levels = count(f"{compvis.UNET}input_blocks.") // (config.unet.num_res_blocks + 1)
    return (*outline, channels, levels, (deepest or 0) // (channels or 1))
