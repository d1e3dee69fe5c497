import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from latent_diffusion_jax.convert.files import open_tensors, write_tensors
from latent_diffusion_jax.errors import UserError

SUFFIXES = [".safetensors", ".ckpt"]
DTYPES = [
    *("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"),
    ml_dtypes.bfloat16,
]
RNG = np.random.default_rng(0)


def example(dtype, shape=(3, 4)):
    return RNG.integers(0, 2, shape).astype(dtype)


def check(tensors, expected):
    """The same names in the same order, and bit for bit the same arrays."""
    assert list(tensors) == list(expected)
    for name, array in expected.items():
        read = tensors[name].read()
        assert read.flags.c_contiguous
        assert read.flags.writeable
        assert tensors[name].shape == read.shape == array.shape
        assert tensors[name].dtype == read.dtype == array.dtype
        assert read.tobytes() == array.tobytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path, suffix):
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = {f"model.{np.dtype(dtype)}": example(dtype) for dtype in DTYPES} | {
        "transposed": base.T,
        "strided": base[:, ::2, 1:3],
        "reversed": base[::-1],
        "expanded": np.broadcast_to(base[:, :1], base.shape),
        "fortran": np.asfortranarray(base),
        "big endian": base.astype(">f4"),
        "scalar": np.float32(7),
        "0-d": np.array(3),
        "empty": np.zeros((0, 3), np.float32),
        "é\n\"'": base,
    }
    path = tmp_path / f"model{suffix}"
    write_tensors(path, arrays, {"step": "7"})
    expected = {name: np.asarray(a).astype(a.dtype.newbyteorder("=")) for name, a in arrays.items()}
    check(open_tensors(path), expected)
    write_tensors(path, {name: (lambda a=a: a) for name, a in arrays.items()})
    check(open_tensors(str(path)), expected)
    path.rename(tmp_path / "model.unknown")  # the content tells the format
    check(open_tensors(tmp_path / "model.unknown"), expected)
    write_tensors(path, {})
    assert open_tensors(path) == {}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(SUFFIXES))
def test_any_arrays_make_the_round_trip(tmp_path_factory, data, suffix):
    dtypes = st.sampled_from([np.dtype(dtype) for dtype in DTYPES if isinstance(dtype, str)])
    shapes = hnp.array_shapes(min_dims=0, max_dims=6, min_side=0, max_side=4)
    arrays = data.draw(st.dictionaries(st.text(max_size=8), hnp.arrays(dtypes, shapes), max_size=4))
    arrays = {name: data.draw(st.sampled_from([a, a.T])) for name, a in arrays.items()}
    metadata = data.draw(st.dictionaries(st.text(), st.text(), max_size=3))
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    try:
        for name in [*arrays, *metadata, *metadata.values()]:
            name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair is no text
        return
    write_tensors(path, arrays, metadata)
    check(open_tensors(path), arrays)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_tensor_at_a_time_is_in_memory(tmp_path, suffix):
    def make(i):
        return lambda: np.full((1 << 20,), i, np.float32)

    path = tmp_path / f"model{suffix}"
    write_tensors(path, {})  # imports, too, take memory
    tracemalloc.start()
    write_tensors(path, {str(i): make(i) for i in range(8)})
    tensors = open_tensors(path)
    for i in range(8):
        assert tensors[str(i)].read()[-1] == i
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 32 << 20
    assert peak < 7 << 20  # an array has 4 MiB


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_appears_whole_or_not_at_all(tmp_path, suffix):
    def fail():
        raise RuntimeError("the third")

    path = tmp_path / f"model{suffix}"
    arrays = {"a": np.ones(3), "b": np.ones(3), "c": fail}
    with pytest.raises(RuntimeError, match="the third"):
        write_tensors(path, arrays)
    assert os.listdir(tmp_path) == []
    write_tensors(path, {"old": np.ones(2)})
    with pytest.raises(RuntimeError, match="the third"):
        write_tensors(path, arrays)
    assert os.listdir(tmp_path) == [path.name]
    check(open_tensors(path), {"old": np.ones(2)})
    write_tensors(path, {"new": np.ones(2)})
    check(open_tensors(path), {"new": np.ones(2)})
    with pytest.raises(UserError, match="cannot write .*directory"):
        write_tensors(tmp_path / "nowhere" / path.name, arrays)
    with pytest.raises(UserError, match="cannot write .*directory"):
        write_tensors(path / path.name, arrays)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot write .*directory"):
        write_tensors(path, {"new": np.ones(2)})
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_the_users_to_mend(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    path = tmp_path / f"model{suffix}"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        with pytest.raises(UserError, match="cannot write .*File too large"):
            write_tensors(path, {"a": np.ones(1 << 20, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"must be one of \['.safetensors', '.ckpt'\]"):
        write_tensors(tmp_path / "model.pt", {})
    for suffix in SUFFIXES:
        for array in (np.array(["a"]), np.array([object()])):
            with pytest.raises(UserError, match="tensor 'a' is .*: none of .*float32") as caught:
                write_tensors(tmp_path / f"model{suffix}", {"a": array})
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no tensor can be called '__metadata__'"):
        write_tensors(tmp_path / "model.safetensors", {"__metadata__": np.ones(1)})
    assert os.listdir(tmp_path) == []


@pytest.fixture
def shards(tmp_path):
    """A file in two parts, with its index."""
    arrays = {name: example("float32") for name in "abc"}
    write_tensors(tmp_path / "1.safetensors", {name: arrays[name] for name in "ca"})
    write_tensors(tmp_path / "2.ckpt", {"b": arrays["b"]})
    index = tmp_path / "model.safetensors.index.json"
    files = {"a": "1.safetensors", "b": "2.ckpt", "c": "1.safetensors"}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}, indent=1))
    return index, arrays


