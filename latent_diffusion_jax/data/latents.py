"""The cache of posterior moments: what `encode` writes and phase 2 reads instead of images.

Plain `.npy` files, one per entry, read through memory maps a batch at a time (a few microseconds an
item), beside an `index.json` with the checksums and the fingerprint of what they were made from.
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

INDEX = "index.json"


def write_latents(
    directory: str | os.PathLike,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    count: int,
    fingerprint: Mapping[str, Any],
    latent_scale: float,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Streams batches such as {"moments": float32 [b, h, w, 2c], "label": int32 [b]} to disk.

    The directory appears whole or not at all (it is written beside its place and then renamed), and
    replaces an older cache.

    Args:
      directory: to make.
      batches: all with the same keys, together `count` rows.
      count: the number of examples.
      fingerprint: JSON-serialisable; what the moments depend on (data, first stage).
      latent_scale: that phase 2 multiplies z by.
      num_classes: of the labels.
      class_names: of the labels.

    Raises:
      UserError: `directory` holds something else than a cache.
      ValueError: the batches do not add up to `count`.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()) and not (directory / INDEX).exists():
        raise UserError(f"{str(directory)!r} is not a cache of latents: it will not be replaced")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        names = write_arrays(partial, batches, count)
        index = {
            "count": count,
            "files": {name: describe_file(partial / f"{name}.npy") for name in names},
            "latent_scale": float(latent_scale),
            "num_classes": num_classes,
            "class_names": list(class_names) if class_names else None,
            "fingerprint": dict(fingerprint),
        }
        (partial / INDEX).write_text(json.dumps(index, indent=2))
        replace_directory(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
        if fingerprint is not None:
            differing = differences(fingerprint, index["fingerprint"], "in the cache")
            if differing:
                raise UserError(
                    f"the latents in {str(self.directory)!r} are of something else;"
                    f" {'; '.join(differing)}: run `encode`"
                )
        self.files: dict[str, dict] = index["files"]
        self.size: int = index["count"]
        self.latent_scale: float = index["latent_scale"]
        self.num_classes: int | None = index["num_classes"]
        self.class_names = tuple(index["class_names"]) if index["class_names"] else None
        self.fingerprint: dict[str, Any] = index["fingerprint"]
        self.arrays = {}
        for name, about in self.files.items():
            path = self.directory / f"{name}.npy"
            size = path.stat().st_size if path.exists() else 0
            if size != about["bytes"]:
                raise UserError(
                    f"{str(path)!r} has {size} bytes instead of {about['bytes']}: run `encode`"
                )
            self.arrays[name] = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} of {self.size} latents")
        return {name: array[index] for name, array in self.arrays.items()}

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at int [B] `indices` of every entry, copied into memory."""
        return {name: np.asarray(array[indices]) for name, array in self.arrays.items()}

    def verify(self) -> None:
        """Reads everything and compares checksums.

        Raises:
          UserError: the first file that differs.
        """
        for name, about in self.files.items():
            path = self.directory / f"{name}.npy"
            if crc32(path) != about["crc32"]:
                raise UserError(f"{str(path)!r} is damaged (its checksum differs): run `encode`")
