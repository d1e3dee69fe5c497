"""The shards of the cache of latents, as `encode` writes them; `latents` reads them.

Shards of equally many rows, a folder of plain `.npy` files each, one per entry, that are read
through memory maps a batch at a time. An example may have several variants (cut and mirrored each
in its own way), which lie side by side: [rows, variants, ...]. A shard appears whole or not at all,
so that a run that was killed goes on behind the last one, and several hosts write different ones.
`index.json`, which is written last, has the checksums and the fingerprint of what they were made
from.
"""

import json
import os
import shutil
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion_jax.errors import UserError

INDEX, PLAN, FILES = "index.json", "plan.json", "files.json"
NULL = "null"


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
    return [i for i in range(-(-count // rows)) if not _is_whole(partial / shard_name(i))]


def shard_name(number: int) -> str:
    """The folder of a shard."""
    return f"{number:05d}"


def _is_whole(shard: Path) -> bool:
    try:
        files = json.loads((shard / FILES).read_text())
        return all(
            describe_file(shard / f"{name}.npy", about["dtype"]) == about
            for name, about in files.items()
        )
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
    _write(partial, shard_name(number), batches, count)


def write_null(partial: Path, null: Mapping[str, np.ndarray]) -> None:
    """Keeps what stands for "no condition" beside the shards: one row [1, ...] of each entry."""
    if null:
        _write(partial, NULL, [null], 1)


def _write(
    partial: Path, name: str, batches: Iterable[Mapping[str, np.ndarray]], count: int
) -> None:
    unfinished = partial / f".{name}"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    shutil.rmtree(partial / name, ignore_errors=True)  # damaged
    unfinished.mkdir()
    dtypes = write_arrays(unfinished, batches, count)
    files = {name: describe_file(unfinished / f"{name}.npy", d) for name, d in dtypes.items()}
    (unfinished / FILES).write_text(json.dumps(files))
    unfinished.rename(partial / name)


def finish(
    directory: str | os.PathLike,
    *,
    fingerprint: Mapping[str, Any],
    latent_scale: float,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    variants: int = 1,
    once: Collection[str] = (),
) -> None:
    """Makes a cache of the shards that were gathered, all of them; an older one is replaced.

    Args:
      directory: the cache's place.
      fingerprint: JSON-serialisable; what the moments depend on (data, first stage).
      latent_scale: that phase 2 multiplies z by.
      num_classes: of the labels.
      class_names: of the labels.
      variants: of each example; where there are several, they are the second axis of every entry
        but those that are kept `once`.
    """
    place = Path(directory)
    partial = partial_of(place)
    plan = json.loads((partial / PLAN).read_text())
    shards = [
        json.loads((partial / shard_name(i) / FILES).read_text())
        for i in range(-(-plan["count"] // plan["rows"]))
    ]
    null = partial / NULL / FILES
    index = {
        "count": plan["count"],
        "rows": plan["rows"],
        "variants": variants,
        "varied": [name for name in shards[0] if variants > 1 and name not in once],
        "shards": shards,
        "null": json.loads(null.read_text()) if null.exists() else {},
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
) -> dict[str, str]:
    """Fills one memory-mapped array of `count` rows per entry; returns their types."""
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
    return {name: str(array.dtype) for name, array in arrays.items()}


def describe_file(path: Path, dtype: str) -> dict[str, Any]:
    """Shape, dtype, bytes and CRC-32 of an `.npy` file, which itself cannot say "bfloat16"."""
    array = np.load(path, mmap_mode="r")
    return {
        "shape": list(array.shape),
        "dtype": dtype,
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
