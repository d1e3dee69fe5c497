"""Checkpoint files as named tensors: safetensors and torch, whatever the file is called.

Nothing in a file is trusted. What is wrong with one, or hostile in it, ends in one clear line, and
opening a file reads its index alone: each tensor is read from disk when it is asked for.
"""

import contextlib
import json
import os
import secrets
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from latent_diffusion_jax.errors import UserError

INDEX_LIMIT = 64 << 20  # bytes of a `*.safetensors.index.json`
LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # 0x1950a86a20f9469cfc6c, little endian
NO_FILE = ("", ".", "..")
MAX_DIMS = 64  # of numpy and of torch
T = TypeVar("T")


class Tensor(NamedTuple):
    """A tensor in a file: its shape and dtype (ml_dtypes for bfloat16 and float8), known at once.

    `read` reads it into a new C-contiguous array, in torch's layout. It raises UserError where the
    file has changed, or was damaged in a way that only its checksum tells.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Broken(Exception):
    """What is wrong with a file; `open_tensors` adds which file."""


def open_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a checkpoint in the file's order; the content tells the format, not the name.

    - safetensors, or the index (`*.index.json`) of several files that lie beside it;
    - what `torch.save` writes, and wrote before torch 1.6, where the tensors are those of the entry
      `state_dict` (Lightning), or of the one entry such as `model` or `params_ema` that holds any
      (`torch_file.NESTED`), or those directly at the top. Deeper levels are not looked at. Other
      entries (optimizers, callbacks) are not read from disk, and no class in them is ever made.

    Raises:
      UserError: no such file, another format, damaged, hostile, or several state dicts in one file.
    """
    path = os.fspath(path)
    content = guarded(path, read_index)
    if content is None:
        return guarded(path, open_file)
    found: dict[str, Tensor] = {}
    shards: dict[str, dict[str, Tensor]] = {}
    for name, shard in content.items():
        if shard not in shards:
            shards[shard] = guarded(os.path.join(os.path.dirname(path), shard), open_file)
        if name not in shards[shard]:
            raise UserError(f"{path!r}: {printable(shard)!r} has no tensor {printable(name)!r}")
        found[name] = shards[shard][name]
    return found


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray | Callable[[], np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a `.safetensors` or a torch `.ckpt` (`{"state_dict": ..., "metadata": ...}`).

    The file appears whole or not at all, and replaces an older one only then. Functions are called
    one after the other, once each, so that one array at a time is in memory.

    Args:
      path: its suffix is the format.
      tensors: arrays in torch's layout, or functions that return one.
      metadata: strings by name.

    Raises:
      UserError: another suffix, a dtype that the format lacks, or the disk's fault.
    """
    from latent_diffusion_jax.convert import safetensors_file, torch_file  # they import this file

    writers = {
        ".safetensors": safetensors_file.write_safetensors,
        ".ckpt": torch_file.write_torch,
    }
    place = Path(path)
    if place.suffix not in writers:
        raise UserError(f"cannot write {str(place)!r}: its suffix must be one of {list(writers)}")
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            writers[place.suffix](file, tensors, metadata)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, place)
    except (OSError, Broken) as error:
        raise UserError(f"cannot write {str(place)!r}: {printable(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            partial.unlink()


def guarded(path: str, function: Callable[[str], T]) -> T:
    """`function(path)`, in which any exception becomes a UserError of one line with the path."""
    try:
        return function(path)
    except Broken as error:
        raise UserError(f"{path!r}: {printable(error)}") from error
    except OSError as error:
        raise UserError(f"{path!r} cannot be read: {printable(error.strerror or error)}") from error
    except Exception as error:  # the parsers of the standard library raise all kinds
        message = f"{type(error).__name__}: {printable(error)}"
        raise UserError(f"{path!r}: is damaged ({message})") from error


def open_file(path: str) -> dict[str, Tensor]:
    """`open_tensors` of one file that is not an index."""
    from latent_diffusion_jax.convert import safetensors_file, torch_file  # they import this file

    with open_regular(path) as file:
        start = file.read(512)
    if start.startswith(b"PK\3\4"):
        return torch_file.open_zip(path)
    if LEGACY_MAGIC in start[:32]:
        return torch_file.open_legacy(path)
    if start[8:9] == b"{":  # after the header's length
        return safetensors_file.open_safetensors(path)
    if start[257:262] == b"ustar":
        raise Broken("is of torch < 0.1.10; torch.load and torch.save it again")
    raise Broken("is neither safetensors nor a file of torch.save")


def read_index(path: str) -> dict[str, str] | None:
    """{tensor: file} of the index of a sharded checkpoint; None for another kind of file."""
    with open_regular(path) as file:
        start = file.read(9)
        if not start.lstrip().startswith(b"{") or b"\0" in start:  # a safetensors' length has zeros
            return None
        text = file.read(INDEX_LIMIT)
    try:
        index = json.loads(start + text)
    except ValueError as error:
        raise Broken(f"is neither safetensors nor JSON: {error}") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict):
        raise Broken("is no index of a sharded checkpoint: it has no `weight_map`")
    for shard in files.values():
        if not isinstance(shard, str) or shard != os.path.basename(shard) or shard in NO_FILE:
            raise Broken(f"names {printable(shard)!r}, which does not lie beside it")
    return files


def open_regular(path: str) -> BinaryIO:
    """Opens a file to read; a directory, a pipe or a device is refused and not opened."""
    if os.path.isdir(path):
        raise Broken("is a directory; name the file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise Broken("is not a regular file")
    return open(path, "rb")


def lazy_tensor(
    path: str,
    name: str,
    dtype: np.dtype,
    shape: Sequence[int],
    start: int,
    strides: Sequence[int] | None = None,
    checksum: int | None = None,
) -> Tensor:
    """A tensor whose first element is at byte `start` of a file.

    Args:
      path: of the file.
      name: of the tensor, for messages.
      dtype: of the tensor, as in the file.
      shape: of the tensor.
      start: bytes before its first element.
      strides: in elements, as torch counts them, not negative; None where it is contiguous.
      checksum: CRC-32 of the bytes from `start`, where known.

    Raises:
      Broken: a shape that no array can have.
    """
    shape, nbytes = tuple(shape), dtype.itemsize * prod(n or 1 for n in shape)
    if len(shape) > MAX_DIMS or nbytes > sys.maxsize:
        raise Broken(f"the shape of tensor {printable(name)!r} is absurd")
    steps = contiguous_strides(shape)
    given = steps if strides is None else strides
    strides = tuple(step for step, n in zip(given, shape) if n > 1)
    contiguous = strides == tuple(step for step, n in zip(steps, shape) if n > 1)
    span = span_of(shape, given)

    def read(_path: str) -> np.ndarray:
        if not span:
            return np.empty(shape, dtype)
        raw = np.empty(span * dtype.itemsize, np.uint8)
        with open(path, "rb") as file:
            file.seek(start)
            if file.readinto(raw.data) != raw.nbytes:
                raise Broken(f"ends inside tensor {printable(name)!r}")
        if checksum is not None and zlib.crc32(raw.data) != checksum:
            raise Broken(f"is damaged: the checksum of tensor {printable(name)!r} differs")
        flat = (
            (raw != 0) if dtype.kind == "b" else raw.view(dtype)
        )  # any byte but 0 is True in torch
        if contiguous:
            return flat.reshape(shape)
        steps = [step * dtype.itemsize if n > 1 else 0 for step, n in zip(given, shape)]
        return np.ndarray(shape, dtype, flat, strides=steps).copy(order="C")

    return Tensor(shape, dtype, lambda: guarded(path, read))


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a C-contiguous array, in elements."""
    steps = [1]
    for n in reversed(shape[1:]):
        steps.append(steps[-1] * (n or 1))
    return tuple(reversed(steps)) if shape else ()


def span_of(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last, both included; 0 of an empty tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides))


def printable(value: object) -> str:
    """Text of a file or of an exception, cut short, fit for one line of a terminal."""
    text = str(value)[:200]
    return "".join(c if c.isprintable() else " " for c in text).strip()