def test_a_sharded_checkpoint_is_read_through_its_index(shards, monkeypatch):
    index, arrays = shards
    check(open_tensors(index), arrays)
    monkeypatch.chdir(index.parent)
    check(open_tensors(index.name), arrays)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"d": "1.safetensors"}, "'1.safetensors' has no tensor 'd'"),
        ({"a": "3.safetensors"}, "3.safetensors' cannot be read: No such file"),
        ({"a": "../1.safetensors"}, "which does not lie beside it"),
        ({"a": "/etc/passwd"}, "'/etc/passwd', which does not lie beside it"),
        ({"a": ".."}, "which does not lie beside it"),
        ({"a": ""}, "which does not lie beside it"),
        ({"a": "1\0"}, "embedded null"),
        ({"a": 1}, "which does not lie beside it"),
        ({"a": "model.safetensors.index.json"}, "neither safetensors nor"),
        (["a"], "has no `weight_map`"),
        (None, "has no `weight_map`"),
    ],
)
def test_faults_of_an_index(shards, files, message):
    index, _ = shards
    index.write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UserError, match=message) as caught:
        open_tensors(index)
    assert "\n" not in str(caught.value)
    assert str(index.parent) in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "neither safetensors nor a file of torch.save"),
        (b"<html><head><title>404", "neither safetensors nor a file of torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "neither safetensors nor"),
        (b"{}", "has no `weight_map`"),
        (b'{"a": 1,', "neither safetensors nor JSON"),
        (b'{"a":' + b"[" * 100_000, "RecursionError"),
        (b"\x80\4\x95\0\0\0\0\0\0\0\0}.", "neither safetensors nor a file of torch.save"),
        (b"\0" * 257 + b"ustar\0" + b"\0" * 300, "torch < 0.1.10"),
        (b"PK\3\4", "damaged"),
        (b"\x10\0\0\0\0\0\0\0{", "is damaged"),
    ],
)
def test_files_of_other_kinds(tmp_path, content, message):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_tensors(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(UserError, match="nowhere' cannot be read: No such file"):
        open_tensors(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a directory"):
        open_tensors(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a regular file"):
        open_tensors(tmp_path / "pipe")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_changes_after_it_was_opened(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    write_tensors(path, {"a": np.ones(1 << 16), "b": np.ones(1 << 16)})
    tensors = open_tensors(path)
    os.truncate(path, 1 << 17)
    with pytest.raises(UserError, match="ends inside tensor 'b'"):
        tensors["b"].read()
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        tensors["a"].read()
