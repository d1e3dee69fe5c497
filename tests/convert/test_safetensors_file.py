import json
import os
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from latent_diffusion_jax.convert.files import open_tensors, write_tensors
from latent_diffusion_jax.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))


def build(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_library_reads_what_is_written_here(tmp_path):
    path = tmp_path / "a.safetensors"
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"b": base.T, "a": base[:, 1:3], "half": base.astype(np.float16), "0-d": np.array(3)}
    write_tensors(path, arrays, {"format": "pt", "é": "\n"})
    read = load_file(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, strict=True)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "é": "\n"}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    assert path.stat().st_size == 8 + header + sum(array.nbytes for array in arrays.values())


def test_what_the_library_writes_is_read_here(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(1.5, ml_dtypes.bfloat16),
        "e": np.zeros((0, 2), np.int64),
        "flag": np.array([True, False]),
    }
    save_file(arrays, path, {"a": "b"})
    tensors = open_tensors(path)
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].read(), array, strict=True)


def test_float8_and_the_order_of_the_header(tmp_path):
    header = {
        "late": entry("F8_E4M3", (2,), (8, 10)),
        "__metadata__": {"a": "b"},
        "early": entry(),
        "last": entry("F8_E5M2", (1, 1), (10, 11)),
    }
    path = build(tmp_path / "a", header, struct.pack("<2f3B", 1, 2, 0x38, 0xB8, 0x3C))
    tensors = open_tensors(path)
    assert list(tensors) == ["late", "early", "last"]
    assert tensors["early"].read().tolist() == [1, 2]
    assert tensors["late"].dtype == ml_dtypes.float8_e4m3fn
    assert tensors["late"].read().tolist() == [1, -1]
    assert tensors["last"].read().tolist() == [[1]]


@pytest.mark.parametrize(
    "header, data",
    [
        ({"a": entry()}, bytes(7)),
        ({"a": entry()}, bytes(9)),
        ({"a": entry(shape=(3,))}, bytes(8)),
        ({"a": entry(shape=(-2,))}, bytes(8)),
        ({"a": entry(shape=(2.0,))}, bytes(8)),
        ({"a": entry(shape=("2",))}, bytes(8)),
        ({"a": entry(shape=(1 << 62, 4))}, bytes(8)),
        ({"a": entry(shape=(1 << 63, 0), offsets=(0, 0))}, b""),
        ({"a": entry(shape=(1 << 63, 1 << 63, 0), offsets=(0, 0))}, b""),
        ({"a": entry(shape=(1,) * 65, offsets=(0, 4))}, bytes(4)),
        ({"a": entry(offsets=(4, 12))}, bytes(12)),
        ({"a": entry(offsets=(8, 0))}, bytes(8)),
        ({"a": entry(offsets=(-8, 0))}, bytes(8)),
        ({"a": entry(offsets=(0, 8, 8))}, bytes(8)),
        ({"a": entry(), "b": entry()}, bytes(8)),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        ({"a": entry(dtype="F31")}, bytes(8)),
        ({"a": entry(dtype="F4", shape=(16,))}, bytes(8)),
        ({"a": {"dtype": "F32"}}, b""),
        ({"a": 1}, b""),
        ({"__metadata__": {"a": 1}}, b""),
        ([], b""),
        (b"{", b""),
        (b"{" + b"\xff" * 9, b""),
        (b'{"a\\ud800":' + json.dumps(entry()).encode() + b"}", bytes(8)),
        (b'{"a":' + b"[" * 100_000, b""),
    ],
)
def test_faulty_headers_end_in_one_line(tmp_path, header, data):
    path = build(tmp_path / "a.safetensors", header, data)
    with pytest.raises(UserError) as caught:
        open_tensors(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 9, 1 << 20, 1 << 40, (1 << 55) - 1])
def test_lengths_of_the_header_that_lie(tmp_path, length):
    path = build(tmp_path / "a.safetensors", {"a": entry()}, bytes(8))
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(UserError):
        open_tensors(path)


def test_only_what_is_asked_for_is_read(tmp_path):
    header = {"big": entry(shape=(1 << 24,), offsets=(0, 1 << 26))}
    header["small"] = entry(shape=(256,), offsets=(1 << 26, (1 << 26) + 1024))
    path = build(tmp_path / "a.safetensors", header)
    os.truncate(path, path.stat().st_size + (1 << 26) + 1024)
    tracemalloc.start()
    tensors = open_tensors(path)
    assert tensors["small"].read().shape == (256,)
    assert tensors["big"].shape == (1 << 24,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def fault_of(path):
    """Reads everything: arrays are as declared, or there is a UserError, which is returned."""
    try:
        for tensor in open_tensors(path).values():
            array = tensor.read()
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
    except UserError as error:
        return str(error)
    return f"{path}"


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_damaged_files(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros((0,), np.int64), "c": np.array(True)}
    write_tensors(path, arrays, {"a": "b"})
    content = bytearray(path.read_bytes().replace(b" " * 8, b""))  # most of it is room
    header = len(content) - 8 - 25
    content[:8] = header.to_bytes(8, "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255) | st.sampled_from(b'"[]{}:,0123456789-'))
    del content[data.draw(st.none() | st.integers(0, len(content))) :]
    path.write_bytes(content)
    fault = fault_of(path)
    assert "\n" not in fault
    assert str(path) in fault
