"""torch checkpoints without torch: the containers of `torch.save`, old and new, and a writer.

What a pickle in them says is read by `torch_pickle`; the numbers lie beside it, raw.
"""

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from latent_diffusion_jax.convert.files import (
    LEGACY_MAGIC,
    MAX_DIMS,
    Broken,
    Tensor,
    contiguous_strides,
    lazy_tensor,
    open_regular,
    printable,
    span_of,
)
from latent_diffusion_jax.convert.torch_pickle import (
    DTYPES,
    WRITTEN,
    Inert,
    Pickle,
    Storage,
    View,
    is_size,
)

NESTED = (
    "model",
    "model_state",
    "model_state_dict",
    "module",
    "net",
    "params",
    "params_ema",
    "ema",
)
PICKLE_LIMIT = 64 << 20  # bytes; torch writes 91 per tensor and its name
DIRECTORY_LIMIT = 16 << 20  # bytes of a zip's list of members
TENSOR_LIMIT = 100_000  # in one file; a pickle can give one tensor any number of names
EXPANDED_LIMIT = 1 << 20  # elements that a view may have beyond those of its storage
NATIVE = (b"", b"little")  # before torch 2.0 a file does not say


class Stored(NamedTuple):
    """Where a storage lies in the file."""

    start: int
    nbytes: int
    checksum: int | None


NOTHING = Stored(0, 0, None)  # in place of a member that is missing: one without a byte


