"""Files are made by hand here, so that each can be wrong in one way; the last tests need torch."""

import builtins
import collections
import functools
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_diffusion_jax.convert import torch_file, torch_pickle
from latent_diffusion_jax.convert.files import open_tensors, write_tensors
from latent_diffusion_jax.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
DATA = np.arange(6, dtype=np.float32).tobytes()
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
ORDERED = b"ccollections\nOrderedDict\n)R"


def ops(value):
    """Opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def storage(key="0", kind="torch\nFloatStorage", numel=6, *view):
    body = ops("storage") + f"c{kind}\n".encode() + ops(key) + ops("cpu") + ops(numel)
    return b"(" + body + b"".join(map(ops, view)) + b"tQ"


def tensor(stored=None, offset=0, shape=(2, 3), strides=(3, 1), rest=b"\x89" + ORDERED, version=2):
    suffix = {1: "", 2: "_v2", 3: "_v3"}[version]
    body = (stored or storage()) + ops(offset) + ops(shape) + ops(strides) + rest
    return f"ctorch._utils\n_rebuild_tensor{suffix}\n".encode() + b"(" + body + b"tR"


def mapping(**entries):
    return b"}(" + b"".join(ops(name) + body for name, body in entries.items()) + b"u"


def members(body, storages=None):
    storages = {"0": DATA} if storages is None else storages
    return {
        "a/data.pkl": b"\x80\2" + body + b".",
        "a/byteorder": b"little",
        **{f"a/data/{key}": value for key, value in storages.items()},
        "a/version": b"3\n",
    }


def build_zip(path, body, storages=None, **changes):
    with zipfile.ZipFile(path, "w", **changes) as archive:
        for name, data in members(body, storages).items():
            archive.writestr(name, data)
    return path


def build_legacy(path, body, storages=None, info=None):
    storages = {"0": DATA} if storages is None else storages
    info = {"little_endian": True} if info is None else info
    with path.open("wb") as file:
        file.write(MAGIC + pickle.dumps(1001, 2) + pickle.dumps(info, 2))
        file.write(b"\x80\2" + body + b"." + pickle.dumps(list(storages), 2))
        for data in storages.values():
            file.write(struct.pack("<q", len(data) // 4) + data)
    return path


def legacy(body):
    """Persistent ids had one more entry."""
    return body.replace(b"tQ", b"NtQ")


BUILD = {
    "zip": build_zip,
    "legacy": lambda path, body, *rest: build_legacy(path, legacy(body), *rest),
}
both = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)


def read_all(path):
    return {name: value.read() for name, value in open_tensors(path).items()}


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert str(path) in str(caught.value)


@both
def test_views_are_read_as_they_lie(tmp_path, build):
    whole = np.frombuffer(DATA, np.float32)
    cases = {
        "whole": (tensor(), whole.reshape(2, 3)),
        "tied": (tensor(), whole.reshape(2, 3)),
        "transposed": (tensor(shape=(3, 2), strides=(1, 3)), whole.reshape(2, 3).T),
        "row": (tensor(offset=3, shape=(3,), strides=(1,)), whole[3:]),
        "column": (tensor(offset=1, shape=(2,), strides=(3,)), whole[1::3]),
        "scalar": (tensor(offset=5, shape=(), strides=()), whole[5].reshape(())),
        "expanded": (tensor(offset=2, shape=(4, 2), strides=(0, 1)), np.tile(whole[2:4], (4, 1))),
        "overlapping": (tensor(shape=(5, 2), strides=(1, 1)), np.stack([whole[:-1], whole[1:]], 1)),
        "one": (tensor(offset=4, shape=(1, 1), strides=(1 << 62, 9)), whole[4:5].reshape(1, 1)),
        "empty": (tensor(offset=99, shape=(0, 7), strides=(7, 1)), np.zeros((0, 7), np.float32)),
        "first version": (tensor(rest=b"", version=1), whole.reshape(2, 3)),
        "size": (
            tensor().replace(ops((2, 3)), b"ctorch\nSize\n" + ops(((2, 3),)) + b"R"),
            whole.reshape(2, 3),
        ),
        "parameter": (
            b"ctorch._utils\n_rebuild_parameter\n(" + tensor() + b"\x88" + ORDERED + b"tR",
            whole.reshape(2, 3),
        ),
    }
    path = build(tmp_path / "a", mapping(**{name: body for name, (body, _) in cases.items()}))
    tensors = open_tensors(path)
    assert list(tensors) == list(cases)
    for name, (_, expected) in cases.items():
        array = tensors[name].read()
        assert array.flags.c_contiguous
        assert array.flags.writeable
        np.testing.assert_array_equal(array, expected, strict=True)


@pytest.mark.parametrize(
    "kind, dtype",
    [
        *[("Float", "f4"), ("Half", "f2"), ("Double", "f8"), ("BFloat16", ml_dtypes.bfloat16)],
        *[("Long", "i8"), ("Int", "i4"), ("Short", "i2"), ("Char", "i1"), ("Byte", "u1")],
        *[("ComplexFloat", "c8"), ("ComplexDouble", "c16")],
    ],
)
def test_dtypes_of_storages(tmp_path, kind, dtype):
    data = np.random.default_rng(0).integers(0, 255, 48, np.uint8).tobytes()
    expected = np.frombuffer(data, dtype)
    size = (len(expected),)
    for module in ("torch", "torch.cuda"):
        stored = storage("k", f"{module}\n{kind}Storage", *size)
        build_zip(tmp_path / "a", mapping(x=tensor(stored, 0, size, (1,))), {"k": data})
        read = open_tensors(tmp_path / "a")["x"]
        assert read.dtype == dtype
        assert read.read().tobytes() == data


def test_any_byte_but_zero_is_true(tmp_path):
    stored = storage("k", "torch\nBoolStorage", 3)
    build_zip(tmp_path / "a", mapping(x=tensor(stored, 0, (3,), (1,))), {"k": b"\0\1\7"})
    assert open_tensors(tmp_path / "a")["x"].read().tobytes() == b"\0\1\1"


@pytest.mark.parametrize("name", ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes_of_untyped_storages(tmp_path, name):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    data = np.arange(1, 25, dtype=np.uint8).tobytes()
    stored = storage("k", "torch.storage\nUntypedStorage", 24)
    rest = b"\x89" + ORDERED + f"ctorch\n{name}\n".encode()
    build_zip(tmp_path / "a", mapping(x=tensor(stored, 1, (2,), (1,), rest, 3)), {"k": data})
    read = open_tensors(tmp_path / "a")["x"]
    assert read.dtype == dtype
    assert read.read().tobytes() == data[dtype.itemsize : 3 * dtype.itemsize]


def test_storages_that_are_views_of_others(tmp_path):
    stored = storage("0", "torch\nFloatStorage", 6, ("view", 2, 3))
    path = build_legacy(tmp_path / "a", mapping(x=tensor(stored, 1, (2,), (1,))))
    assert open_tensors(path)["x"].read().tolist() == [3, 4]
    build_legacy(path, mapping(x=tensor(stored, 2, (2,), (1,))))
    refused(path, "beyond its storage")
    stored = storage("0", "torch\nFloatStorage", 6, ("view", 4, 3))
    build_legacy(path, mapping(x=tensor(stored, 0, (2,), (1,))))
    refused(path, "beyond its root")


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call

    def __call__(self):
        """So that it can be what another one calls."""


@both
def test_what_else_a_lightning_checkpoint_holds_stays_inert(tmp_path, build):
    marker = tmp_path / "marker"
    opens = pickle.dumps(Calls(np.memmap, (str(marker), "uint8", "w+", 0, (1,))), 2)
    pickle.loads(opens)
    assert marker.exists()
    marker.unlink()
    model_checkpoint = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    namespace = b"cargparse\nNamespace\n)\x81" + ops({"lr": 1e-4}) + b"b"
    body = mapping(
        epoch=ops(3),
        opens=opens[2:-1],
        best=ops(np.float64(0.5)),
        nothing=ops([None, True, 1.5, 1 << 70, b"raw", "text", ("a",), {"b": []}]),
        callbacks=b"}" + model_checkpoint + mapping(best=ops("a.ckpt")) + b"s",
        optimizer_states=b"](" + mapping(state=b"}" + ops(0) + mapping(m=tensor()) + b"s") + b"e",
        config=b"comegaconf.dictconfig\nDictConfig\n)\x81" + namespace + b"b",
        sets=b"c__builtin__\nset\n(](" + ops("a") + b"etR",
        deque=b"ccollections\ndeque\n)R(" + ops("a") + b"e",
        old=b"ccopy_reg\n_reconstructor\n(cmain\nLogger\nc__builtin__\nobject\nNtR",
        keys=b"}(" + ops((1, ((2,),))) + ops(1) + namespace + ops(2) + ops(3.5) + ops(4) + b"u",
        state_dict=ORDERED
        + mapping(a=tensor(), n=ops(1), deep=mapping(b=tensor()))[1:]
        + mapping(_metadata=ORDERED)
        + b"b",
    )
    path = build(tmp_path / "a", body)
    tensors = open_tensors(path)
    assert list(tensors) == ["a"]
    assert tensors["a"].read().tobytes() == DATA
    assert not marker.exists()


@both
def test_which_entry_is_the_state_dict(tmp_path, build):
    path = tmp_path / "a"
    state = mapping(a=tensor(), b=tensor())
    for body in (
        state,
        ORDERED + state[1:],
        mapping(state_dict=state, model=mapping(c=tensor())),
        mapping(model=state, epoch=ops(1)),
        mapping(params_ema=state, params=mapping(), iteration=tensor()),
        b"ccollections\nOrderedDict\n(]("  # as Python 2 wrote it
        + b"".join(b"](" + ops(name) + tensor() + b"e" for name in "ab")
        + b"etR",
    ):
        assert list(open_tensors(build(path, body))) == ["a", "b"]
    for body, message in (
        (mapping(params=state, params_ema=state), "several state dicts.*params, params_ema alone"),
        (mapping(epoch=ops(1), generator=state), "holds no state dict: it has epoch, generator"),
        (mapping(state_dict=mapping(epoch=ops(1))), "holds no state dict: it has epoch"),
        (b"](" + tensor() + b"e", "holds no state dict"),
        (tensor(), "holds no state dict"),
        (b"cldm.models.autoencoder\nVQModel\n)\x81" + state + b"b", "holds no state dict"),
    ):
        refused(build(path, body, {"0": DATA} if b"Storage" in body else {}), message)


def payloads(marker):
    """Pickles that make a file when Python loads them: (what is to be refused, opcodes)."""
    shell = f"touch {marker}"
    python = f"open({str(marker)!r}, 'w').close()"
    system = Calls(os.system, (shell,))
    imported = Calls(builtins.__import__, ("os",))
    for protocol in range(6):
        yield "posix.system", pickle.dumps(system, protocol)[:-1]
        for function in (eval, exec):
            yield (
                rf"\w+.{function.__name__}",
                pickle.dumps(Calls(function, (python,)), protocol)[:-1],
            )
    yield r"\w+.Popen", ops(Calls(subprocess.Popen, (["touch", str(marker)],)))
    yield r"\w+.getoutput", ops(Calls(subprocess.getoutput, (shell,)))
    yield "__builtin__.__import__", ops(imported) + b"0" + ops(system)
    yield "__builtin__.getattr", ops(Calls(Calls(getattr, (imported, "system")), (shell,)))
    yield "itertools.imap", ops(Calls(list, (Calls(map, (os.system, [shell])),)))
    # inside the arguments of what is allowed, as a key, as a state
    yield "posix.system", ops(Calls(functools.partial, (os.system, shell))) + b")R"
    yield "posix.system", ops(Calls(collections.OrderedDict, ([["a", system]],)))
    yield "posix.system", ops(Calls(collections.defaultdict, (list, {"a": system})))
    yield "posix.system", ops({"a": [({system: 1},)]})
    yield "posix.system", b"cargparse\nNamespace\n)R" + ops({"a": system}) + b"b"
    # an allowed class gets a dangerous __setstate__, which is then called with the command
    setstate = b"}" + ops("__setstate__") + b"cposix\nsystem\nsb"
    yield "posix.system", b"cargparse\nNamespace\n)R" + setstate + ops(shell) + b"b"
    # other opcodes
    yield "os.system", b"(S'" + shell.encode() + b"'\nios\nsystem\n"
    yield "os.system", b"(cos\nsystem\n" + ops(shell) + b"o"
    yield "os.system", ops("os") + ops("system") + b"\x93" + ops((shell,)) + b"R"
    # by way of packages that are harmless
    dotted = ops("numpy.f2py") + ops("os.system") + b"\x93" + ops((shell,)) + b"R"
    yield "numpy.f2py.os.system", b"\x80\4" + dotted
    run = b"cnumpy.testing._private.utils\nrunstring\n" + ops((python, {})) + b"R"
    yield "numpy.testing._private.utils.runstring", run


@pytest.mark.parametrize("number", range(len(list(payloads("")))))
def test_malicious_pickles_run_nothing_and_are_told_why(tmp_path, number):
    marker = tmp_path / "marker"
    asked, evil = list(payloads(marker))[number]
    result = pickle.loads((b"" if evil[:1] == b"\x80" else b"\x80\2") + evil + b".")
    if isinstance(result, subprocess.Popen):
        result.wait()
    assert marker.exists(), "the payload does not bite"
    marker.unlink()
    message = (
        f"a': refused: its pickle asks for ({asked}), which no checkpoint needs; nothing was run$"
    )
    for body in (mapping(state_dict=mapping(a=tensor()), evil=evil), evil, mapping(a=evil)):
        for build in BUILD.values():
            refused(build(tmp_path / "a", body), message)
    assert not marker.exists()


@both
@pytest.mark.parametrize(
    "body, message",
    [
        (tensor(storage(key="../../etc/passwd")), "storage of tensor 'x' has another size"),
        (tensor(storage(key=0)), "a storage without a key or a size"),
        (tensor(storage(numel=7)), "another size|ends early"),
        (tensor(storage(numel=-6)), "a storage without a key or a size"),
        (tensor(storage(numel=6.0)), "a storage without a key or a size"),
        (tensor(storage(numel=True)), "a storage without a key or a size"),
        (tensor(storage(numel=1 << 64)), "a storage without a key or a size"),
        (
            tensor(storage(kind="torch\nQInt8Storage")),
            "storage of type torch.QInt8Storage: none of",
        ),
        (tensor(storage(kind="torch\nDoubleStorage")), "another size|ends early"),
        (tensor(ops(("storage", "FloatStorage", "0", "cpu", 6, None)) + b"Q"), "no class"),
        (tensor(ops(("storage",)) + b"Q"), "damaged"),
        (tensor(ops("storage") + b"Q"), "a persistent id is no tuple"),
        (tensor(b"Pstorage\n"), "opcode PERSID, which torch does not write"),
        (tensor(ops(1)), "a tensor without a storage"),
        (tensor(offset=1), "reaches beyond its storage"),
        (tensor(offset=-1), "no proper shape, strides and offset"),
        (tensor(offset=1 << 80), "no proper shape, strides and offset"),
        (tensor(offset=None), "no proper shape, strides and offset"),
        (tensor(strides=(4, 1)), "reaches beyond its storage"),
        (tensor(strides=(-3, 1)), "no proper shape, strides and offset"),
        (tensor(strides=(3.0, 1)), "no proper shape, strides and offset"),
        (tensor(strides=(1 << 62, 1)), "reaches beyond its storage"),
        (tensor(strides=(1,)), "no proper shape, strides and offset"),
        (tensor(strides=None), "no proper shape, strides and offset"),
        (tensor(shape=(-2, 3)), "no proper shape, strides and offset"),
        (tensor(shape=("2", 3)), "no proper shape, strides and offset"),
        (tensor(shape=(True, 3)), "no proper shape, strides and offset"),
        (tensor(shape="ab"), "no proper shape, strides and offset"),
        (tensor(shape=(1,) * 65, strides=(1,) * 65), "no proper shape, strides and offset"),
        (tensor(shape=(1 << 21,), strides=(0,)), "far larger than its storage"),
        (tensor(shape=(1 << 62, 1 << 62), strides=(0, 0)), "far larger than its storage"),
        (tensor(shape=(1 << 62, 0, 1 << 62), strides=(0, 0, 0)), "the shape .* is absurd"),
        (tensor(rest=b"\x89" + ORDERED + ops({"conj": True})), "conjugate or negative view"),
        (tensor(rest=b"\x89" + ORDERED + ops("float32"), version=3), "a dtype that is none of"),
        (tensor() + b"0", "a key without a value"),
        (b"0" + tensor(), "a key without a value"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n" + ops(1) + b"R", "calls what is no function"),
        (ops(1) + b")R", "calls what is no function"),
        (b"ctorch._utils\n_rebuild_parameter\n)R", "damaged"),
        (b"ccollections\nOrderedDict\n" + ops(({"a": 1},)) + b"R", "is made of no list"),
        (b"ccollections\nOrderedDict\n" + ops(([1],)) + b"R", "damaged"),
        (b"ctorch._utils\n_rebuild_qtensor\n)R", "'x' is of a kind unknown here: torch._utils"),
        (b"\x82\1", "opcode EXT1"),
        (b"ctorch\n" + b"a" * 2000 + b"\n", "a name of absurd length"),
        (ops(1) + ops("a") + b"\x93", "a name that is no string"),
        (b"\xff", "damaged"),
        (b"h\7", "damaged"),
        (b"e", "damaged"),
        (b"V\\ud800\n)R", "no function"),
        (b"cos\x1b[31m\nsystem\n", "asks for os .31m.system"),
    ],
)
def test_faults_of_pickles(tmp_path, build, body, message):
    refused(build(tmp_path / "a", mapping(y=tensor(), x=body)), message)


def test_kinds_of_tensors_in_other_entries_do_not_matter(tmp_path):
    sparse = b"ctorch._utils\n_rebuild_sparse_tensor\n)R"
    path = build_zip(tmp_path / "a", mapping(state_dict=mapping(y=tensor()), x=sparse))
    assert list(open_tensors(path)) == ["y"]


BOMBS = {
    "hash of a deep tuple": b"})" + b"\x85" * 50_000 + b"Ns",  # Python's unpickler recurses
    "hash of a wide tuple": b"})" + b"2\x86" * 200 + b"Ns",
    "deep list": b"]" * 30_000 + b"a" * 29_999,
    "marks": b"(" * 30_000 + b"1" * 30_000 + b"}",
    "memo": b"}r\xff\xff\xff\xff",  # Python's unpickler asks for 64 GB
    "memo, in text": b"}p" + b"9" * 1000 + b"\n",
    "text": b"\x8d" + b"\xff" * 7 + b"\x7f" + b"a" * 99,
    "bytes": b"\x8e" + struct.pack("<Q", 1 << 40) + b"a" * 99,
    "bytearray": b"\x96" + struct.pack("<Q", 1 << 62) + b"a" * 99,
    "frame": b"\x95" + b"\xff" * 8 + b"}",
    "long": b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"a",
    "negative long": b"\x8b\xff\xff\xff\xff",
    "decimal": b"L" + b"9" * 1_000_000 + b"L\n",
    "operations": b"}" + b"N0" * 50_001,
    "pairs": b"]q\0(" + b"N)\x86" * 1000 + b"e" + b"ccollections\nOrderedDict\nh\0\x85R0" * 101,
    "long names": (
        b"X" + struct.pack("<i", 1 << 20) + b"a" * (1 << 20) + b"q\0" + b"h\0h\0\x930" * 5_000
    ),
    "long keys": b"X"
    + struct.pack("<i", 1 << 20)
    + b"a" * (1 << 20)
    + b"q\0"
    + (b"(" + ops("storage") + b"ctorch\nFloatStorage\nh\0" + ops("cpu") + ops(6) + b"tQ0") * 5_000,
}


@both
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_fizzle(tmp_path, monkeypatch, build, name):
    monkeypatch.setattr(torch_pickle, "WORK_LIMIT", 100_000)
    path = build(tmp_path / "a", BOMBS[name])
    tracemalloc.start()
    try:
        open_tensors(path)
    except UserError as error:
        fault = str(error)
    else:
        fault = "none"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in fault
    assert peak < 100 << 20


def patch(path, name, **fields):
    """Changes the record of a member in a zip's list."""
    places = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I"), "offset": (42, "<I")}
    places |= {"compressed": (20, "<I"), "size": (24, "<I")}
    content = bytearray(path.read_bytes())
    record = content.rindex(name.encode()) - 46
    assert content[record : record + 4] == b"PK\1\2"
    for field, value in fields.items():
        place, form = places[field]
        struct.pack_into(form, content, record + place, value)
    path.write_bytes(content)
    return path


