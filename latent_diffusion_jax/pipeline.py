"""From trained parts to images: sampling and reconstruction.

A workdir is all it takes: `load` reads the config, the averaged weights and the latent scale.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.linen import max_pool
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from latent_diffusion_jax import build
from latent_diffusion_jax.config import stored_config
from latent_diffusion_jax.data.folder import Folder
from latent_diffusion_jax.data.loader import make_loader
from latent_diffusion_jax.data.transforms import to_uint8
from latent_diffusion_jax.diffusion.editing import from_image, keep_known, slerp
from latent_diffusion_jax.diffusion.guidance import dynamic_threshold, guide, image_guide, within
from latent_diffusion_jax.diffusion.prediction import Denoise, make_denoise
from latent_diffusion_jax.diffusion.samplers import image_keys, image_noise, make_sampler, sample
from latent_diffusion_jax.diffusion.schedule import make_timesteps
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.quality import quality
from latent_diffusion_jax.first_stage.stage import FirstStage
from latent_diffusion_jax.first_stage.tiling import tiled
from latent_diffusion_jax.nn.windows import windowed_network
from latent_diffusion_jax.train.checkpoint import Checkpointer
from latent_diffusion_jax.train.metrics import Progress, grid
from latent_diffusion_jax.train.sharding import (
    abstract_state,
    gather,
    lay_out,
    put_batch,
    replicated,
)
from latent_diffusion_jax.train.state import TrainState, sampling_params

THRESHOLD_FLOOR = 3.0  # of scaled latents, whose deviation is 1: data is hardly ever beyond
EDIT = 2**31  # apart from the numbers of steps
GRID = 400  # images in a grid at most: thousands, for a measurement, are kept as files alone


FROZEN = {  # folder -> network in it
    "first_stage": "autoencoder",
    "conditioning": "conditioning",
    "lpips": "lpips",
}


class Trained(NamedTuple):
    """A trained workdir. params: by network; frozen: first_stage and latent_scale, in phase 2."""

    config: ConfigDict
    params: dict[str, Any]
    frozen: dict[str, Any]
    class_names: tuple[str, ...] | None
    step: int


def load(workdir: str, mesh: Mesh) -> Trained:
    """Reads a workdir of either phase, laid out on a mesh.

    Raises:
      UserError: nothing usable is there.
    """
    config = stored_config(workdir)
    params, (step, meta) = load_params(config, workdir, mesh)
    if config.phase == "first_stage":
        return Trained(config, params, {}, None, step)
    frozen = {
        "first_stage": {},
        **load_frozen(config, workdir, mesh),
        "latent_scale": jnp.float32(meta["latent_scale"]),
    }
    names = meta["class_names"]
    return Trained(config, params, frozen, tuple(names) if names else None, step)


def load_frozen(
    config: ConfigDict, workdir: str, mesh: Mesh, training: bool = False
) -> dict[str, Any]:
    """What a phase does not train, by network: a workdir keeps each in a folder of its name."""
    frozen = {}
    for name, tree in build.frozen_shapes(config, training).items():
        if tree:
            network = FROZEN[name]
            abstract = TrainState(jnp.int32(0), {network: lay_out(tree, mesh)}, (), {})
            _, state, _ = _restore(abstract, str(epath.Path(workdir) / name))
            frozen[name] = state.params[network]
    return frozen


def load_params(config: ConfigDict, workdir: str, mesh: Mesh) -> tuple[dict, tuple[int, dict]]:
    """The weights to sample with, by network, and the (step, meta) of their checkpoint."""
    step, state, meta = restore(config, workdir, mesh)
    return sampling_params(state), (step, meta)


def restore(config: ConfigDict, workdir: str, mesh: Mesh) -> tuple[int, TrainState, dict]:
    """The newest good checkpoint without its optimiser, as (step, state, meta)."""
    return _restore(abstract_state(build.objective(config).init, jax.random.key(0), mesh), workdir)


def _restore(abstract: TrainState, workdir: str) -> tuple[int, TrainState, dict]:
    checkpointer = Checkpointer(workdir, read_only=True)
    restored = checkpointer.restore_params(abstract)
    checkpointer.close()
    if restored is None:
        raise UserError(f"no checkpoint in {workdir!r} yet: train there first")
    return restored


class Extras(NamedTuple):
    """What sampling can do beyond a sampler and guidance; the defaults are none of it.

    interval: (low, high) in t, where alone guidance acts.
    threshold: quantile of dynamic thresholding, in (0, 1].
    strength: in (0, 1], of the change of the images that inputs have as `start`; default: 1 beside
      `hole`, 0.75 without.
    guide_scale: of guidance by the images that inputs have as `guide`, whose pixels count alike
      whatever their number: above 0.1 a short-trained model falls apart.
    window: side in pixels of the windows that the UNet sees, which overlap by half.
    tile: side in pixels of the tiles that are decoded one by one, which overlap by a quarter.
    """

    interval: tuple[float, float] | None = None
    threshold: float | None = None
    strength: float | None = None
    guide_scale: float = 0.05
    window: int | None = None
    tile: int | None = None


PLAIN = Extras()


def make_generate(
    config: ConfigDict,
    mesh: Mesh,
    *,
    sampler: str,
    options: Mapping[str, float],
    steps: int,
    timesteps: str,
    scale: float,
    size: tuple[int, int] | None = None,
    extras: Extras = PLAIN,
) -> Callable[..., Any]:
    """Builds generate(params, frozen, inputs, key, indices) -> images [B, H, W, 3], compiled once.

    Args:
      config: of phase 2.
      mesh: rows of `inputs` and `indices` are spread over it, so B must divide by its size.
      sampler: one of SAMPLERS; `options` are its own, such as eta.
      steps: how many; `timesteps` says which, one of TIMESTEPS.
      scale: of guidance; 1 is the plain condition, evaluated alone.
      size: height and width of the images; default: as in training.
      extras: see there.

    Image i (of `indices`) depends on the key and i alone, up to rounding. Beside the conditioner's,
    `inputs` may hold `start` and `hole` (an edit), `guide`, and `between` [B], from 0 to 1: images
    between those that indices 0 and 1 would give, whatever their own index.
    """
    schedule, stage = build.schedule(config), build.first_stage(config)
    method = make_sampler(sampler, schedule, **options)
    times = make_timesteps(timesteps, steps, schedule)
    shape = build.latent_shape(config, size)
    denoiser = make_denoiser(config, scale != 1, extras)

    def latent(params, frozen, inputs, key, indices, scales):
        params, frozen = gather(mesh, (params, frozen))
        denoise = denoiser(params, frozen, inputs, scales)
        keys = image_keys(key, jnp.zeros_like(indices) if "between" in inputs else indices)
        z = image_noise(keys, -1, shape)
        if "between" in inputs:
            other = image_noise(image_keys(key, jnp.ones_like(indices)), -1, shape)
            z = slerp(z, other, inputs["between"])
        if "start" in inputs:
            z, chosen, ending, finish = _edit(
                z, inputs, method, times, keys, extras, schedule, stage, frozen
            )
        else:
            chosen, ending, finish = method, times, lambda z: z

        def noise(i):
            return image_noise(keys, i, shape)

        return finish(sample(chosen, denoise, z, timesteps=ending, noise=noise))

    def decode(frozen, z):
        return stage.decode(frozen["first_stage"], z / frozen["latent_scale"])

    def generate(params, frozen, *rest):
        return decode(gather(mesh, frozen), latent(params, frozen, *rest))

    whole = extras.tile is None
    compiled = jax.jit(generate if whole else latent, out_shardings=replicated(mesh))
    decode_tile = jax.jit(lambda frozen, z: decode(gather(mesh, frozen), z))
    scales = jnp.float32(scale), jnp.float32(extras.guide_scale)

    def call(params, frozen, inputs, key, indices):
        rows = put_batch(mesh, {**inputs, "indices": indices})
        indices = rows.pop("indices")
        out = compiled(params, frozen, rows, key, indices, scales)
        if extras.tile is None:
            return out
        tile = _latent_side("tile", extras.tile, stage)
        return tiled(functools.partial(decode_tile, frozen), tile, max(tile // 4, 1))(out)

    return call


def make_denoiser(config: ConfigDict, guided: bool, extras: Extras) -> Callable[..., Denoise]:
    """Builds denoiser(params, frozen, inputs, (scale, guide_scale)) -> Denoise.

    Conditions, guidance, windows and thresholds are inside it.
    """
    schedule, stage = build.schedule(config), build.first_stage(config)
    conditioner, network = build.conditioner(config), build.denoise_network(config)
    condition = build.condition(config)
    guided = guided and bool(conditioner.keys)
    if extras.window is not None:
        side = _latent_side("window", extras.window, stage)
        network = windowed_network(network, side, max(side // 2, 1))

    def denoiser(params, frozen, inputs, scales):
        scale, guide_scale = scales

        def of(inputs):
            cond = condition(params, frozen, inputs)
            return make_denoise(
                lambda z_t, t: network(params["unet"], z_t, t, cond),
                schedule,
                config.diffusion.prediction,
            )

        asked = {name: inputs[name] for name in conditioner.keys}
        denoise = of(asked)
        if guided:
            both = (conditioner.null(asked), asked)
            plain = denoise
            denoise = guide(of(jax.tree.map(lambda *x: jnp.concatenate(x), *both)), scale)
            if extras.interval is not None:
                denoise = within(extras.interval, denoise, plain)
        if "guide" in inputs:
            wanted = inputs["guide"]

            def log_likelihood(z):  # of the image's pixels, seen at the guide's size
                image = stage.decode(frozen["first_stage"], z / frozen["latent_scale"])
                seen = jax.image.resize(image, wanted.shape, "cubic")
                return -jnp.sum((seen - wanted) ** 2, axis=(1, 2, 3)) / 2

            denoise = image_guide(denoise, schedule, log_likelihood, guide_scale)
        if extras.threshold is not None:
            denoise = dynamic_threshold(denoise, schedule, extras.threshold, THRESHOLD_FLOOR)
        return denoise

    return denoiser


def _latent_side(name: str, side: int, stage: FirstStage) -> int:
    """A side in pixels, in latent pixels."""
    if side < 1 or side % stage.factor:
        raise UserError(f"--{name}={side} must be a multiple of {stage.factor} pixels")
    return side // stage.factor


def _edit(z, inputs, method, times, keys, extras, schedule, stage, frozen):
    """What an edit changes: where sampling starts, the sampler, its times, and what comes last."""
    start = stage.mode(stage.encode(frozen["first_stage"], inputs["start"]))
    z0 = frozen["latent_scale"] * start
    strength = extras.strength or (1.0 if "hole" in inputs else 0.75)
    if strength < 1:
        z, times = from_image(schedule, z0, z, times, strength)
    if "hole" not in inputs:
        return z, method, times, lambda z: z
    # a latent pixel is known where all pixels that it stands for are
    known = 1 - max_pool(inputs["hole"], (stage.factor,) * 2, (stage.factor,) * 2)
    fresh = jax.vmap(lambda key: jax.random.fold_in(key, EDIT))(keys)  # not the sampler's noise
    method = keep_known(method, schedule, z0, known, lambda i: image_noise(fresh, i, z0.shape[1:]))
    return z, method, times, lambda z: known * z0 + (1 - known) * z


def example_inputs(config: ConfigDict, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs for previews: every class in turn."""
    if "label" not in build.conditioner(config).keys:
        return {}
    return {"label": (indices % config.conditioning.num_classes).astype(np.int32)}