class Window:
    """The methods of a file that zipfile and pickletools use, for `limit` bytes in all."""

    def __init__(self, file: BinaryIO, limit: int):
        self.file, self.left = file, limit
        self.size = os.fstat(file.fileno()).st_size
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Reads, less than asked for where that is too much; Python allots all that it is told."""
        if not 0 <= size < 1 << 16:
            there = min(self.left, max(self.size - self.tell(), 0))
            size = min(size, there) if size >= 0 else there
        return self.taken(self.file.read(size))

    def readline(self) -> bytes:
        """Reads to the end of the line or the limit."""
        return self.taken(self.file.readline(self.left))

    def taken(self, data: bytes) -> bytes:
        """Counts what was read."""
        self.left -= len(data)
        if self.left < 0:
            raise Broken("refused: its pickle or its list of members is far too long")
        return data


def tensors_of(path: str, top: Any, find: Callable[[Storage], Stored]) -> dict[str, Tensor]:
    """The tensors of a state dict, by the rules of `files.open_tensors`; what is none is left out.

    Args:
      path: of the file.
      top: what the pickle holds.
      find: where a storage lies.

    Raises:
      Broken: no state dict, several, or a tensor that does not fit its storage.
    """
    if type(top) is not dict:
        raise Broken("holds no state dict: torch.save the module's state_dict() instead")
    state = top.get("state_dict")
    if type(state) is not dict:
        nested = [name for name in NESTED if has_tensors(top.get(name))]
        if len(nested) > 1:
            raise Broken(f"holds several state dicts: torch.save one of {', '.join(nested)} alone")
        state = top[nested[0]] if nested else top
    if len(state) > TENSOR_LIMIT:
        raise Broken(f"refused: its state dict has {len(state)} entries, more than {TENSOR_LIMIT}")
    if state and not has_tensors(state):
        entries = ", ".join(map(printable, list(state)[:8]))
        raise Broken(f"holds no state dict: it has {printable(entries)}")
    tensors = {}
    for name, value in state.items():
        if type(value) is View:
            tensors[name] = tensor_of(path, name, value, find(value.storage))
        elif type(value) is Inert and value.called and "._rebuild_" in value.name:
            raise Broken(f"tensor {printable(name)!r} is of a kind unknown here: {value.name}")
    return tensors


def has_tensors(entry: Any) -> bool:
    """Whether it is a dict that holds a tensor."""
    return type(entry) is dict and any(type(value) is View for value in entry.values())


def tensor_of(path: str, name: str, view: View, stored: Stored) -> Tensor:
    """Checks a view against its storage and the storage against the file."""
    storage, offset, shape, strides, kind = view
    shown = f"tensor {printable(name)!r}"
    if not (
        is_size(offset)
        and type(shape) in (list, tuple)
        and type(strides) in (list, tuple)
        and len(shape) == len(strides) <= MAX_DIMS
        and all(map(is_size, (*shape, *strides)))
    ):
        raise Broken(f"is damaged: {shown} has no proper shape, strides and offset")
    dtype = storage.dtype
    if kind is not None:
        if type(kind) is not Inert or kind.name not in DTYPES or dtype != np.uint8:
            raise Broken(f"{shown} has a dtype that is none of {', '.join(DTYPES)}")
        dtype = DTYPES[kind.name]
    if storage.numel * storage.dtype.itemsize != stored.nbytes:
        raise Broken(f"is damaged: the storage of {shown} has another size")
    room = (storage.numel if storage.view is None else storage.view) * storage.dtype.itemsize
    start = storage.offset * storage.dtype.itemsize + offset * dtype.itemsize
    end = (offset + span_of(shape, strides)) * dtype.itemsize
    if end > room and 0 not in shape:
        raise Broken(f"is damaged: {shown} reaches beyond its storage")
    if prod(shape) > max(room // dtype.itemsize, EXPANDED_LIMIT):
        raise Broken(f"refused: {shown} is far larger than its storage")
    whole = start == 0 and end == stored.nbytes
    checksum = stored.checksum if whole else None
    return lazy_tensor(path, name, dtype, shape, stored.start + start, strides, checksum)


def open_zip(path: str) -> dict[str, Tensor]:
    """The tensors of a file of torch >= 1.6: a zip of `data.pkl` and one member per storage.

    Raises:
      Broken: damaged, hostile, of TorchScript, or without a state dict.
    """
    with open_regular(path) as file:
        members = locate(file)
        found = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise Broken(f"is a zip with {len(found)} members '*/data.pkl', not a torch checkpoint")
        folder = found[0].removesuffix("data.pkl")
        if content(file, members.get(f"{folder}byteorder", NOTHING)) not in NATIVE:
            raise Broken("was not written on a little-endian machine: torch.save it on one")
        top = Pickle().load(io.BytesIO(content(file, members[found[0]])))

    return tensors_of(path, top, lambda s: members.get(f"{folder}data/{s.key}", NOTHING))


def content(file: BinaryIO, member: Stored) -> bytes:
    """The bytes of a small member."""
    if member.nbytes > PICKLE_LIMIT:
        raise Broken(f"refused: its pickle has {member.nbytes} bytes, more than {PICKLE_LIMIT}")
    file.seek(member.start)
    data = file.read(member.nbytes)
    if member.checksum is not None and zlib.crc32(data) != member.checksum:
        raise Broken("is damaged: the checksum of its pickle differs")
    return data


def locate(file: BinaryIO) -> dict[str, Stored]:
    """Where the members of a zip lie; those of torch are neither compressed nor encrypted."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(Window(file, DIRECTORY_LIMIT)) as archive:  # type: ignore[arg-type]
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    members = {}
    for info, end in zip(infos, [info.header_offset for info in infos[1:]] + [size]):
        name = printable(info.filename)
        if name.endswith("/constants.pkl") or "/code/" in name:
            raise Broken("is a TorchScript archive: torch.save its state_dict() instead")
        if info.flag_bits & 1 or info.compress_type or info.file_size != info.compress_size:
            raise Broken(f"refused: {name!r} in it is compressed or encrypted; torch does neither")
        file.seek(max(info.header_offset, 0))
        signature, length, extra = struct.unpack("<4s22x2H", file.read(30))
        start = info.header_offset + 30 + length + extra
        if signature != b"PK\3\4" or file.read(length) != encoded_name(info):
            raise Broken(f"is damaged: {name!r} in it is not where the list of members says")
        if start + info.file_size > end:
            raise Broken(f"refused: {name!r} in it overlaps what comes after it")
        if info.filename in members:
            raise Broken(f"refused: {name!r} is in it twice")
        # torch writes 0 where it was told to compute no checksums.
        members[info.filename] = Stored(start, info.file_size, info.CRC or None)
    return members


