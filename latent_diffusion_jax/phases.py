"""What each phase of training needs around its objective: frozen parts, validation, pictures.

Phase 2 keeps a copy of its first stage in `<workdir>/first_stage`, itself a workdir of phase 1, so
that a workdir is complete: it can be moved, and sampled from alone.
"""

import contextlib
import functools
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_diffusion_jax import build, pipeline, sampling
from latent_diffusion_jax.cluster import everywhere
from latent_diffusion_jax.config import stored_config, to_json
from latent_diffusion_jax.convert.lpips import HOW_TO_GET, load_lpips
from latent_diffusion_jax.data.latents import Latents
from latent_diffusion_jax.data.loader import make_loader
from latent_diffusion_jax.errors import UserError, choose, differences
from latent_diffusion_jax.first_stage.losses import use_of_codes
from latent_diffusion_jax.first_stage.quality import signs_of_trouble
from latent_diffusion_jax.train.checkpoint import Checkpointer, write_config, write_weights
from latent_diffusion_jax.train.checksum import checksums
from latent_diffusion_jax.train.metrics import Values, average
from latent_diffusion_jax.train.objective import Objective
from latent_diffusion_jax.train.sharding import gather, put_batch, put_tree, replicated
from latent_diffusion_jax.train.state import TrainState, sampling_params

SCALE_BATCHES = 32
PREVIEWS = 16
SPLITS = ("train", "validation")
WANTED = {  # what to say where it was not given
    "first_stage": "phase 2 needs a trained first stage:"
    " --config.run.first_stage=WORKDIR of phase 1",
    "conditioning": "phase 2 needs a trained conditioning:"
    " --config.run.conditioning=WORKDIR that `convert` made",
    "lpips": HOW_TO_GET,
}


class Phase(NamedTuple):
    """What `train.loop.train` takes: see there."""

    objective: Objective
    frozen: Any
    batches: Iterator[Mapping[str, np.ndarray]]
    evaluate: Callable[[TrainState], Values] | None
    visualise: Callable[[TrainState, int], dict[str, np.ndarray]]
    meta: dict[str, Any]
    signs: Callable[[Values], dict[str, str]] = lambda means: {}


def make_phase(config: ConfigDict, workdir: str, mesh: Mesh) -> Phase:
    """Everything to train the config's phase in a workdir."""
    make = choose("phase", config.phase, {"first_stage": _first_stage, "diffusion": _diffusion})
    return make(config, workdir, mesh)