STATE = mapping(x=tensor(), y=tensor(storage("1"), 1, (2,), (1,)))
STORAGES = {"0": DATA, "1": DATA[::-1]}


@pytest.fixture
def plain(tmp_path):
    return build_zip(tmp_path / "a.ckpt", STATE, STORAGES)


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("data/0", {"method": zipfile.ZIP_DEFLATED}, "'a/data/0' in it is compressed or encrypted"),
        ("data/0", {"flags": 1}, "'a/data/0' in it is compressed or encrypted"),
        ("data.pkl", {"flags": 1}, "'a/data.pkl' in it is compressed or encrypted"),
        ("data/0", {"size": 25}, "compressed or encrypted"),
        ("data/0", {"size": 25, "compressed": 25}, "'a/data/0' in it overlaps"),
        ("data/0", {"size": 23, "compressed": 23}, "storage of tensor 'x' has another size"),
        ("data/0", {"size": 0, "compressed": 0}, "storage of tensor 'x' has another size"),
        ("data/0", {"size": (1 << 32) - 2, "compressed": (1 << 32) - 2}, "overlaps"),
        ("data/1", {"offset": 0}, "overlaps|not where"),
        ("data/1", {"offset": 5}, "overlaps|not where"),
        ("data/1", {"offset": 1 << 31}, "damaged"),
        ("version", {"size": 5000, "compressed": 5000}, "overlaps"),
        ("data/0", {"crc": 1}, "checksum of tensor 'x' differs"),
        ("data.pkl", {"crc": 1}, "checksum of its pickle differs"),
    ],
)
def test_faults_of_zips(plain, name, fields, message):
    refused(patch(plain, f"a/{name}", **fields), message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"a/data.pkl": None}, "a zip with 0 members '\\*/data.pkl'"),
        ({"b/data.pkl": b"N."}, "a zip with 2 members '\\*/data.pkl'"),
        ({"a/constants.pkl": b"N."}, "is a TorchScript archive"),
        ({"a/code/__torch__.py": b"pass"}, "is a TorchScript archive"),
        ({"a/byteorder": b"big"}, "not written on a little-endian machine"),
        ({"a/data/0": None}, "storage of tensor 'x' has another size"),
        ({"a/data.pkl": b""}, "its pickle is damaged"),
        ({"a/data.pkl": b"\x80\2}"}, "its pickle is damaged"),
    ],
)
def test_faults_of_members(tmp_path, changes, message):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (members(STATE, STORAGES) | changes).items():
            if data is not None:
                archive.writestr(name, data)
    refused(path, message)


