"""Sets of images as people have them: folders, ADM's `.npz` batches, and stored statistics.

A batch of ADM's holds `arr_0`, uint8 [N, H, W, 3]; statistics hold `mu` and `sigma` (and of sFID
`mu_s` and `sigma_s`), as pytorch-fid, torch-fidelity and ADM write them. Batches are read a few
images at a time, compressed or not.
"""

import contextlib
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_diffusion_jax.data.folder import SUFFIXES
from latent_diffusion_jax.data.transforms import read_rgb
from latent_diffusion_jax.errors import UserError

BATCH = "arr_0"
SAMPLES = "samples.json"  # the list that `sample` writes
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # of features, by their name


Statistics = dict[str, tuple[np.ndarray, np.ndarray]]  # of `write_statistics`


class Images(NamedTuple):
    """A set of images.

    number: how many.
    read: start -> the images from there on, uint8 [H, W, 3], of any sizes. Where a model makes
      them, all processes read together.
    made_from: what tells this set from another, for JSON.
    """

    number: int
    read: Callable[[int], Iterator[np.ndarray]]
    made_from: dict[str, Any]


def open_images(path: str) -> Images:
    """The images of a folder, with its sub-folders, by name; or those of a `.npz` batch.

    Of what `sample` wrote, the samples: not the grid of them, which lies beside.

    Raises:
      UserError: nothing there, or nothing that is an image.
    """
    place = Path(path)
    if place.is_dir():
        return _folder(place)
    if not place.is_file():
        raise UserError(f"no folder or file {path!r}")
    return _batch(place)


def _folder(place: Path) -> Images:
    files = sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES)
    if (place / SAMPLES).is_file():
        images = json.loads((place / SAMPLES).read_text())["images"]
        files = [place / image["file_name"] for image in images]
    if not files:
        raise UserError(f"no images in {str(place)!r} ({', '.join(SUFFIXES)})")
    sizes = [file.stat() for file in files]

    def read(start: int) -> Iterator[np.ndarray]:
        for file in files[start:]:
            try:
                image = read_rgb(str(file))
            except Exception as error:  # decoders raise anything on a broken file
                raise UserError(f"{str(file)!r} cannot be read: {error}") from None
            yield np.asarray(image)

    about = {
        "path": str(place),
        "bytes": sum(size.st_size for size in sizes),
        "changed": max(size.st_mtime_ns for size in sizes),
    }
    return Images(len(files), read, about)


def _batch(place: Path) -> Images:
    with _member(place, BATCH) as (shape, dtype, _):
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise UserError(
                f"{str(place)!r}: {BATCH} is {dtype} {list(shape)}, not uint8 [N, H, W, 3]"
            )

    def read(start: int) -> Iterator[np.ndarray]:
        with _member(place, BATCH) as (shape, _, file):
            size = int(np.prod(shape[1:]))
            for number in range(shape[0]):
                data = file.read(size)
                if len(data) != size:
                    raise UserError(f"{str(place)!r} ends within image {number} of {shape[0]}")
                if number >= start:
                    yield np.frombuffer(data, np.uint8).reshape(shape[1:])

    stat = place.stat()
    about = {"path": str(place), "bytes": stat.st_size, "changed": stat.st_mtime_ns}
    return Images(shape[0], read, about)


@contextlib.contextmanager
def _member(place: Path, name: str) -> Iterator[tuple[tuple[int, ...], np.dtype, Any]]:
    """An array of a `.npz` as (shape, dtype, file behind its header), while it is open."""
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(place))
            file = stack.enter_context(archive.open(f"{name}.npy"))
            shape, fortran, dtype = HEADERS[np.lib.format.read_magic(file)](file)
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            line = " ".join(str(error).split())
            raise UserError(f"{str(place)!r} is no .npz with {name}: {line}") from None
        if fortran:
            raise UserError(f"{str(place)!r}: {name} is in Fortran's order")
        yield shape, dtype, file


def open_reference(path: str) -> Images | Statistics:
    """Statistics where a file holds them, whatever images are beside; images otherwise."""
    return read_statistics(path) if _is_statistics(path) else open_images(path)


def _is_statistics(path: str) -> bool:
    place = Path(path)
    if not place.is_file() or not zipfile.is_zipfile(place):
        return False
    with zipfile.ZipFile(place) as archive:
        return f"{MOMENTS['pool'][0]}.npy" in archive.namelist()


def read_statistics(path: str) -> Statistics:
    """Name of features, "pool" and perhaps "spatial" -> (mean [D], covariance [D, D]).

    Raises:
      UserError: moments whose shapes do not fit.
    """
    found = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name, keys in MOMENTS.items():
            if not set(keys) <= set(arrays.files):
                continue
            mean, covariance = (arrays[key].astype(np.float64) for key in keys)
            if mean.ndim != 1 or covariance.shape != (*mean.shape, *mean.shape):
                shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
                raise UserError(f"{path!r}: {' and '.join(keys)} are {shapes}, not [D] and [D, D]")
            found[name] = mean, covariance
    if "pool" not in found:
        raise UserError(f"{path!r} has no {' and '.join(MOMENTS['pool'])}")
    return found


def write_statistics(path: str, moments: Statistics) -> None:
    """What `read_statistics` reads, in one file."""
    arrays: dict[str, Any] = {}
    for name, pair in moments.items():
        arrays |= dict(zip(MOMENTS[name], pair, strict=True))
    with Path(path).open("wb") as file:
        np.savez(file, **arrays)
