"""A trained workdir is all it takes to use a model: `load` reads it, others write what comes out.

`load` gives the config, the averaged weights and the latent scale.
"""

import contextlib
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
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from latent_diffusion_jax import build
from latent_diffusion_jax.config import stored_config
from latent_diffusion_jax.data.folder import Folder
from latent_diffusion_jax.data.loader import make_loader
from latent_diffusion_jax.data.transforms import to_uint8
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.quality import quality
from latent_diffusion_jax.train import averages
from latent_diffusion_jax.train.checkpoint import Checkpointer
from latent_diffusion_jax.train.metrics import Progress, grid
from latent_diffusion_jax.train.sharding import (
    gather,
    lay_out,
    put_rows,
    replicated,
)
from latent_diffusion_jax.train.state import TrainState, init_ema, sampling_params

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


def load(
    workdir: str, mesh: Mesh, ema_length: float | None = None, at: int | None = None
) -> Trained:
    """Reads a workdir of either phase, laid out on a mesh.

    With `ema_length`, averages of that length are made of those that training stored, up to step
    `at` (default: the last stored). Networks that are not averaged are the newest checkpoint's.

    Raises:
      UserError: nothing usable is there.
    """
    config = stored_config(workdir)
    params, (step, meta) = load_params(config, workdir, mesh)
    if ema_length is not None:
        averaged, step = _averaged(config, workdir, mesh, ema_length, at)
        params |= averaged
    if config.phase == "first_stage":
        return Trained(config, params, {}, None, step)
    frozen = {
        "first_stage": {},
        **load_frozen(config, workdir, mesh),
        "latent_scale": jnp.float32(meta["latent_scale"]),
    }
    names = meta["class_names"]
    return Trained(config, params, frozen, tuple(names) if names else None, step)


def in_compute_dtype(trained: Trained) -> Trained:
    """With all weights as `build.in_compute_dtype` gives them."""
    cast = functools.partial(build.in_compute_dtype, trained.config)
    return trained._replace(params=cast(trained.params), frozen=cast(trained.frozen))


def _averaged(
    config: ConfigDict, workdir: str, mesh: Mesh, length: float, at: int | None
) -> tuple[dict[str, Any], int]:
    """Averages of a length, by network, and their step."""
    lengths = config.train.get("ema_lengths", ())
    place = averages.folder(workdir)
    if not lengths or not (epath.Path(place) / "checkpoints").exists():
        raise UserError(
            f"{workdir} has no stored averages to make some of length {length:g}: train with"
            " --config.train.ema_lengths=(0.05,0.1)"
        )
    shapes = lay_out(build.param_shapes(config), mesh)
    networks = init_ema(shapes, config.train.ema_networks)
    with contextlib.closing(Checkpointer(place, read_only=True)) as stored:
        found, step, error = averages.synthesise(stored, networks, lengths, length, at)
    print(f"averages of length {length:g} at step {step}: error of the profile {error:.2g}")
    return found, step


def load_frozen(
    config: ConfigDict,
    workdir: str,
    mesh: Mesh,
    training: bool = False,
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """What a phase does not train, by network: a workdir keeps each in a folder of its name."""
    frozen = {}
    for name, tree in build.frozen_shapes(config, training).items():
        if tree and name not in without:
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
    params = lay_out(build.param_shapes(config), mesh)
    ema = init_ema(params, config.train.ema_networks)
    return _restore(TrainState(jnp.int32(0), params, (), ema), workdir)


def _restore(abstract: TrainState, workdir: str) -> tuple[int, TrainState, dict]:
    checkpointer = Checkpointer(workdir, read_only=True)
    restored = checkpointer.restore_params(abstract)
    checkpointer.close()
    if restored is None:
        raise UserError(f"no checkpoint in {workdir!r} yet: train there first")
    return restored


def make_reconstruct(config: ConfigDict, mesh: Mesh) -> Callable[[Any, Any], jax.Array]:
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
    about: Sequence[Mapping[str, Any]] | None,
    asked: Mapping[str, Any],
    names: Sequence[str] | None = None,
) -> Path:
    """Writes `000000.png` ..., `samples.json` (what each is) and `grid.png`; returns its path.

    `about` says what each image is, `asked` all of them; both are JSON. With `names`, one per
    image, files have those: `photo.png`, and the next of it `photo_1.png`. The grid shows the first
    `GRID` of them, a column per class where there are few classes. Of several processes the first
    writes.
    """
    if jax.process_index():  # takes part in sampling
        for _ in batches:
            pass
        return out / "grid.png"
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
    records = [{"file_name": files[i], **(about[i] if about else {})} for i in range(number)]
    (out / "samples.json").write_text(json.dumps({**asked, "images": records}, indent=1))
    classes = len({record["label"] for record in records if "label" in record})
    columns = classes if 4 <= classes <= 16 else math.ceil(math.sqrt(len(shown)))
    Image.fromarray(grid(np.stack(shown), columns)).save(out / "grid.png")
    return out / "grid.png"


def _file_names(names: Sequence[str]) -> list[str]:
    """`a.png`, `b.png`, `a_1.png` of a, b, a; never one name twice, nor the grid's."""
    files: dict[str, None] = {"grid.png": None}
    for name in names:
        counted = (f"{name}_{i}.png" for i in itertools.count(1))
        files[next(f for f in itertools.chain([f"{name}.png"], counted) if f not in files)] = None
    return list(files)[1:]


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
        hat = np.asarray(run(params, put_rows(mesh, {"image": padded})["image"]))
        pairs.append((images, hat[:count]))
    originals, hats = (np.concatenate(side)[:number] for side in zip(*pairs, strict=True))
    columns = min(8, number)
    rows_of = [x[i : i + columns] for i in range(0, number, columns) for x in (originals, hats)]
    if jax.process_index() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid(_filled(rows_of, columns), columns)).save(out)
    return {name: float(value) for name, value in quality(originals, hats).items()}


def _filled(rows: list[np.ndarray], columns: int) -> np.ndarray:
    """Rows of images as one batch, short rows filled with white."""
    full = [np.pad(r, ((0, columns - len(r)), *[(0, 0)] * 3), constant_values=1) for r in rows]
    return np.concatenate(full)