def _first_stage(config: ConfigDict, workdir: str, mesh: Mesh) -> Phase:
    objective = build.objective(config, mesh)
    train, validation = (build.source(config, split) for split in SPLITS)
    frozen = prepare_frozen(config, workdir, mesh)
    reconstruct = pipeline.make_reconstruct(config, mesh)
    images = first_examples(config, validation, PREVIEWS // 2)["image"]

    def visualise(state, step):
        del step
        hat = reconstruct(sampling_params(state)["autoencoder"], images)
        return {"reconstructions": np.concatenate([images, np.asarray(hat)])}

    evaluate = _evaluator(config, objective, frozen, validation, mesh)
    size = config.first_stage.get("codebook_size")
    signs = functools.partial(signs_of_trouble, codebook_size=size)
    return Phase(objective, frozen, shuffled(config, train), evaluate, visualise, {}, signs)


def _diffusion(config: ConfigDict, workdir: str, mesh: Mesh) -> Phase:
    objective = build.objective(config, mesh)
    is_cached = build.is_cached(config)
    given = dict(config=config, mesh=mesh, cached=is_cached)
    generate = build.unpack("sample", sampling.make_generate, config.sample, **given)
    if is_cached:
        without = ("conditioning",) if build.conditioner(config).encoded else ()
        frozen = prepare_frozen(config, workdir, mesh, without)
        train, validation = (
            cached(config, workdir, split, frozen["first_stage"]) for split in SPLITS
        )
        check_classes(config, train.num_classes)
        if without:
            frozen["conditioning"] = put_tree(mesh, {"null": train.null})
    else:
        train, validation = (build.source(config, split) for split in SPLITS)
        check_classes(config, train.num_classes)
        frozen = prepare_frozen(config, workdir, mesh)
    scale = latent_scale(config, workdir, frozen["first_stage"], mesh)
    frozen["latent_scale"] = jnp.float32(scale)

    indices = np.arange(-(-PREVIEWS // mesh.size) * mesh.size)
    inputs = preview_inputs(config, validation, indices)

    def visualise(state, step):
        del step
        key = jax.random.key(config.seed)
        images = generate(sampling_params(state), frozen, inputs, key, indices)
        return {"samples": np.asarray(images)}

    evaluate = _evaluator(config, objective, frozen, validation, mesh)
    meta = {"latent_scale": scale, "class_names": train.class_names}
    return Phase(objective, frozen, shuffled(config, train), evaluate, visualise, meta)


def preview_inputs(config: ConfigDict, source, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Conditions for pictures during training: every class in turn, or the first examples'."""
    keys = build.conditioner(config, isinstance(source, Latents)).keys
    if set(keys) <= {"label"}:
        return sampling.example_inputs(config, indices)
    examples = first_examples(config, source, len(indices))
    rows = indices % len(next(iter(examples.values())))
    return {name: examples[name][rows] for name in keys}


def check_classes(config: ConfigDict, num_classes: int | None) -> None:
    """Raises UserError unless a class-conditional model has as many classes as its data."""
    if "label" not in build.conditioner(config).keys:
        return
    if num_classes is None:
        raise UserError(
            "the data has no labels, which conditioning.kind 'label' needs; configs have an"
            " argument `:unconditional`, or set conditioning.kind"
        )
    if num_classes != config.conditioning.num_classes:
        raise UserError(
            f"the data has {num_classes} classes, conditioning.num_classes is"
            f" {config.conditioning.num_classes}: --config.conditioning.num_classes={num_classes}"
        )


def loader(
    config: ConfigDict, source, batch_size: int, train: bool, shard=None, part=None, variants=1
):
    """Batches of a source, or of a cache, as the config says; the rest as for `make_loader`."""
    index, count = shard or (jax.process_index(), jax.process_count())
    if batch_size % count:
        raise UserError(f"batch of {batch_size} does not divide by {count} processes")
    cached = isinstance(source, Latents)
    conditional = config.phase == "diffusion" and not cached
    return make_loader(
        source,
        batch_size=batch_size // count,
        image_size=config.data.image_size,
        seed=config.seed,
        train=train,
        crop=config.data.crop,
        flip=config.data.flip,
        prepare=build.prepare(config) if conditional else None,
        keys=build.batch_keys(config, cached=cached),
        shard=(index, count),
        part=part,
        variants=variants,
    )


def shuffled(config: ConfigDict, source):
    """The endless batches of training."""
    return loader(config, source, config.train.batch_size, train=True)


def in_order(config: ConfigDict, source, batch_size: int):
    """One pass without augmentation, this process's rows; alone, the last batch may be short."""
    return loader(config, source, batch_size, train=False)


def first_examples(config: ConfigDict, source, number: int) -> dict[str, np.ndarray]:
    """The first of a source, all of them in every process."""
    return next(loader(config, source, min(number, len(source)), train=False, shard=(0, 1)))


def _evaluator(config, objective, frozen, source, mesh):
    """Means of the objective's metrics over the first batches of the validation split."""
    rows = min(config.train.batch_size, len(source)) // mesh.size * mesh.size
    if not rows:
        print(f"no validation: {len(source)} examples for {mesh.size} devices", flush=True)
        return None
    step = jax.jit(objective.eval_step, out_shardings=replicated(mesh))

    def evaluate(state):
        count = min(config.run.eval_batches, len(source) // rows)
        batches = itertools.islice(in_order(config, source, rows), count)
        key = jax.random.key(config.seed)  # the same noise each time, so that curves are smooth
        means = average(
            jax.device_get(step(state, frozen, put_batch(mesh, batch), jax.random.fold_in(key, i)))
            for i, batch in enumerate(batches)
        )
        if "codes" in means:  # over the whole split: batches use different ones
            use = use_of_codes(np.asarray(means.pop("codes")))
            means |= {name: float(value) for name, value in use.items()}
        return {f"validation_{name}": value for name, value in means.items()}

    return evaluate


def prepare_frozen(
    config: ConfigDict, workdir: str, mesh: Mesh, without: Sequence[str] = ()
) -> dict[str, Any]:
    """What a phase does not train, by network: the workdir's own copies, made if there are none.

    Those `without` which it trains are copied, and not read.

    Raises:
      UserError: `run.first_stage` is not a trained workdir of the same first stage,
        `run.conditioning` not one of the same frozen conditioner, or `run.lpips` not all of LPIPS.
    """
    for name, tree in build.frozen_shapes(config, training=True).items():
        copy = str(epath.Path(workdir) / name)
        if not tree:
            continue
        # Asked of all before one begins to write.
        if everywhere((epath.Path(copy) / "checkpoints").exists()):
            print(f"{name}: {copy}, copied before", flush=True)
            if name == "first_stage" and (epath.Path(copy) / "config.json").exists():
                _same_first_stage(config, copy)
        else:
            _copy_frozen(config, name, copy, mesh)
    frozen = pipeline.load_frozen(config, workdir, mesh, training=True, without=without)
    if config.phase == "diffusion":
        frozen = {"first_stage": {}, **frozen}  # the identity has no weights
    return put_tree(mesh, frozen)


def _copy_frozen(config: ConfigDict, name: str, copy: str, mesh: Mesh) -> None:
    origin = config.run[name]
    if not origin:
        raise UserError(WANTED[name])
    try:
        network = pipeline.FROZEN[name]
        if name == "conditioning" or (epath.Path(origin) / name).exists():  # of the same phase
            loaded = pipeline.load_frozen(config, origin, mesh, training=True)
            params, place = {network: loaded[name]}, origin
        elif name == "lpips":
            params, place = {network: load_lpips(origin.split(","))}, origin
        else:
            theirs = _same_first_stage(config, origin)
            params, (step, _) = pipeline.load_params(theirs, origin, mesh)
            write_config(copy, to_json(theirs))
            place = f"{origin} at step {step}"
    except UserError as error:
        raise UserError(f"config.run.{name}: {error}") from error
    write_weights(copy, params, {}, {})
    print(f"{name}: {copy}, copied from {place}", flush=True)


def _same_first_stage(config: ConfigDict, place: str) -> ConfigDict:
    theirs = stored_config(place)
    if theirs.phase != "first_stage":
        raise UserError(f"{place!r} holds phase {theirs.phase!r}; this takes 'first_stage'")
    differing = differences(
        config.first_stage.to_dict(), theirs.first_stage.to_dict(), f"in {place}"
    )
    if differing:
        raise UserError(f"config.first_stage is not what was trained: {'; '.join(differing)}")
    return theirs


def latent_scale(config: ConfigDict, workdir: str, params: Any, mesh: Mesh) -> float:
    """What latents are multiplied by: the config's, or 1 / their standard deviation.

    Measured once, over many batches (the original: over one), and kept in the workdir.

    Raises:
      UserError: a scale or a deviation that is not positive.
    """
    if config.latents.scale is not None:
        if not config.latents.scale > 0:
            raise UserError(f"latents.scale {config.latents.scale} must be above 0")
        return config.latents.scale
    path = epath.Path(workdir) / "latent_scale.json"
    made_from = fingerprint(config, "train", params)
    if path.exists():
        stored = json.loads(path.read_text())
        if not differences(made_from, stored["fingerprint"], "stored"):
            return stored["latent_scale"]
    stage = build.first_stage(config)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def sums(params, image, key):
        z = stage.sample(stage.encode(gather(mesh, params), image), key)
        return jnp.mean(z), jnp.mean(z**2)

    batches = itertools.islice(shuffled(config, build.source(config, "train")), SCALE_BATCHES)
    keys = jax.random.split(jax.random.key(config.seed), SCALE_BATCHES)
    moments = [
        jax.device_get(sums(params, put_batch(mesh, {"image": b["image"]})["image"], key))
        for b, key in zip(batches, keys)
    ]
    mean, square = np.mean(np.asarray(moments, np.float64), axis=0)
    variance = float(square - mean**2)
    if not 0 < variance < math.inf:
        raise UserError(f"the variance of the latents is {variance}: is the first stage trained?")
    scale = 1 / math.sqrt(variance)
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("latent_scale.json.tmp")
        temporary.write_text(json.dumps({"latent_scale": scale, "fingerprint": made_from}))
        temporary.replace(path)
    return scale


def latents_path(workdir: str, split: str) -> str:
    """Where the cached moments of a split are."""
    return str(epath.Path(workdir) / "latents" / split)


def fingerprint(config: ConfigDict, split: str, params: Any) -> dict[str, Any]:
    """What the latents of a split depend on; `params` are the first stage's."""
    return {
        "split": split,
        "data": config.data.to_dict(),
        "first_stage": config.first_stage.to_dict(),
        "conditioning": config.conditioning.to_dict(),
        "weights": zlib.crc32(json.dumps(checksums(params)).encode()),
    }


def cache_fingerprint(config: ConfigDict, workdir: str, split: str, params: Any) -> dict[str, Any]:
    """The fingerprint of a split's cache: also how often, and which frozen encoder of conditions.

    Its weights are not read: the checksums in the workdir's copy stand for them.
    """
    made_from = fingerprint(config, split, params)
    made_from["variants"] = build.variants(config, split)
    if build.conditioner(config).encoded:
        place = str(epath.Path(workdir) / "conditioning")
        with contextlib.closing(Checkpointer(place, read_only=True)) as checkpointer:
            sums = json.dumps(checkpointer.weights_checksums())
        made_from["conditioning_weights"] = zlib.crc32(sums.encode())
    return made_from


def cached(config: ConfigDict, workdir: str, split: str, params: Any) -> Latents:
    """The cached latents of a split.

    Raises:
      UserError: there are none, or they are of something else.
    """
    return Latents(
        directory=latents_path(workdir, split),
        fingerprint=cache_fingerprint(config, workdir, split, params),
    )
