"""The cache of posterior moments: what `encode` writes and phase 2 reads instead of images.

Shards of equally many rows, a folder of plain `.npy` files each, one per entry, that are read
through memory maps a batch at a time. A shard appears whole or not at all, so that a run that was
killed goes on behind the last one, and several hosts write different ones. `index.json`, which is
written last, has the checksums and the fingerprint of what they were made from.
"""

import json
import operator
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion_jax.errors import UserError, differences

INDEX, PLAN, FILES = "index.json", "plan.json", "files.json"


def begin(directory: str | os.PathLike, plan: Mapping[str, Any], count: int, rows: int) -> Path:
    """Makes the folder beside a cache's place that shards are gathered in, and returns it.

    What a run of the same plan (JSON) left there, `count` examples in shards of `rows`, is kept.
    One process calls this before the others write.

    Raises:
      UserError: the place holds something else than a cache.
    """
    place = Path(directory)
    if place.exists() and any(place.iterdir()) and not (place / INDEX).exists():
        raise UserError(f"{str(place)!r} is not a cache of latents: it will not be replaced")
    partial = partial_of(place)
    here = json.dumps({"plan": dict(plan), "count": count, "rows": rows})
    there = partial / PLAN
    if not there.exists() or there.read_text() != here:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        there.write_text(here)
    return partial


def partial_of(place: Path) -> Path:
    """Where the shards of a cache are gathered."""
    return place.with_name(f".{place.name}.partial")


def shard_rows(number: int, count: int, rows: int) -> range:
    """The examples of a shard."""
    return range(number * rows, min((number + 1) * rows, count))


