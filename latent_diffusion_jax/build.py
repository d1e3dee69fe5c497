"""From a config to the objects it describes; the only module that knows every part.

Nothing here reads a workdir or allocates a parameter. A section of the config is unpacked whole
into the constructor it names, so that a key which nobody takes is an error.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_diffusion_jax.conditioning.cond import Cond, Conditioner, together, unconditional
from latent_diffusion_jax.conditioning.label import label
from latent_diffusion_jax.conditioning.layout import layout
from latent_diffusion_jax.conditioning.spatial import embeddings, inpainting, lowres, segmentation
from latent_diffusion_jax.conditioning.text import clip, text
from latent_diffusion_jax.config import read_config
from latent_diffusion_jax.data.sources import SOURCES, make_source
from latent_diffusion_jax.diffusion import objective as diffusion_objective
from latent_diffusion_jax.diffusion.schedule import SCHEDULES, Schedule, make_betas, make_schedule
from latent_diffusion_jax.errors import UserError, choose
from latent_diffusion_jax.examples import KINDS, Prepare
from latent_diffusion_jax.first_stage import objective as first_stage_objective
from latent_diffusion_jax.first_stage.adversary import Adversary, check_patches, make_adversary
from latent_diffusion_jax.first_stage.autoencoder import Autoencoder
from latent_diffusion_jax.first_stage.lpips import Lpips
from latent_diffusion_jax.first_stage.stage import (
    FIRST_STAGES,
    FirstStage,
    check_image_size,
    make_first_stage,
)
from latent_diffusion_jax.nn.unet import UNet
from latent_diffusion_jax.train.objective import Criterion, Objective, from_loss, make_objective
from latent_diffusion_jax.train.optim import OPTIMIZERS, make_lr_schedule, make_optimizer
from latent_diffusion_jax.train.optim import SCHEDULES as LR_SCHEDULES
from latent_diffusion_jax.train.sharding import gather, split

CONDITIONERS: dict[str, Callable[..., Conditioner]] = {
    "none": unconditional,
    "label": label,
    "text": text,
    "clip": clip,
    "layout": layout,
    "segmentation": segmentation,
    "lowres": lowres,
    "inpainting": inpainting,
    "embeddings": embeddings,
}
PHASES = ("first_stage", "diffusion")
LOADER = ("source", "image_size", "crop", "flip")  # keys of section data; the others: `prepare`'s


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


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the shapes that a function gives for a config: tracing a network takes seconds."""
    signature = inspect.signature(function)

    @functools.lru_cache(maxsize=8)
    def of_text(text: str, *options: Any) -> Any:
        return function(read_config(text), *options)

    @functools.wraps(function)
    def call(config: ConfigDict, *options: Any, **named: Any) -> Any:
        given = signature.bind(config, *options, **named)
        given.apply_defaults()
        kept = of_text(config.to_json(sort_keys=True), *given.args[1:])
        return jax.tree.map(lambda x: x, kept)  # in dicts that may be changed

    return call


def source(config: ConfigDict, split: str):
    """The data of a split, "train" or "validation"."""
    takes = choose("data source", config.data.source.name, SOURCES)
    return unpack("data.source", make_source, config.data.source, takes=[takes], split=split)


def dtype(config: ConfigDict) -> Any:
    """What networks compute in; parameters are float32."""
    return choose("dtype", config.dtype, {"float32": jnp.float32, "bfloat16": jnp.bfloat16})


def in_compute_dtype(config: ConfigDict, params: Mapping[str, Any]) -> dict[str, Any]:
    """Params, by network, to use and not to train: kernels of UNet and first stage as multiplied.

    Networks cast them in every call otherwise, and float32 ones stay in memory beside what was
    cast. Results are the same; but on CPUs the few layers that compute in float32 all the same
    (`nn/products.py`) get rounded kernels. All else stays float32.
    """
    if dtype(config) == jnp.float32:
        return dict(params)

    def cast(path, x):
        return x.astype(dtype(config)) if path[-1].key == "kernel" else x

    used = {n: tree for n, tree in params.items() if n in ("unet", "autoencoder", "first_stage")}
    shardings = jax.tree.map(lambda x: x.sharding, used)
    run = functools.partial(jax.tree.map_with_path, cast)
    return {**params, **jax.jit(run, out_shardings=shardings)(used)}


def first_stage(config: ConfigDict) -> FirstStage:
    """The first stage, checked against the image size of the data."""
    make = choose("first stage", config.first_stage.kind, FIRST_STAGES)
    _check_groups(config.first_stage, "first_stage", "channels")
    stage = unpack(
        "first_stage",
        make_first_stage,
        config.first_stage,
        takes=[make] if config.first_stage.kind == "identity" else [make, Autoencoder],
        dtype=dtype(config),
    )
    check_image_size(stage, config.data.image_size)
    return stage


