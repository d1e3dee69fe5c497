"""From a config to the objects it describes; the only module that knows every part.

Nothing here reads a workdir or allocates a parameter. A section of the config is unpacked whole
into the constructor it names, so that a key which nobody takes is an error.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_diffusion_jax.conditioning.cond import Cond, Conditioner, unconditional
from latent_diffusion_jax.conditioning.label import label
from latent_diffusion_jax.data.sources import SOURCES, make_source
from latent_diffusion_jax.diffusion import objective as diffusion_objective
from latent_diffusion_jax.diffusion.schedule import SCHEDULES, Schedule, make_schedule
from latent_diffusion_jax.errors import UserError, choose
from latent_diffusion_jax.first_stage import objective as first_stage_objective
from latent_diffusion_jax.first_stage.autoencoder import Autoencoder
from latent_diffusion_jax.first_stage.stage import (
    FIRST_STAGES,
    FirstStage,
    check_image_size,
    make_first_stage,
)
from latent_diffusion_jax.nn.unet import UNet
from latent_diffusion_jax.train.objective import Objective, make_objective
from latent_diffusion_jax.train.optim import SCHEDULES as LR_SCHEDULES
from latent_diffusion_jax.train.optim import make_lr_schedule, make_optimizer
from latent_diffusion_jax.train.sharding import make_gather

CONDITIONERS: dict[str, Callable[..., Conditioner]] = {"none": unconditional, "label": label}
PHASES = ("first_stage", "diffusion")


def unpack(
    section: str,
    function: Callable,
    options: Mapping[str, Any],
    *,
    takes: Sequence[Callable] = (),
    **given: Any,
) -> Any:
    """Calls `function(**given, **options)` with a section of the config, its keys checked first.

    `takes` are the functions that `function` passes its further keywords on to.

    Raises:
      UserError: a key that is unknown or missing.
    """
    options = _plain(options)
    keywords: dict[str, inspect.Parameter] = {}
    for taker in (function, *takes):
        keywords = {**_keywords(taker), **keywords}
    keywords = {name: keyword for name, keyword in keywords.items() if name not in given}
    for name in options:
        choose(f"key in config.{section}:", name, keywords)
    missing = [n for n, k in keywords.items() if k.default is k.empty and n not in options]
    if missing:
        raise UserError(f"config.{section} lacks {', '.join(sorted(missing))}")
    return function(**given, **options)


def _keywords(function: Callable) -> dict[str, inspect.Parameter]:
    keywords = dict(inspect.signature(function).parameters)
    if isinstance(function, type) and issubclass(function, nn.Module):
        del keywords["parent"], keywords["name"]  # flax's, not the config's
    return {name: k for name, k in keywords.items() if k.kind is not k.VAR_KEYWORD}


def _plain(value: Any) -> Any:
    """Config values as constructors want them: plain dicts, and tuples, which hash, for lists."""
    if isinstance(value, Mapping | ConfigDict):
        return {k: _plain(v) for k, v in value.items()}
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


def source(config: ConfigDict, split: str):
    """The data of a split, "train" or "validation"."""
    takes = choose("data source", config.data.source.name, SOURCES)
    return unpack("data.source", make_source, config.data.source, takes=[takes], split=split)


def dtype(config: ConfigDict) -> Any:
    """What networks compute in; parameters are float32."""
    return choose("dtype", config.dtype, {"float32": jnp.float32, "bfloat16": jnp.bfloat16})


def first_stage(config: ConfigDict) -> FirstStage:
    """The first stage, checked against the image size of the data."""
    make = choose("first stage", config.first_stage.kind, FIRST_STAGES)
    stage = unpack(
        "first_stage",
        make_first_stage,
        config.first_stage,
        takes=[make] if config.first_stage.kind == "identity" else [make, Autoencoder],
        dtype=dtype(config),
    )
    check_image_size(stage, config.data.image_size)
    return stage


def conditioner(config: ConfigDict) -> Conditioner:
    """The conditioner."""
    section = dict(config.conditioning)
    make = choose("conditioning", section.pop("kind"), CONDITIONERS)
    return unpack("conditioning", make, section)


def schedule(config: ConfigDict) -> Schedule:
    """The noise schedule."""
    section = config.diffusion.schedule
    takes = choose("schedule", section.name, SCHEDULES)
    return unpack("diffusion.schedule", make_schedule, section, takes=[takes])


def unet(config: ConfigDict) -> UNet:
    """The UNet; its output has the latent's channels."""
    return unpack(
        "unet",
        UNet,
        config.unet,
        out_channels=first_stage(config).channels,
        dtype=dtype(config),
    )