def unfinished(partial: Path, count: int, rows: int) -> list[int]:
    """The numbers of the shards that are not there, or damaged."""
    return [i for i in range(-(-count // rows)) if not _is_whole(partial / _name(i))]


def _name(number: int) -> str:
    return f"{number:05d}"


def _is_whole(shard: Path) -> bool:
    try:
        files = json.loads((shard / FILES).read_text())
        return all(describe_file(shard / f"{name}.npy") == about for name, about in files.items())
    except (OSError, ValueError):
        return False


def write_shard(
    partial: Path, number: int, batches: Iterable[Mapping[str, np.ndarray]], count: int
) -> None:
    """Streams batches such as {"moments": float32 [b, h, w, 2c], "label": int32 [b]} to a shard.

    Args:
      partial: from `begin`.
      number: of the shard.
      batches: all with the same keys, together `count` rows.
      count: of the shard's rows.

    Raises:
      ValueError: the batches do not add up to `count`.
    """
    unfinished = partial / f".{_name(number)}"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    shutil.rmtree(partial / _name(number), ignore_errors=True)  # damaged
    unfinished.mkdir()
    names = write_arrays(unfinished, batches, count)
    files = {name: describe_file(unfinished / f"{name}.npy") for name in names}
    (unfinished / FILES).write_text(json.dumps(files))
    unfinished.rename(partial / _name(number))


def finish(
    directory: str | os.PathLike,
    *,
    fingerprint: Mapping[str, Any],
    latent_scale: float,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Makes a cache of the shards that were gathered, all of them; an older one is replaced.

    Args:
      directory: the cache's place.
      fingerprint: JSON-serialisable; what the moments depend on (data, first stage).
      latent_scale: that phase 2 multiplies z by.
      num_classes: of the labels.
      class_names: of the labels.
    """
    place = Path(directory)
    partial = partial_of(place)
    plan = json.loads((partial / PLAN).read_text())
    shards = [
        json.loads((partial / _name(i) / FILES).read_text())
        for i in range(-(-plan["count"] // plan["rows"]))
    ]
    index = {
        "count": plan["count"],
        "rows": plan["rows"],
        "shards": shards,
        "latent_scale": float(latent_scale),
        "num_classes": num_classes,
        "class_names": list(class_names) if class_names else None,
        "fingerprint": dict(fingerprint),
    }
    (partial / INDEX).write_text(json.dumps(index, indent=1))
    (partial / PLAN).unlink()
    replace_directory(partial, place)


def write_arrays(
    folder: Path, batches: Iterable[Mapping[str, np.ndarray]], count: int
) -> list[str]:
    """Fills one memory-mapped array of `count` rows per entry; returns the names."""
    arrays: dict[str, np.memmap] = {}
    row = 0
    for batch in batches:
        batch = {name: np.asarray(value) for name, value in batch.items()}
        if not arrays:
            for name, value in batch.items():
                shape = (count, *value.shape[1:])
                arrays[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", "w+", value.dtype, shape
                )
        rows = len(next(iter(batch.values())))
        if batch.keys() != arrays.keys() or row + rows > count:
            raise ValueError(f"batch of {rows} rows of {sorted(batch)} at row {row} of {count}")
        for name, value in batch.items():
            arrays[name][row : row + rows] = value
        row += rows
    if row != count:
        raise ValueError(f"{row} rows instead of {count}")
    for array in arrays.values():
        array.flush()
    return list(arrays)


def describe_file(path: Path) -> dict[str, Any]:
    """Shape, dtype, bytes and CRC-32 of an `.npy` file."""
    array = np.load(path, mmap_mode="r")
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "bytes": path.stat().st_size,
        "crc32": crc32(path),
    }


def crc32(path: Path) -> int:
    """CRC-32 of a file, a mebibyte at a time."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def replace_directory(new: Path, place: Path) -> None:
    """Renames `new` to `place`; an older one is moved aside first and deleted last."""
    if not place.exists():
        os.replace(new, place)
        return
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old)


class Latents:
    """Random access to a cache; `fetch` gathers a whole batch at once.

    Attributes: `latent_scale`, `num_classes`, `class_names`, `fingerprint`.

    Args:
      directory: that `write_latents` made.
      fingerprint: what the cache must have been made from; None takes any.

    Raises:
      UserError: missing, broken or truncated, or made from something else (says which keys).
    """

    def __init__(
        self, *, directory: str | os.PathLike, fingerprint: Mapping[str, Any] | None = None
    ):
        self.directory = Path(directory)
        try:
            index = json.loads((self.directory / INDEX).read_text())
        except FileNotFoundError:
            raise UserError(f"no cached latents in {str(directory)!r}: run `encode`") from None
        except ValueError as error:
            raise UserError(f"{str(self.directory / INDEX)!r} is broken: {error}") from None
        if "shards" not in index:
            raise UserError(f"the latents in {str(directory)!r} are of an older form: run `encode`")
        if fingerprint is not None:
            differing = differences(fingerprint, index["fingerprint"], "in the cache")
            if differing:
                raise UserError(
                    f"the latents in {str(self.directory)!r} are of something else;"
                    f" {'; '.join(differing)}: run `encode`"
                )
        self.size: int = index["count"]
        self.rows: int = index["rows"]
        self.latent_scale: float = index["latent_scale"]
        self.num_classes: int | None = index["num_classes"]
        self.class_names = tuple(index["class_names"]) if index["class_names"] else None
        self.fingerprint: dict[str, Any] = index["fingerprint"]
        self.shards: list[dict[str, dict]] = index["shards"]
        self.names = tuple(self.shards[0])
        self._arrays = [self._open(number) for number in range(len(self.shards))]

    def _open(self, number: int) -> dict[str, np.ndarray]:
        arrays = {}
        for name, about in self.shards[number].items():
            path = self._path(number, name)
            size = path.stat().st_size if path.exists() else 0
            if size != about["bytes"]:
                raise UserError(
                    f"{str(path)!r} has {size} bytes instead of {about['bytes']}: run `encode`"
                )
            arrays[name] = np.load(path, mmap_mode="r")
        return arrays

    def _path(self, number: int, name: str) -> Path:
        return self.directory / _name(number) / f"{name}.npy"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} of {self.size} latents")
        number, row = divmod(index, self.rows)
        return {name: array[row] for name, array in self._arrays[number].items()}

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at int [B] `indices` of every entry, copied into memory."""
        numbers, rows = np.divmod(indices, self.rows)
        first = self._arrays[0]
        out = {
            name: np.empty((len(indices), *array.shape[1:]), array.dtype)
            for name, array in first.items()
        }
        for number in np.unique(numbers):
            chosen = numbers == number
            for name, array in self._arrays[number].items():
                out[name][chosen] = array[rows[chosen]]
        return out

    def verify(self) -> None:
        """Reads everything and compares checksums.

        Raises:
          UserError: the first file that differs.
        """
        for number, files in enumerate(self.shards):
            for name, about in files.items():
                path = self._path(number, name)
                if crc32(path) != about["crc32"]:
                    raise UserError(
                        f"{str(path)!r} is damaged (its checksum differs): run `encode`"
                    )
