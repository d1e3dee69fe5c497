"""safetensors files, by the library's parser of headers and reading and writing of our own.

The library's numpy side lacks float8, and its memory map ends the process by a bus error where a
file shrinks under it; its writer wants all arrays at once and takes transposed ones for contiguous.
Format: length of the header (8 bytes, little endian), header (JSON, may end in spaces), data.
"""

import json
from collections.abc import Callable, Mapping
from typing import BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from latent_diffusion_jax.convert.files import Broken, Tensor, lazy_tensor, open_regular, printable

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
# Of a tensor in the header, beside its name: a shape has at most 19 digits and 64 dimensions of 1.
ENTRY_BYTES = len('"":{"dtype":"F8_E4M3","shape":[],"data_offsets":[,]},') + 19 + 2 * 64 + 2 * 19


def open_safetensors(path: str) -> dict[str, Tensor]:
    """The tensors of one file, in the order of the header.

    Raises:
      Broken: damaged, or a dtype that numpy cannot have (below 8 bits).
    """
    try:
        with safe_open(path, framework="numpy"):  # checks sizes, gaps, overlaps and the end
            pass
    except SafetensorError as error:
        raise Broken(f"is damaged: {error}") from error
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    tensors = {}
    for name, entry in header.items():
        if name == METADATA:
            continue
        if entry["dtype"] not in DTYPES:
            choices = ", ".join(DTYPES)
            raise Broken(f"tensor {printable(name)!r} is {entry['dtype']}: none of {choices}")
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = lazy_tensor(path, name, DTYPES[entry["dtype"]], entry["shape"], start)
    return tensors


def write_safetensors(
    file: BinaryIO,
    tensors: Mapping[str, np.ndarray | Callable[[], np.ndarray]],
    metadata: Mapping[str, str] | None,
) -> None:
    """Writes arrays one at a time, then the header into the room left for it.

    Raises:
      Broken: a dtype or a name that the format cannot hold.
    """
    if METADATA in tensors:
        raise Broken(f"no tensor can be called {METADATA!r}")
    header: dict[str, dict] = {METADATA: dict(metadata)} if metadata else {}
    room = len(json.dumps(header)) + sum(len(json.dumps(name)) + ENTRY_BYTES for name in tensors)
    room += -room % 8
    file.seek(8 + room)
    end = 0
    for name, value in tensors.items():
        array = np.asarray(value() if callable(value) else value)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        if array.dtype not in NAMES:
            raise Broken(f"tensor {name!r} is {array.dtype}: none of {', '.join(map(str, NAMES))}")
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        start, end = end, end + array.nbytes
        offsets = {"data_offsets": (start, end)}
        header[name] = {"dtype": NAMES[array.dtype], "shape": array.shape} | offsets
        del array  # before the next is made
    text = json.dumps(header, separators=(",", ":")).encode()
    file.seek(0)
    file.write(room.to_bytes(8, "little") + text.ljust(room))