def encoded_name(info: zipfile.ZipInfo) -> bytes:
    """The name of a member as its own header has it."""
    return info.filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")


def open_legacy(path: str) -> dict[str, Tensor]:
    """The tensors of a file of torch < 1.6: five pickles, then each storage after its length.

    Raises:
      Broken: damaged, hostile, or without a state dict.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        window, machine = Window(file, PICKLE_LIMIT), Pickle()
        magic, protocol, system, top, keys = (machine.load(window) for _ in range(5))
        if magic != int.from_bytes(LEGACY_MAGIC, "little") or protocol != 1001:
            raise Broken("is no file of torch.save, or of an unknown version of it")
        if type(system) is not dict or system.get("little_endian") is not True:
            raise Broken("was not written on a little-endian machine: torch.save it on one")
        members: dict[str, Stored] = {}
        start = file.tell()
        for key in keys if type(keys) is list else ():
            storage = machine.storages.get(key) if type(key) is str else None
            if storage is None:
                raise Broken("is damaged: it has a storage of no tensor")
            start, nbytes = start + 8, storage.numel * storage.dtype.itemsize
            file.seek(start - 8)
            if file.read(8) != storage.numel.to_bytes(8, "little") or start + nbytes > size:
                raise Broken("is damaged: a storage has another size, or the file ends early")
            members[key] = Stored(start, nbytes, None)
            start += nbytes
    return tensors_of(path, top, lambda storage: members.get(storage.key, NOTHING))


def write_torch(
    file: BinaryIO,
    tensors: Mapping[str, np.ndarray | Callable[[], np.ndarray]],
    metadata: Mapping[str, str] | None,
) -> None:
    """Writes what `torch.load(path, weights_only=True)` opens; one array at a time.

    Raises:
      Broken: a dtype that has no typed storage in torch.
    """
    ordered = b"ccollections\nOrderedDict\n)R"
    data = b"\x80\2}(" + opcodes("state_dict") + ordered + b"("
    with zipfile.ZipFile(file, "w") as archive:
        for number, (name, value) in enumerate(tensors.items()):
            array = np.asarray(value() if callable(value) else value)
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
            if array.dtype not in WRITTEN:
                choices = ", ".join(map(str, WRITTEN))
                raise Broken(f"tensor {name!r} is {array.dtype}: none of {choices}")
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            add(archive, file, f"data/{number}", raw.data)
            storage = f"c{WRITTEN[array.dtype]}\n".replace(".", "\n").encode()
            data += opcodes(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
            data += b"(" + opcodes("storage") + storage + opcodes(str(number)) + opcodes("cpu")
            data += opcodes(array.size) + b"tQ" + opcodes(0) + opcodes(array.shape)
            data += opcodes(contiguous_strides(array.shape)) + b"\x89" + ordered + b"tR"
            del array, raw  # before the next is made
        data += b"u"
        if metadata:
            data += opcodes("metadata") + opcodes(dict(metadata))
        add(archive, file, "data.pkl", data + b"u.")
        add(archive, file, "version", b"3\n")
        add(archive, file, "byteorder", b"little")


def opcodes(value: Any) -> bytes:
    """Of a pickle that pushes a value of plain Python."""
    return pickle.dumps(value, protocol=2)[2:-1]  # without PROTO and STOP


def add(archive: zipfile.ZipFile, file: BinaryIO, name: str, data: bytes | memoryview) -> None:
    """Adds a member that starts at a multiple of 64 bytes, as torch's do (below 2 GB)."""
    info = zipfile.ZipInfo(f"archive/{name}")
    padding = -(file.tell() + 30 + len(info.filename) + 4) % 64
    info.extra = struct.pack("<2H", 0x4246, padding) + bytes(padding)
    info.file_size = len(data)  # whether zip64 is needed
    with archive.open(info, "w") as member:
        member.write(data)