def generate(
    trained: Trained,
    mesh: Mesh,
    *,
    inputs: Mapping[str, np.ndarray],
    number: int,
    batch: int,
    seed: int,
    extras: Extras = PLAIN,
    **options: Any,
) -> Iterator[np.ndarray]:
    """Yields images [b, H, W, 3] in [-1, 1], `number` of them in all, in order.

    `inputs` holds one row per image; `options` are `make_generate`'s. The batch is rounded up to a
    multiple of the devices, which changes no image.
    """
    given = dict(config=trained.config, mesh=mesh, extras=extras)
    run = build.unpack("sample", make_generate, options, **given)
    rows = -(-min(batch, number) // mesh.size) * mesh.size
    for start in range(0, number, rows):
        indices = np.arange(start, start + rows)
        wanted = np.minimum(indices, number - 1)  # the last batch is filled up
        chosen = {name: values[wanted] for name, values in inputs.items()}
        images = run(trained.params, trained.frozen, chosen, jax.random.key(seed), indices)
        images = np.asarray(images)
        for hole, original in (("mask", "image_to_fill"), ("hole", "start")):
            if hole in chosen:  # known pixels stay as they are
                images = np.where(chosen[hole] >= 0.5, images, chosen[original])
        yield images[: number - start]


def make_reconstruct(config: ConfigDict, mesh: Mesh) -> Callable[[Any, jax.Array], jax.Array]:
    """Builds reconstruct(autoencoder params, image [B, H, W, 3]) -> image, by the mode."""
    stage = build.first_stage(config)

    def reconstruct(params, image):
        params = gather(mesh, params)
        return stage.decode(params, stage.mode(stage.encode(params, image)))

    return jax.jit(reconstruct, out_shardings=replicated(mesh))


def write_samples(
    out: Path,
    batches: Iterator[np.ndarray],
    number: int,
    inputs: Mapping[str, np.ndarray],
    class_names: tuple[str, ...] | None,
    asked: Mapping[str, Any],
    names: Sequence[str] | None = None,
) -> Path:
    """Writes `000000.png` ..., `samples.json` (what each is) and `grid.png`; returns its path.

    With `names`, one per image, files have those: `photo.png`, and the next of it `photo_1.png`.
    The grid shows the first `GRID` of them, a column per class where there are few classes.
    """
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress(number, unit="image")
    shown: list[np.ndarray] = []
    done = 0
    files = _file_names(names) if names else [f"{i:06d}.png" for i in range(number)]
    for batch in batches:
        images = to_uint8(batch)
        for i, image in enumerate(images, done):
            Image.fromarray(image).save(out / files[i])
        shown.extend(images[: GRID - len(shown)])
        done += len(images)
        progress.line(done, "sampled")
    progress.close()
    records = [
        {
            "file_name": files[i],
            **{name: values[i].tolist() for name, values in inputs.items()},
        }
        for i in range(number)
    ]
    if class_names and "label" in inputs:
        for record in records:
            record["class"] = class_names[record["label"]]
    (out / "samples.json").write_text(json.dumps({**asked, "images": records}, indent=1))
    classes = len(np.unique(inputs.get("label", ())))
    columns = classes if 4 <= classes <= 16 else math.ceil(math.sqrt(len(shown)))
    Image.fromarray(grid(np.stack(shown), columns)).save(out / "grid.png")
    return out / "grid.png"


def _file_names(names: Sequence[str]) -> list[str]:
    """`a.png`, `b.png`, `a_1.png` of a, b, a; never one name twice."""
    files: dict[str, None] = {}
    for name in names:
        counted = (f"{name}_{i}.png" for i in itertools.count(1))
        files[next(f for f in itertools.chain([f"{name}.png"], counted) if f not in files)] = None
    return list(files)


def write_reconstructions(
    trained: Trained, mesh: Mesh, out: Path, number: int, batch: int, folder: str | None
) -> dict[str, float]:
    """Writes rows of originals above rows of reconstructions; returns their mean `quality`.

    The images are those of `folder`, or of the validation split of the config's data.
    """
    config = trained.config
    if folder:
        source = Folder(split="validation", path=folder, validation_fraction=1.0)
    else:
        source = build.source(config, "validation")
    params = trained.params.get("autoencoder", trained.frozen.get("first_stage"))
    run = make_reconstruct(config, mesh)
    number = min(number, len(source))
    rows = -(-min(batch, number) // mesh.size) * mesh.size
    loader = make_loader(
        source,
        batch_size=rows,
        image_size=config.data.image_size,
        seed=0,
        train=False,
        keys=("image",),
    )
    pairs = []
    for images in itertools.islice((b["image"] for b in loader), -(-number // rows)):
        count = len(images)
        padded = np.pad(images, ((0, rows - count), (0, 0), (0, 0), (0, 0)))
        hat = np.asarray(run(params, put_batch(mesh, {"image": padded})["image"]))
        pairs.append((images, hat[:count]))
    originals, hats = (np.concatenate(side)[:number] for side in zip(*pairs, strict=True))
    columns = min(8, number)
    rows_of = [x[i : i + columns] for i in range(0, number, columns) for x in (originals, hats)]
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid(_filled(rows_of, columns), columns)).save(out)
    return {name: float(value) for name, value in quality(originals, hats).items()}


def _filled(rows: list[np.ndarray], columns: int) -> np.ndarray:
    """Rows of images as one batch, short rows filled with white."""
    full = [np.pad(r, ((0, columns - len(r)), *[(0, 0)] * 3), constant_values=1) for r in rows]
    return np.concatenate(full)