def test_members_of_one_name_are_refused(plain):
    with zipfile.ZipFile(plain, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's: duplicate name
        archive.writestr("a/data/0", DATA)
    refused(plain, "'a/data/0' is in it twice")


def test_compressed_files_are_refused_unread(tmp_path):
    path = build_zip(tmp_path / "a.ckpt", STATE, STORAGES, compression=zipfile.ZIP_DEFLATED)
    refused(path, "compressed or encrypted; torch does neither")
    bomb = b"}" + bytes(32 << 20)
    path = build_zip(tmp_path / "a.ckpt", bomb, compression=zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    refused(path, "compressed or encrypted; torch does neither")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_what_is_not_data_is_bounded(plain, monkeypatch):
    monkeypatch.setattr(torch_file, "PICKLE_LIMIT", 100)
    refused(plain, "its pickle has .* bytes, more than 100")
    monkeypatch.setattr(torch_file, "DIRECTORY_LIMIT", 100)
    refused(plain, "damaged|far too long")
    refused(build_legacy(plain, legacy(STATE), STORAGES), "damaged|far too long")


def test_zips_as_others_write_them(tmp_path):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"a comment"
        for name, data in members(STATE, STORAGES).items():
            name = f"modèle{name[1:]}"
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    assert open_tensors(path)["x"].read().tobytes() == DATA


def test_checksums(plain):
    content = plain.read_bytes()
    plain.write_bytes(content.replace(DATA, b"\1" + DATA[1:]))
    tensors = open_tensors(plain)
    with pytest.raises(UserError, match="a.ckpt': is damaged: the checksum of tensor 'x' differs"):
        tensors["x"].read()
    assert tensors["y"].read().shape == (2,)
    patch(plain, "a/data/0", crc=0)  # as torch writes when it computes none
    assert open_tensors(plain)["x"].read().tobytes() == b"\1" + DATA[1:]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.replace(pickle.dumps(1001, 2), pickle.dumps(1002, 2)), "unknown version"),
        (lambda c: c.replace(b"\x88s.", b"\x89s."), "not written on a little-endian machine"),
        (lambda c: c.replace(b"little_endian", b"little-endian"), "not written on a little-endian"),
        (lambda c: c[:-1], "the file ends early"),
        (lambda c: c[: -len(DATA) - 4], "the file ends early"),
        (lambda c: c.replace(struct.pack("<q", 6), struct.pack("<q", 7)), "has another size"),
        (lambda c: c.replace(struct.pack("<q", 6), struct.pack("<q", -6)), "has another size"),
        (lambda c: c.replace(pickle.dumps(["0", "1"], 2), b"N."), "storage of tensor 'x' has an"),
        (lambda c: c.replace(pickle.dumps(["0", "1"], 2), b"](K\1e."), "storage of no tensor"),
        (
            lambda c: c.replace(pickle.dumps(["0", "1"], 2), b"])" + b"\x85" * 50_000 + b"a."),
            "storage of no tensor",
        ),
        (lambda c: c.replace(pickle.dumps(["0", "1"], 2), pickle.dumps(["0"], 2)), "another size"),
        (lambda c: c[: len(MAGIC)], "its pickle is damaged"),
    ],
)
def test_faults_of_legacy_files(tmp_path, change, message):
    path = build_legacy(tmp_path / "a.ckpt", legacy(STATE), STORAGES)
    assert list(open_tensors(path)) == ["x", "y"]
    path.write_bytes(change(path.read_bytes()))
    refused(path, message)