def conditions(config: ConfigDict) -> list[ConfigDict]:
    """The sections of the model's conditions: one, or those of kind "several"."""
    section = config.conditioning
    if section.kind != "several":
        return [section]
    return [part for name, part in section.items() if name != "kind"]


def conditioner(config: ConfigDict, cached: bool = False) -> Conditioner:
    """The conditioner; kind "several" has one in each of its other keys.

    A `cached` one reads what `encode` stored where that is what a frozen network made.
    """

    def make(name: str, section: Mapping[str, Any]) -> Conditioner:
        options = dict(section)
        kind = options.pop("kind")
        if kind == "several":
            return together({k: make(f"{name}.{k}", part) for k, part in options.items()})
        function = choose("conditioning", kind, CONDITIONERS)
        given = {"dtype": dtype(config)} if "dtype" in _keywords(function) else {}
        return unpack(name, function, options, **given)

    made = make("conditioning", config.conditioning)
    return made.encoded if cached and made.encoded else made


def inputs(config: ConfigDict, rows: int, cached: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of what the conditioner reads, for a batch of training images."""
    side = config.data.image_size
    entries = conditioner(config, cached).inputs(side, side)
    return {k: jax.ShapeDtypeStruct((rows, *s.shape), s.dtype) for k, s in entries.items()}


def prepare(config: ConfigDict) -> Prepare:
    """(example, generator) -> what the conditioner reads of it."""
    makers = [(part, choose("conditioning", part.kind, KINDS)) for part in conditions(config)]
    options = {name: value for name, value in config.data.items() if name not in LOADER}
    taken = {name for _, make in makers for name in _keywords(make)} - {"conditioning"}
    for name in options:
        choose("key in config.data:", name, {**dict.fromkeys(taken), **dict.fromkeys(LOADER)})
    made = []
    for part, make in makers:
        own = {name: value for name, value in options.items() if name in _keywords(make)}
        made.append(unpack("data", make, own, conditioning=part))

    def all_of_them(example, generator):
        return {name: value for each in made for name, value in each(example, generator).items()}

    return all_of_them


def condition(config: ConfigDict, cached: bool = False) -> Callable[[Any, Any, Mapping], Cond]:
    """(params, frozen, inputs) -> Cond, with the weights that are trained or the frozen ones."""
    stage, c = first_stage(config), conditioner(config, cached)

    def apply(params, frozen, inputs):
        def to_latent(image):
            moments = stage.encode(frozen["first_stage"], image)
            return frozen["latent_scale"] * stage.mode(moments)

        return c.apply(_weights(c, params, frozen), inputs, to_latent)

    return apply


def null(config: ConfigDict, cached: bool = False) -> Callable[[Any, Any, dict], dict]:
    """(params, frozen, inputs) -> inputs that mean "no condition"."""
    c = conditioner(config, cached)
    return lambda params, frozen, inputs: c.null(_weights(c, params, frozen), inputs)


def _weights(c: Conditioner, params: Any, frozen: Any) -> Any:
    return (frozen if c.frozen else params).get("conditioning", {})  # absent: has none


def schedule(config: ConfigDict) -> Schedule:
    """The noise schedule."""
    return _scheduled(config, make_schedule)


def betas(config: ConfigDict) -> np.ndarray:
    """The variances of the noise schedule, float64 [T]."""
    return _scheduled(config, make_betas)


def _scheduled(config: ConfigDict, make: Callable) -> Any:
    section = config.diffusion.schedule
    takes = choose("schedule", section.name, SCHEDULES)
    return unpack("diffusion.schedule", make, section, takes=[takes])


def unet(config: ConfigDict) -> UNet:
    """The UNet; its output has the latent's channels."""
    _check_groups(config.unet, "unet", "model_channels")
    return unpack(
        "unet",
        UNet,
        config.unet,
        out_channels=first_stage(config).channels,
        dtype=dtype(config),
    )


def _check_groups(section: ConfigDict, name: str, channels: str) -> None:
    """Raises UserError unless every level's channels divide into the groups of GroupNorm."""
    groups = section.get("num_groups", 32)
    if not {channels, "channel_mult"} <= set(section.keys()):
        return  # the identity; or missing, which the constructor tells
    for mult in section.channel_mult:
        if groups < 1 or section[channels] * mult % groups:
            raise UserError(
                f"{section[channels] * mult} channels ({name}.{channels} {section[channels]} x"
                f" {mult}) do not divide into {name}.num_groups = {groups}"
            )


def latent_shape(config: ConfigDict, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """(h, w, c) of the latent of an image of `size` (height, width); default: of training.

    Raises:
      UserError: the first stage or the UNet cannot halve it often enough.
    """
    stage = first_stage(config)
    height, width = size or (config.data.image_size, config.data.image_size)
    check_image_size(stage, height, width)
    h, w = height // stage.factor, width // stage.factor
    if config.phase == "diffusion":
        halvings = 2 ** (len(config.unet.channel_mult) - 1)
        if h % halvings or w % halvings:
            raise UserError(
                f"latents of {h}x{w} (image size {height}x{width}, f = {stage.factor}) cannot be"
                f" halved for the {len(config.unet.channel_mult)} levels of unet.channel_mult:"
                f" image size must be a multiple of {halvings * stage.factor}"
            )
    return h, w, stage.channels


def init_params(config: ConfigDict) -> Callable[[jax.Array], dict]:
    """key -> the parameters that the config's phase trains, by network."""
    if config.phase == "first_stage":
        stage, opponent = first_stage(config), adversary(config)

        def init_both(key):
            params = {"autoencoder": stage.init(key)}
            if opponent is not None:
                params["discriminator"] = opponent.init(jax.random.fold_in(key, 1))[0]
            return params

        return init_both
    network, c = unet(config), conditioner(config)
    shape = latent_shape(config)

    def init(key):
        unet_key, cond_key = jax.random.split(key)
        z, t, ports = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            (
                jax.ShapeDtypeStruct((1, *shape), jnp.float32),
                jnp.zeros((1,), jnp.int32),
                cond_shapes(config),
            ),
        )
        params = {"unet": network.init(unet_key, z, t, ports)["params"]}
        if config.diffusion.get("learn_logvar", False):
            start = config.diffusion.get("logvar_init", 0.0)
            params["logvar"] = diffusion_objective.init_logvar(schedule(config), start)
        learned = {} if c.frozen else c.init(cond_key)
        return {**params, "conditioning": learned} if learned else params

    return init


@_once
def param_shapes(config: ConfigDict) -> dict[str, Any]:
    """Shapes of the parameters that the config's phase trains, by network."""
    return jax.eval_shape(init_params(config), jax.random.key(0))


@_once
def frozen_shapes(
    config: ConfigDict, training: bool = False, cached: bool = False
) -> dict[str, Any]:
    """Shapes of the parameters that a phase takes as they are, by network.

    First stage and frozen conditioning (or of that the `cached` null condition) in phase 2; LPIPS
    in phase 1, if it is for `training`.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    if config.phase == "first_stage":
        if not (training and config.loss.perceptual_weight):
            return {}
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)  # of any size
        return {"lpips": jax.eval_shape(Lpips().init, key, image, image)["params"]}
    stage, c = first_stage(config), conditioner(config, cached)
    frozen = {"first_stage": jax.eval_shape(stage.init, key)}
    if c.frozen:
        frozen["conditioning"] = jax.eval_shape(c.init, key)
    return frozen


@_once
def cond_shapes(config: ConfigDict) -> Cond:
    """Shapes of the UNet's ports for one training image."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    frozen = {**frozen_shapes(config), "latent_scale": jax.ShapeDtypeStruct((), jnp.float32)}
    params = {"conditioning": jax.eval_shape(conditioner(config).init, key)}
    return jax.eval_shape(condition(config), params, frozen, inputs(config, 1))


def latents(config: ConfigDict) -> Callable[[Any, Mapping, jax.Array], jax.Array]:
    """(frozen, batch, key) -> scaled latents, encoded from images or drawn from cached moments."""
    stage = first_stage(config)

    def online(frozen, batch, key):
        moments = stage.encode(frozen["first_stage"], batch["image"])
        return frozen["latent_scale"] * stage.sample(moments, key)

    def cached(frozen, batch, key):
        return frozen["latent_scale"] * stage.sample(batch["moments"], key)

    return cached if is_cached(config) else online


def denoise_network(config: ConfigDict) -> Callable[..., jax.Array]:
    """(unet params, z_t, t, cond, dropout key or None) -> the network's output."""
    network = unet(config)

    def apply(params, z_t, t, cond: Cond, key=None):
        rngs = None if key is None else {"dropout": key}
        return network.apply({"params": params}, z_t, t, cond, key is not None, rngs=rngs)

    return apply


def adversary(config: ConfigDict) -> Adversary | None:
    """The discriminator of phase 1; None of kind "none"."""
    if "discriminator" not in config:
        raise UserError("config lacks section discriminator (kind='none' is without one)")
    section = dict(config.discriminator)
    kind = section.pop("kind")
    section.pop("optim", None)
    if not choose("discriminator", kind, {"none": False, "patch": True}):
        return unpack("discriminator", lambda: None, section)
    found = unpack("discriminator", make_adversary, section, dtype=dtype(config))
    check_patches(found, config.data.image_size)
    return found


def criterion(config: ConfigDict) -> Criterion:
    """What the config's phase minimises."""
    if config.phase == "first_stage":
        kind = config.first_stage.kind
        takes = choose("trainable first stage", kind, first_stage_objective.REGULARISERS)
        return unpack(
            "loss",
            first_stage_objective.make_criterion,
            config.loss,
            takes=[takes],
            stage=first_stage(config),
            kind=kind,
            adversary=adversary(config),
        )
    section, cached = dict(config.diffusion), is_cached(config)
    section.pop("schedule")
    loss = unpack(
        "diffusion",
        diffusion_objective.make_loss,
        section,
        denoise_network=denoise_network(config),
        condition=condition(config, cached),
        null=null(config, cached),
        keys=conditioner(config, cached).keys,
        latents=latents(config),
        schedule=schedule(config),
    )
    return from_loss(loss)


def objective(config: ConfigDict, mesh: Mesh | None = None) -> Objective:
    """What the config's phase optimises; `mesh` is the one that its state will be split over."""
    choose("phase", config.phase, dict.fromkeys(PHASES))
    tx, lr_at = _optimizer(config.optim, "optim")
    optimizers = dict.fromkeys(param_shapes(config), tx)
    if "discriminator" in optimizers:
        section = config.discriminator.optim
        optimizers["discriminator"], _ = _optimizer(section, "discriminator.optim")
    section = dict(config.train)
    section.pop("batch_size")
    return unpack(
        "train",
        make_objective,
        section,
        init_params=init_params(config),
        criterion=criterion(config) if mesh is None else _gathering(criterion(config), mesh),
        optimizers=optimizers,
        lr_at=lr_at,
    )


def _optimizer(section: ConfigDict, name: str) -> tuple:
    takes = choose("learning-rate schedule", section.schedule.name, LR_SCHEDULES)
    # for its keys: make_optimizer builds it again
    unpack(f"{name}.schedule", make_lr_schedule, section.schedule, takes=[takes])
    optimizer = choose("optimizer", section.name, OPTIMIZERS)
    return unpack(name, make_optimizer, section, takes=[optimizer])


def _gathering(criterion: Criterion, mesh: Mesh) -> Criterion:
    """The same on parameters that lie split over the mesh: whole while networks read them."""

    def gradients_of(function):
        def gradients(params, buffers, frozen, *rest):
            params, frozen = gather(mesh, (params, frozen))
            buffers, found, metrics = function(params, buffers, frozen, *rest)
            return buffers, split(mesh, found), metrics

        return gradients

    def evaluate(params, buffers, frozen, *rest):
        params, frozen = gather(mesh, (params, frozen))
        return criterion.evaluate(params, buffers, frozen, *rest)

    return criterion._replace(
        gradients=[gradients_of(function) for function in criterion.gradients], evaluate=evaluate
    )


def batch_keys(config: ConfigDict, cached: bool = False) -> tuple[str, ...]:
    """The entries of an example that training reads, or its `cached` ones: moments for images."""
    if config.phase == "first_stage":
        return ("image",)
    return ("moments" if cached else "image", *conditioner(config, cached).keys)


def check_batch(config: ConfigDict, devices: int) -> int:
    """The images that a device takes at once.

    Raises:
      UserError: the batch does not divide.
    """
    size, accumulate = config.train.batch_size, config.train.accumulate
    if accumulate < 1 or size < 1:
        name = "batch_size" if size < 1 else "accumulate"
        raise UserError(f"train.{name} {config.train[name]} must be at least 1")
    ways = devices * accumulate
    if size % ways:
        near = sorted({max(size // ways, 1) * ways, -(-size // ways) * ways})
        raise UserError(
            f"train.batch_size {size} does not divide by {devices} devices x train.accumulate"
            f" {accumulate}; {' and '.join(map(str, near))} would"
        )
    return size // ways


def is_cached(config: ConfigDict) -> bool:
    """Whether phase 2 trains on what `encode` stored."""
    return choose("latents.source", config.latents.source, {"online": False, "cache": True})


def variants(config: ConfigDict, split: str) -> int:
    """How many of each example `encode` stores: one of validation, cut centrally.

    Raises:
      UserError: fewer than one.
    """
    number = config.latents.get("variants", 1)
    if number < 1:
        raise UserError(f"latents.variants {number} must be at least 1")
    return number if split == "train" else 1
