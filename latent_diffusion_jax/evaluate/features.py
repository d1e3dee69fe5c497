"""Inception's features of a set of images, on disk: memory does not grow with the set.

A folder holds `pool.npy`, `spatial.npy` and `logits.npy`, float32 [N, ...], and `done.json`, which
says of what and how far: a run that was killed goes on there, and the next one reads them at once.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from latent_diffusion_jax.evaluate.distances import Moments, no_moments, update
from latent_diffusion_jax.evaluate.inception import Features, Inception, prepare
from latent_diffusion_jax.evaluate.sets import Images
from latent_diffusion_jax.train.metrics import Progress
from latent_diffusion_jax.train.sharding import put_rows, put_tree, replicated

WIDTHS = {"pool": 2048, "spatial": 2023, "logits": 1008}
DONE = "done.json"
SAVED = 16  # batches between notes of how far it is
ROWS = 1024  # read at once


class Stored:
    """Features on disk: `pool`, `spatial` and `logits`, [N, ...] each, mapped into memory."""

    def __init__(self, place: Path, number: int):
        self.number = number
        self._place = place

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in WIDTHS:
            raise AttributeError(name)
        return np.load(self._place / f"{name}.npy", mmap_mode="r")

    def moments(self, name: str) -> Moments:
        """Of one kind of features, read a piece at a time."""
        found, array = no_moments(WIDTHS[name]), getattr(self, name)
        for start in range(0, self.number, ROWS):
            found = update(found, array[start : start + ROWS])
        return found


def make_network(params: Any, mesh: Mesh) -> Callable[[np.ndarray], Features]:
    """Gives run(float32 [B, 299, 299, 3]) -> Features, spread over the mesh; B divides by it."""
    params = put_tree(mesh, params)
    apply = jax.jit(
        lambda params, x: Inception().apply({"params": params}, x),
        out_shardings=replicated(mesh),
    )
    return lambda x: jax.device_get(apply(params, put_rows(mesh, {"image": x})["image"]))


def store(
    images: Images,
    run: Callable[[np.ndarray], Features],
    place: Path,
    *,
    batch: int,
    preparation: str,
    made_with: Mapping[str, Any],
) -> Stored:
    """Shows all images to the network, from where `place` says that an earlier run came to.

    `made_with` is of the network, for `done.json`: features of another are computed again.
    """
    made_from = {**images.made_from, **made_with, "preparation": preparation}
    place.mkdir(parents=True, exist_ok=True)
    done = _done(place, made_from, images.number)
    arrays = {
        name: np.lib.format.open_memmap(
            place / f"{name}.npy",
            mode="r+" if done else "w+",
            dtype=np.float32,
            shape=(images.number, width),
        )
        for name, width in WIDTHS.items()
    }
    progress = Progress(images.number, start=done, unit="image")
    for turn, rows in enumerate(_batches(images.read(done), batch, preparation)):
        padded = np.pad(rows, [(0, batch - len(rows))] + [(0, 0)] * 3)
        for name, values in run(padded)._asdict().items():
            arrays[name][done : done + len(rows)] = values[: len(rows)]
        done += len(rows)
        progress.update(done)
        if turn % SAVED == SAVED - 1 or done == images.number:
            for array in arrays.values():
                array.flush()
            _note(place, made_from, done)
            progress.line(done, "seen")
    progress.close()
    return Stored(place, images.number)


def _done(place: Path, made_from: Mapping[str, Any], number: int) -> int:
    """How many images' features are there, of just these."""
    try:
        found = json.loads((place / DONE).read_text())
        arrays = [np.load(place / f"{name}.npy", mmap_mode="r") for name in WIDTHS]
    except (OSError, ValueError):
        return 0
    fits = found["made_from"] == made_from and {len(array) for array in arrays} == {number}
    return found["done"] if fits else 0


def _note(place: Path, made_from: Mapping[str, Any], done: int) -> None:
    partial = place / f"{DONE}.partial"
    partial.write_text(json.dumps({"made_from": dict(made_from), "done": done}))
    partial.replace(place / DONE)


def _batches(images: Iterator[np.ndarray], batch: int, preparation: str) -> Iterator[np.ndarray]:
    """[up to batch, 299, 299, 3] each, the next one prepared by threads meanwhile."""
    with ThreadPoolExecutor() as pool:
        waiting: list[Any] = []
        while rows := list(itertools.islice(images, batch)):
            waiting.append(
                [pool.submit(lambda x: prepare(x[None], preparation)[0], row) for row in rows]
            )
            if len(waiting) > 1:
                yield np.stack([future.result() for future in waiting.pop(0)])
        for left in waiting:
            yield np.stack([future.result() for future in left])