def latent_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(h, w, c) of the latent of a training image.

    Raises:
      UserError: the UNet cannot halve it often enough.
    """
    stage = first_stage(config)
    side = config.data.image_size // stage.factor
    if config.phase == "diffusion":
        halvings = 2 ** (len(config.unet.channel_mult) - 1)
        if side % halvings:
            raise UserError(
                f"latents of {side}x{side} (image size {config.data.image_size}, f ="
                f" {stage.factor}) cannot be halved for the {len(config.unet.channel_mult)} levels"
                f" of unet.channel_mult: image size must be a multiple of"
                f" {halvings * stage.factor}"
            )
    return side, side, stage.channels


def init_params(config: ConfigDict) -> Callable[[jax.Array], dict]:
    """key -> the parameters that the config's phase trains, by network."""
    if config.phase == "first_stage":
        stage = first_stage(config)
        return lambda key: {"autoencoder": stage.init(key)}
    network, condition = unet(config), conditioner(config)
    shape = latent_shape(config)

    def init(key):
        unet_key, cond_key = jax.random.split(key)
        learned = condition.init(cond_key)
        inputs = {name: jnp.zeros((1,), jnp.int32) for name in condition.keys}
        cond = condition.apply(learned, inputs)
        z, t = jnp.zeros((1, *shape)), jnp.zeros((1,), jnp.int32)
        params = {"unet": network.init(unet_key, z, t, cond)["params"]}
        return {**params, "conditioning": learned} if learned else params

    return init


def latents(config: ConfigDict) -> Callable[[Any, Mapping, jax.Array], jax.Array]:
    """(frozen, batch, key) -> scaled latents, encoded from images or drawn from cached moments."""
    stage = first_stage(config)

    def online(frozen, batch, key):
        moments = stage.encode(frozen["first_stage"], batch["image"])
        return frozen["latent_scale"] * stage.sample(moments, key)

    def cached(frozen, batch, key):
        return frozen["latent_scale"] * stage.sample(batch["moments"], key)

    return choose("latents.source", config.latents.source, {"online": online, "cache": cached})


def denoise_network(config: ConfigDict) -> Callable[..., jax.Array]:
    """(unet params, z_t, t, cond, dropout key or None) -> the network's output."""
    network = unet(config)

    def apply(params, z_t, t, cond: Cond, key=None):
        rngs = None if key is None else {"dropout": key}
        return network.apply({"params": params}, z_t, t, cond, key is not None, rngs=rngs)

    return apply


def loss(config: ConfigDict) -> Callable:
    """(params, frozen, batch, key, train) -> (loss, metrics) of the config's phase."""
    if config.phase == "first_stage":
        stage = first_stage(config)
        kind = config.first_stage.kind
        takes = choose("trainable first stage", kind, first_stage_objective.LOSSES)
        return unpack(
            "loss",
            first_stage_objective.make_loss,
            config.loss,
            takes=[takes],
            stage=stage,
            kind=kind,
        )
    section = dict(config.diffusion)
    section.pop("schedule")
    return unpack(
        "diffusion",
        diffusion_objective.make_loss,
        section,
        denoise_network=denoise_network(config),
        conditioner=conditioner(config),
        latents=latents(config),
        schedule=schedule(config),
    )


def objective(config: ConfigDict, mesh: Mesh | None = None) -> Objective:
    """What the config's phase optimises; `mesh` is the one that its state will be split over."""
    choose("phase", config.phase, dict.fromkeys(PHASES))
    takes = choose("learning-rate schedule", config.optim.schedule.name, LR_SCHEDULES)
    # for its keys: make_optimizer builds it again
    unpack("optim.schedule", make_lr_schedule, config.optim.schedule, takes=[takes])
    phase_loss = loss(config)
    if mesh is not None:
        phase_loss = _gathering(phase_loss, mesh)
    tx, lr_at = unpack("optim", make_optimizer, config.optim)
    section = dict(config.train)
    section.pop("batch_size")
    return unpack(
        "train",
        make_objective,
        section,
        init_params=init_params(config),
        loss=phase_loss,
        tx=tx,
        lr_at=lr_at,
    )


def _gathering(loss: Callable, mesh: Mesh) -> Callable:
    gather = make_gather(mesh)
    return lambda params, frozen, *rest: loss(gather(params), gather(frozen), *rest)


def batch_keys(config: ConfigDict, cached: bool = False) -> tuple[str, ...]:
    """The entries of an example that training reads; `cached` moments stand for images."""
    if config.phase == "first_stage":
        return ("image",)
    return ("moments" if cached else "image", *conditioner(config).keys)
