"""The cache of latents: what `encode` writes and phase 2 reads instead of images, and of captions.

Read through memory maps a batch at a time; `shards` has the layout.
"""

import json
import math
import mmap
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.data.shards import INDEX, NULL, crc32, shard_name
from latent_diffusion_jax.errors import UserError, differences


class Latents:
    """Random access to a cache; `fetch` gathers a whole batch at once.

    Attributes: `latent_scale`, `num_classes`, `class_names`, `fingerprint`; `null`, what stands for
    "no condition" in the entries that a frozen network made.

    Args:
      directory: that `finish` made.
      fingerprint: what the cache must have been made from; None takes any.

    Raises:
      UserError: missing, broken or truncated, or made from something else (says which keys).
    """

    def __init__(
        self, *, directory: str | os.PathLike, fingerprint: Mapping[str, Any] | None = None
    ):
        self.directory = Path(directory)
        index = _read_index(self.directory)
        if fingerprint is not None:
            differing = differences(fingerprint, index["fingerprint"], "in the cache")
            if differing:
                raise UserError(
                    f"the latents in {str(self.directory)!r} are of something else;"
                    f" {'; '.join(differing)}: run `encode`"
                )
        self.size: int = index["count"]
        self.rows: int = index["rows"]
        self.variants: int = index["variants"]
        self.varied = frozenset(index["varied"])
        self.latent_scale: float = index["latent_scale"]
        self.num_classes: int | None = index["num_classes"]
        self.class_names = tuple(index["class_names"]) if index["class_names"] else None
        self.fingerprint: dict[str, Any] = index["fingerprint"]
        self.files: dict[str, dict[str, dict]] = {  # of each folder
            **{shard_name(number): files for number, files in enumerate(index["shards"])},
            NULL: index["null"],
        }
        arrays = [self._open(folder) for folder in self.files]
        self.null = {name: np.array(array[0]) for name, array in arrays.pop().items()}
        self._arrays = arrays
        self.names = tuple(arrays[0])

    def _open(self, folder: str) -> dict[str, np.memmap]:
        arrays = {}
        for name, about in self.files[folder].items():
            path = self.directory / folder / f"{name}.npy"
            size = path.stat().st_size if path.exists() else 0
            if size != about["bytes"]:
                raise UserError(
                    f"{str(path)!r} has {size} bytes instead of {about['bytes']}: run `encode`"
                )
            shape, dtype = about["shape"], jnp.dtype(about["dtype"])
            if folder != NULL and name in self.varied:
                shape = [shape[0] * shape[1], *shape[2:]]
            header = size - math.prod(shape) * dtype.itemsize
            arrays[name] = np.memmap(path, dtype, "r", header, tuple(shape))
        return arrays

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The first variant of an example."""
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} of {self.size} latents")
        return {name: value[0] for name, value in self.fetch(np.array([index])).items()}

    def fetch(self, indices: np.ndarray, turns: np.ndarray | int = 0) -> dict[str, np.ndarray]:
        """The examples at int [B] `indices`, every entry copied into memory.

        `turns`, int [B], say how often each was read before. Variants take turns: they were drawn
        at random already, and so all are used equally often.
        """
        numbers, rows = np.divmod(indices, self.rows)
        varied = rows * self.variants + turns % self.variants
        pieces = [
            (name, array, chosen, (varied if name in self.varied else rows)[chosen])
            for number in np.unique(numbers)
            for chosen in [np.flatnonzero(numbers == number)]
            for name, array in self._arrays[number].items()
        ]
        for _, array, _, places in pieces:  # of all, before the first is waited for
            _read_ahead(array, places)
        out = {
            name: np.empty((len(indices), *array.shape[1:]), array.dtype)
            for name, array in self._arrays[0].items()
        }
        for name, array, chosen, places in pieces:
            out[name][chosen] = array[places]
        return out

    def verify(self) -> None:
        """Reads everything and compares checksums.

        Raises:
          UserError: the first file that differs.
        """
        for folder, files in self.files.items():
            for name, about in files.items():
                path = self.directory / folder / f"{name}.npy"
                if crc32(path) != about["crc32"]:
                    raise UserError(
                        f"{str(path)!r} is damaged (its checksum differs): run `encode`"
                    )


def _read_index(directory: Path) -> dict[str, Any]:
    try:
        index = json.loads((directory / INDEX).read_text())
    except FileNotFoundError:
        raise UserError(f"no cached latents in {str(directory)!r}: run `encode`") from None
    except ValueError as error:
        raise UserError(f"{str(directory / INDEX)!r} is broken: {error}") from None
    if not {"shards", "variants"} <= index.keys():
        raise UserError(f"the latents in {str(directory)!r} are of an older form: run `encode`")
    return index


def _read_ahead(array: np.memmap, rows: np.ndarray) -> None:
    """Asks for the pages of some rows: one after the other, each would be a wait for the disk."""
    size, pages = array.strides[0], cast(mmap.mmap, array.base)
    if size < mmap.PAGESIZE:  # many rows a page: the kernel's own guess is as good
        return
    for row in rows:
        start = array.offset + int(row) * size
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        pages.madvise(mmap.MADV_WILLNEED, page, start + size - page)
