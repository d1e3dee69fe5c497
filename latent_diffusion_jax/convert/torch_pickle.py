"""A pickle of torch's, read by a machine that builds tensors and nothing else.

Python's own unpickler is not used, as limiting `find_class` does not make it safe: the hash of a
deeply nested tuple ends the process, a far memo slot takes all memory, and BUILD changes the very
functions that are allowed. `Pickle` below takes opcodes from `pickletools`, calls nothing that a
file names, and keeps of everything but tensors, lists, tuples and dicts an inert name.
"""

import pickletools
import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from latent_diffusion_jax.convert.files import Broken, printable

WORK_LIMIT = 1_000_000  # opcodes; torch writes 31 per tensor
NAME_LIMIT = 1000  # characters of a name of a class or a storage

STORAGES = {
    f"{module}.{name}Storage": np.dtype(dtype)
    for module in ("torch", "torch.cuda")
    for name, dtype in {
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Double": np.float64,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
        "ComplexFloat": np.complex64,
        "ComplexDouble": np.complex128,
    }.items()
}
WRITTEN = {dtype: name for name, dtype in STORAGES.items() if ".cuda" not in name}
STORAGES["torch.storage.UntypedStorage"] = np.dtype(np.uint8)
DTYPES = {  # of tensors in untyped storages
    f"torch.{name}": np.dtype(getattr(ml_dtypes, name, name))
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
}

_LITERALS = """NONE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"""
_PACKAGES = """__main__ argparse collections datetime decimal diffusers einops enum fractions kornia
    ldm lightning lightning_fabric lightning_utilities lpips main ml_collections numpy omegaconf
    open_clip pathlib pytorch_lightning safetensors taming timm torch torchmetrics torchvision
    transformers typing uuid"""
_NAMES = """_codecs.encode copy_reg._reconstructor copyreg.__newobj__ copyreg.__newobj_ex__
    copyreg._reconstructor functools.partial"""
_BUILTINS = """bool bytearray bytes complex dict float frozenset int list long object range set
    slice str tuple unicode xrange"""
_HARMFUL = """__builtin__ __builtins__ __import__ builtins compile eval exec execfile getattr
    importlib nt os popen posix runstring setattr subprocess sys system"""
LITERALS = frozenset(_LITERALS.split())  # opcodes that push what they hold
PACKAGES = frozenset(_PACKAGES.split())  # what they hold may be named in a checkpoint; none is made
HARMFUL = frozenset(_HARMFUL.split())  # not even as part of a name in those: numpy.os.system
HARMLESS = frozenset(_NAMES.split()).union(
    *({f"builtins.{name}", f"__builtin__.{name}"} for name in _BUILTINS.split())
)


class Inert(NamedTuple):
    """A class or a function that a pickle names, or what calling it would have given."""

    name: str
    called: bool = False


class Storage(NamedTuple):
    """Consecutive elements in a file; `numel` from `offset` where it is a view of another."""

    dtype: np.dtype
    key: str
    numel: int
    offset: int = 0
    view: int | None = None