@both
def test_only_what_is_asked_for_is_read(tmp_path, build):
    path = tmp_path / "a.ckpt"
    big = tensor(storage("1", "torch\nFloatStorage", 1 << 24), 0, (1 << 24,), (1,))
    small = tensor(storage("0", "torch\nFloatStorage", 256), 0, (256,), (1,))
    part = tensor(storage("1", "torch\nFloatStorage", 1 << 24), 1 << 20, (256,), (1,))
    body = mapping(big=big, small=small, part=part, rest=ops(1))
    build(path, body, {"0": bytes(1024), "1": bytes(1 << 26)})
    tracemalloc.start()
    tensors = open_tensors(path)
    assert tensors["small"].read().shape == tensors["part"].read().shape == (256,)
    assert tensors["big"].shape == (1 << 24,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


ARMED: list[str] = []  # not empty while a file is read: what Python must not do then
DONE: list[str] = []


def audit(event, details):
    if ARMED:
        writes = event == "open" and set(str(details[1])) & set("wax+")
        if writes or event.partition(".")[0] in ARMED or event in ARMED:
            DONE.append(f"{event} {details}")


sys.addaudithook(audit)


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory):
    """What reading imports is imported before the audit."""
    for codec in ("ascii", "cp437", "latin-1", "raw-unicode-escape"):
        "".encode(codec)
    open_tensors(build_zip(tmp_path_factory.getbasetemp() / "first.ckpt", mapping()))


