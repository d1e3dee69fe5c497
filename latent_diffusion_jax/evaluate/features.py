"""Inception's features of a set of images, on disk: memory does not grow with the set.

A folder holds `pool.npy`, `spatial.npy` and `logits.npy`, float32 [N, ...], and `done.json`, which
says of what and how far: a run that was killed goes on there, and the next one reads them at once.
Of several processes each prepares its rows of a batch, and the first writes.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh

from latent_diffusion_jax.cluster import everywhere
from latent_diffusion_jax.evaluate.distances import Moments, no_moments, update
from latent_diffusion_jax.evaluate.inception import SIDE, Features, Inception, prepare
from latent_diffusion_jax.evaluate.sets import Images
from latent_diffusion_jax.train.metrics import Progress
from latent_diffusion_jax.train.sharding import put_batch, put_tree, replicated

WIDTHS = {"pool": 2048, "spatial": 2023, "logits": 1008}
DONE = "done.json"
SAVED = 16  # batches between notes of how far it is
ROWS = 1024  # read at once


class Stored:
    """Features on disk: `pool`, `spatial` and `logits`, [N, ...] each, mapped into memory.

    pace: images a second as the set gave them, by itself; None where nothing was timed.
    """

    def __init__(self, place: Path, number: int, pace: float | None):
        self.number, self.pace = number, pace
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
    """Gives run(float32 [B, 299, 299, 3]) -> Features, spread over the mesh; B divides by it.

    A process gives its own rows, and gets the features of all.
    """
    params = put_tree(mesh, params)
    apply = jax.jit(
        lambda params, x: Inception().apply({"params": params}, x),
        out_shardings=replicated(mesh),
    )
    return lambda x: jax.device_get(apply(params, put_batch(mesh, {"image": x})["image"]))


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

    `made_with` is of the network, for `done.json`: features of another are computed again. What is
    returned can be read in the first process alone.
    """
    made_from = {**images.made_from, **made_with, "preparation": preparation}
    made_from = json.loads(json.dumps(made_from))  # as it is read back: tuples are lists
    writes = jax.process_index() == 0
    note = _read(place, made_from, images.number) if writes else NOTHING
    everywhere(True)  # weights take some longer to read than collectives wait
    # what the first process finds counts: the others may not see its disk
    done = int(broadcast_one_to_all(np.int64(note.done)))
    arrays = _open(place, images.number, new=done == 0) if writes else {}
    progress = Progress(images.number, start=done, unit="image")
    for turn, (count, seconds, rows) in enumerate(_batches(images.read(done), batch, preparation)):
        found = run(rows)._asdict()
        for name, array in arrays.items():
            array[done : done + count] = found[name][:count]
        done += count
        if turn:  # the first batch compiles
            note = note._replace(timed=note.timed + count, seconds=note.seconds + seconds)
        progress.update(done)
        if turn % SAVED == SAVED - 1 or done == images.number:
            for array in arrays.values():
                array.flush()
            if writes:
                _write(place, made_from, note._replace(done=done))
            progress.line(done, "seen")
    progress.close()
    return Stored(place, images.number, note.timed / note.seconds if note.timed else None)


class _Note(NamedTuple):
    """How far it is, and of how many images making or reading them was timed."""

    done: int
    timed: int
    seconds: float


NOTHING = _Note(0, 0, 0.0)


def _read(place: Path, made_from: Mapping[str, Any], number: int) -> _Note:
    """What is noted of features of just these images."""
    try:
        found = json.loads((place / DONE).read_text())
        arrays = [np.load(place / f"{name}.npy", mmap_mode="r") for name in WIDTHS]
    except (OSError, ValueError):
        return NOTHING
    fits = found.pop("made_from") == made_from and {len(array) for array in arrays} == {number}
    return _Note(**found) if fits else NOTHING


def _write(place: Path, made_from: Mapping[str, Any], note: _Note) -> None:
    partial = place / f"{DONE}.partial"
    partial.write_text(json.dumps({"made_from": made_from, **note._asdict()}))
    partial.replace(place / DONE)


def _open(place: Path, number: int, new: bool) -> dict[str, np.memmap]:
    place.mkdir(parents=True, exist_ok=True)
    if new:  # what is noted there is of other features
        (place / DONE).unlink(missing_ok=True)
    return {
        name: np.lib.format.open_memmap(
            place / f"{name}.npy",
            mode="w+" if new else "r+",
            dtype=np.float32,
            shape=(number, width),
        )
        for name, width in WIDTHS.items()
    }


def _batches(
    images: Iterator[np.ndarray], batch: int, preparation: str
) -> Iterator[tuple[int, float, np.ndarray]]:
    """(images, seconds that they took to come, this process's rows of them [b, 299, 299, 3]).

    Threads prepare the next ones meanwhile. The last batch is filled up.
    """
    share = batch // jax.process_count()
    own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)

    def finished(count, seconds, futures):
        rows = np.zeros((share, SIDE, SIDE, 3), np.float32)
        for row, future in zip(rows, futures):
            row[...] = future.result()
        return count, seconds, rows

    with ThreadPoolExecutor() as pool:
        waiting: list[Any] = []
        while True:
            began = time.perf_counter()
            found = list(itertools.islice(images, batch))
            if not found:
                break
            seconds = time.perf_counter() - began
            futures = [
                pool.submit(lambda x: prepare(x[None], preparation)[0], row) for row in found[own]
            ]
            waiting.append((len(found), seconds, futures))
            if len(waiting) > 1:
                yield finished(*waiting.pop(0))
        for left in waiting:
            yield finished(*left)