class View(NamedTuple):
    """A tensor, before anything in it has been checked."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Any = None


def rebuild(storage, offset, shape, strides, _grad=False, _hooks=None, metadata=None) -> View:
    """`torch._utils._rebuild_tensor_v2`."""
    if type(storage) is not Storage:
        raise Broken("its pickle is damaged: a tensor without a storage")
    if metadata:
        raise Broken("a tensor is a conjugate or negative view: call .clone() and save it again")
    return View(storage, offset, shape, strides)


def rebuild_v3(storage, offset, shape, strides, grad, hooks, dtype, metadata=None) -> View:
    """`torch._utils._rebuild_tensor_v3`."""
    return rebuild(storage, offset, shape, strides, grad, hooks, metadata)._replace(dtype=dtype)


class Pickle:
    """A machine of pickle opcodes that makes tensors, lists, tuples and dicts with string keys.

    Everything else in a file becomes `Inert` (or is dropped: sets, other keys, attributes). Work is
    bounded by the number of opcodes, memory by that and by the bytes of the pickle.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.work = 0

    def load(self, file: Any) -> Any:
        """Reads one pickle and leaves the file behind it.

        Raises:
          Broken: damaged, too large, or it names what no checkpoint needs.
        """
        self.stack, self.marks, self.memo = [], [], {}
        try:
            for opcode, argument, _ in pickletools.genops(file):
                self.count(1)
                if opcode.name in LITERALS:
                    self.stack.append(argument)
                else:
                    self.step(opcode.name, argument)
            return self.stack.pop()
        except Broken:
            raise
        except Exception as error:  # of an empty stack, of a wrong number of arguments, ...
            what = f"{type(error).__name__}: {printable(error)}"
            raise Broken(f"its pickle is damaged ({what})") from error

    def count(self, steps: int) -> None:
        """Adds to the work that one file may cost."""
        self.work += steps
        if self.work > WORK_LIMIT:
            raise Broken(f"refused: its pickle has more than {WORK_LIMIT} operations")

    def step(self, name: str, argument: Any) -> None:
        """Executes an opcode that is not a literal."""
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.marks.append(self.stack)
                self.stack = []
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                slot = len(self.memo) if name == "MEMOIZE" else argument
                if slot > WORK_LIMIT:  # far slots can be chosen such that their hashes collide
                    raise Broken("refused: its pickle has a memo of absurd size")
                self.memo[slot] = self.stack[-1]
            case "POP" if self.stack:
                self.stack.pop()
            case "POP" | "POP_MARK":
                self.unmark()
            case "BUILD":  # nothing is given a state
                self.pop(1)
            case "APPEND":
                self.extend(self.pop(1))
            case "APPENDS" | "ADDITEMS":
                self.extend(self.unmark())
            case "SETITEM":
                fill(self.pop(2), into=self.stack[-1])
            case "SETITEMS":
                fill(self.unmark(), into=self.stack[-1])
            case _:
                value = self.made(name, argument)  # first: it may put another stack in place
                self.stack.append(value)

    def made(self, name: str, argument: Any) -> Any:
        """What an opcode puts on the stack."""
        match name:
            case "NEWTRUE" | "NEWFALSE":
                return name == "NEWTRUE"
            case "EMPTY_TUPLE":
                return ()
            case "EMPTY_LIST":
                return []
            case "EMPTY_DICT":
                return {}
            case "EMPTY_SET":
                return Inert("set")
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(self.pop(int(name[-1])))
            case "TUPLE":
                return tuple(self.unmark())
            case "LIST":
                return self.unmark()
            case "DICT":
                return fill(self.unmark(), into={})
            case "FROZENSET":
                self.unmark()
                return Inert("frozenset")
            case "DUP":
                return self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                return self.memo[argument]
            case "GLOBAL":
                return named(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                return named(*self.pop(2))
            case "REDUCE" | "NEWOBJ":
                return self.call(*self.pop(2))
            case "NEWOBJ_EX":
                return self.call(*self.pop(3)[:2])
            case "INST":
                return self.call(named(*argument.split(" ", 1)), tuple(self.unmark()))
            case "OBJ":
                function, *arguments = self.unmark()
                return self.call(function, tuple(arguments))
            case "BINPERSID":
                return self.stored(*self.pop(1))
        raise Broken(f"refused: its pickle has opcode {name}, which torch does not write")

    def pop(self, number: int) -> list[Any]:
        """Takes the last values off the stack."""
        if number > len(self.stack):
            raise IndexError("pop from an empty stack")
        values = self.stack[-number:]
        del self.stack[-number:]
        return values

    def unmark(self) -> list[Any]:
        """Takes the values since the last mark off the stack."""
        values, self.stack = self.stack, self.marks.pop()
        return values

    def extend(self, values: list[Any]) -> None:
        """Appends to a list; what is added to anything else is dropped."""
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(values)

    def call(self, function: Any, arguments: Any) -> Any:
        """What a function of torch would have made of its arguments, for the few that are known."""
        if type(function) is not Inert or type(arguments) is not tuple:
            raise Broken("its pickle is damaged: it calls what is no function")
        match function.name:
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
                return rebuild(*arguments)
            case "torch._utils._rebuild_tensor_v3":
                return rebuild_v3(*arguments)
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
                return arguments[0]
            case "torch.Size":
                return arguments[0] if arguments else ()
            case "collections.OrderedDict":
                return self.ordered(*arguments)
        return function._replace(called=True)

    def ordered(self, pairs: Any = ()) -> dict[str, Any]:
        """`collections.OrderedDict(pairs)`, as Python 2 pickled it."""
        if type(pairs) not in (list, tuple):
            raise Broken("its pickle is damaged: an OrderedDict is made of no list")
        self.count(len(pairs))  # the same list can be named again and again
        return fill([value for key, value in pairs for value in (key, value)], into={})

    def stored(self, identity: Any) -> Storage | Inert:
        """The storage of a persistent id: ("storage", type, key, device, numel[, view])."""
        if type(identity) is not tuple or not identity:
            raise Broken("its pickle is damaged: a persistent id is no tuple")
        if identity[0] == "module":  # a class and its source, before torch 1.6
            return Inert("module", called=True)
        tag, kind, key, _, numel, *view = identity
        if type(kind) is not Inert or kind.name not in STORAGES:
            name = printable(kind.name) if type(kind) is Inert else "no class"
            raise Broken(f"it has a storage of type {name}: none of {', '.join(WRITTEN.values())}")
        if tag != "storage" or type(key) is not str or len(key) > NAME_LIMIT or not is_size(numel):
            raise Broken("its pickle is damaged: a storage without a key or a size")
        storage = Storage(STORAGES[kind.name], key, numel)
        self.storages.setdefault(key, storage)
        if not view or view[0] is None:
            return storage
        _, offset, length = view[0]
        if not is_size(offset) or not is_size(length) or offset + length > numel:
            raise Broken("its pickle is damaged: a storage reaches beyond its root")
        return storage._replace(offset=offset, view=length)


def named(module: Any, name: Any) -> Inert:
    """Stands for what a pickle names.

    Raises:
      Broken: it is not of those that a checkpoint may name.
    """
    if type(module) is not str or type(name) is not str:
        raise Broken("its pickle is damaged: a name that is no string")
    if len(module) + len(name) > NAME_LIMIT:
        raise Broken("refused: its pickle has a name of absurd length")
    full = f"{module}.{name}"
    parts = full.split(".")
    if full in HARMLESS or (parts[0] in PACKAGES and not HARMFUL.intersection(parts)):
        return Inert(full)
    why = "which no checkpoint needs; nothing was run"
    raise Broken(f"refused: its pickle asks for {printable(full)}, {why}")


def fill(items: list[Any], into: Any) -> Any:
    """Adds [key, value, ...] to a dict; only keys that are strings: others can be slow to hash."""
    if len(items) % 2:
        raise Broken("its pickle is damaged: a key without a value")
    if type(into) is dict:
        for key, value in zip(items[::2], items[1::2]):
            if type(key) is str:
                into[key] = value
    return into


def is_size(value: Any) -> bool:
    """Whether it can be a number of elements."""
    return type(value) is int and 0 <= value <= sys.maxsize