def fault_of(path):
    """Reads everything: arrays are as declared, or there is a UserError, which is returned."""
    ARMED[:] = ["os", "exec", "compile", "import", "pickle", "subprocess", "socket", "shutil"]
    try:
        for value in open_tensors(path).values():
            array = value.read()
            assert (array.shape, array.dtype) == (value.shape, value.dtype)
    except UserError as error:
        return str(error)
    finally:
        ARMED.clear()
    return f"{path}"


def test_the_audit_sees_what_python_does():
    ARMED.append("pickle")
    pickle.loads(pickle.dumps(collections.OrderedDict()))
    ARMED.clear()
    assert "pickle.find_class" in DONE.pop()


def check_fault(path):
    fault = fault_of(path)
    assert "\n" not in fault
    assert str(path) in fault
    assert not DONE


def damage(data, content, most=4):
    """Content with some bytes changed, and maybe cut off."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, most))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(
            st.integers(0, 255) | st.sampled_from(b"\0\1\x7f\x80\xff().}RQbsute")
        )
    if data.draw(st.integers(0, 3)) == 0:
        del content[data.draw(st.integers(0, len(content))) :]
    return bytes(content)


LIGHTNING = mapping(
    epoch=ops(3),
    config=b"comegaconf.dictconfig\nDictConfig\n)\x81" + ops({"lr": 1e-4}) + b"b",
    state_dict=STATE,
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_damaged_files(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.ckpt"
    kind = data.draw(st.sampled_from(["zip", "zip without checksums", "legacy"]))
    if kind == "legacy":
        build_legacy(path, legacy(LIGHTNING), STORAGES)
    else:
        build_zip(path, LIGHTNING, STORAGES)
    if kind == "zip without checksums":
        for name in members(LIGHTNING, STORAGES):
            patch(path, name, crc=0)
    path.write_bytes(damage(data, path.read_bytes()))
    check_fault(path)


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_damaged_pickles(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "pickle.ckpt"
    build_zip(path, damage(data, LIGHTNING), STORAGES)
    check_fault(path)


NAMES = [
    *[("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")],
    *[("torch._utils", "_rebuild_parameter"), ("torch", "Size"), ("torch", "FloatStorage")],
    *[("collections", "OrderedDict"), ("argparse", "Namespace"), ("torch", "uint16")],
    *[("os", "system"), ("builtins", "eval"), ("torch.storage", "UntypedStorage")],
]
FRAGMENTS = [
    *[STATE, LIGHTNING, tensor(), storage(), storage("1"), ORDERED, ops("state_dict"), ops("a")],
    *[f"c{module}\n{name}\n".encode() for module, name in NAMES],
    *[ops(module) + ops(name) + b"\x93" for module, name in NAMES],
    *[f"(i{module}\n{name}\n".encode() for module, name in NAMES],
    *[ops((0, (2, 3), (3, 1))), ops(()), ops((2, 3)), ops([]), ops({}), ops(-1), ops(1 << 70)],
    *[
        bytes([code])
        for code in b"(.012})]lNQRabdeostu\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x94"
    ],
    *[b"q\0", b"h\0", b"q\1", b"h\1", b"r\0\0\1\0", b"p7\n", b"g7\n", b"I01\n", b"F1e9\n"],
]


@settings(max_examples=EXAMPLES, deadline=None)
@given(parts=st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=3), max_size=30))
def test_random_opcodes(tmp_path_factory, parts):
    path = tmp_path_factory.getbasetemp() / "random.ckpt"
    build_zip(path, b"".join(parts), STORAGES)
    check_fault(path)
    build_zip(path, mapping(state_dict=STATE) + b"".join(parts), STORAGES)
    check_fault(path)


def state_of_torch(torch):
    """One tensor of every kind."""
    base = torch.arange(24.0).reshape(4, 6)
    state = collections.OrderedDict(
        base=base,
        tied=base,
        transposed=base.t(),
        sliced=base[1:3, 2:5:2],
        expanded=torch.ones(1).expand(3, 4),
        permuted=torch.arange(120).reshape(2, 3, 4, 5).permute(3, 1, 0, 2),
        parameter=torch.nn.Parameter(torch.ones(2)),
        scalar=torch.tensor(3),
        empty=torch.zeros(0, 3),
    )
    generator = torch.Generator().manual_seed(0)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
        *("bool", "complex64", "complex128"),
    ):
        values = torch.randint(0, 2, (3, 5), generator=generator)
        state[name] = values.to(getattr(torch, name))
    return state


def check_torch(torch, tensors, state):
    assert list(tensors) == list(state)
    for name, value in state.items():
        array = tensors[name].read()
        assert array.shape == tensors[name].shape == tuple(value.shape)
        assert f"torch.{array.dtype.name}" == str(value.dtype)
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8) if value.numel() else None
        assert array.tobytes() == (b"" if raw is None else raw.numpy().tobytes())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_of_torch_itself(tmp_path, zipped, protocol):
    torch = pytest.importorskip("torch", reason="compares with torch, where it is installed")
    state = state_of_torch(torch)
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"):
        state[name] = torch.arange(1, 9).to(getattr(torch, name))
    path = tmp_path / "a.ckpt"
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save(state, path, **options)
    check_torch(torch, open_tensors(path), state)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    lightning = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {torch.nn.Module: {"best": torch.tensor(1.0)}},
    }
    torch.save(lightning, path, **options)
    check_torch(torch, open_tensors(path), model.state_dict())
    torch.save(model, path, **options)
    refused(path, "holds no state dict")


def test_torch_loads_what_is_written_here(tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch, where it is installed")
    state = state_of_torch(torch)
    torch.save(state, tmp_path / "a.ckpt")
    tensors = open_tensors(tmp_path / "a.ckpt")
    write_tensors(
        tmp_path / "b.ckpt", {name: value.read for name, value in tensors.items()}, {"a": "b"}
    )
    for options in ({}, {"mmap": True}):
        read = torch.load(tmp_path / "b.ckpt", weights_only=True, **options)
        assert read["metadata"] == {"a": "b"}
        assert list(read["state_dict"]) == list(state)
        for name, value in state.items():
            assert read["state_dict"][name].dtype == value.dtype
            assert torch.equal(read["state_dict"][name], value)
