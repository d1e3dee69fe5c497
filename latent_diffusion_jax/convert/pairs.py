"""Which tensors of another layout hold the numbers of which tensor of a CompVis checkpoint.

A network is a sequence of `Pair`s, made by the functions that walk its blocks; the same sequence
serves both directions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

import numpy as np

from latent_diffusion_jax.convert.files import Tensor
from latent_diffusion_jax.errors import UserError

# what the keys of a CompVis checkpoint begin with, by network
UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
CONDITIONING = "cond_stage_model."
Make = Callable[[], np.ndarray]
Tensors = Mapping[str, np.ndarray | Make]


class Pair(NamedTuple):
    """A tensor of a CompVis checkpoint and the one, or three, that hold the same numbers elsewhere.

    ours, theirs: keys.
    ones: how many axes of size 1 our matrix ends in, where theirs has none; None: shapes agree.
    heads: of a fused projection, whose rows are [head][q, k, v][width] here and three tensors
      there; 0 for any other tensor.
    """

    ours: str
    theirs: tuple[str, ...]
    ones: int | None = None
    heads: int = 0


def layer(ours: str, theirs: str, bias: bool = True) -> Iterator[Pair]:
    """A layer with the same weight, and bias, in both."""
    yield Pair(f"{ours}.weight", (f"{theirs}.weight",))
    if bias:
        yield Pair(f"{ours}.bias", (f"{theirs}.bias",))


def matrix(ours: str, theirs: str, ones: int) -> Iterator[Pair]:
    """A convolution of width 1 here, with `ones` axes after the first two; a linear layer there."""
    yield Pair(f"{ours}.weight", (f"{theirs}.weight",), ones)
    yield Pair(f"{ours}.bias", (f"{theirs}.bias",))


def fused(
    ours: tuple[str, str], theirs: Iterable[str], heads: int, ones: int | None = None
) -> Iterator[Pair]:
    """q, k and v in one tensor here: `ours` are the keys of weight and bias; three layers there."""
    names = tuple(theirs)
    yield Pair(ours[0], tuple(f"{name}.weight" for name in names), ones, heads)
    yield Pair(ours[1], tuple(f"{name}.bias" for name in names), None, heads)


def split(pair: Pair, array: np.ndarray) -> tuple[np.ndarray, ...]:
    """Our tensor as theirs.

    Raises:
      UserError: a shape that cannot be.
    """
    shapes = their_shapes(pair, array.shape)
    if not pair.heads:
        return (array.reshape(shapes[0]),)
    parts = array.reshape(pair.heads, 3, -1, *shapes[0][1:])
    return tuple(part.reshape(shapes[0]) for part in np.moveaxis(parts, 1, 0))


def join(pair: Pair, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    """Their tensors as ours; the inverse of `split`.

    Raises:
      UserError: a shape that cannot be.
    """
    shape = our_shape(pair, [array.shape for array in arrays])
    if not pair.heads:
        return arrays[0].reshape(shape)
    parts = [array.reshape(pair.heads, -1, *array.shape[1:2]) for array in arrays]
    return np.stack(parts, axis=1).reshape(shape)


def their_shapes(pair: Pair, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of what `split` gives."""
    kept = shape if pair.ones is None else shape[:2]
    if pair.ones is not None and (len(shape) < 2 or prod(shape[2:]) != 1):
        raise UserError(f"{pair.ours!r} is {list(shape)}, not a convolution of width 1")
    if not pair.heads:
        return [kept]
    if not kept or kept[0] % (3 * pair.heads):
        raise UserError(f"{pair.ours!r} is {list(shape)}: no q, k and v of {pair.heads} heads")
    return [(kept[0] // 3, *kept[1:])] * 3


def our_shape(pair: Pair, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what `join` gives."""
    shape, name = shapes[0], pair.theirs[0]
    if len(set(shapes)) > 1:
        raise UserError(f"{', '.join(map(repr, pair.theirs))} differ in shape: {shapes}")
    if pair.ones is not None:
        if len(shape) < 2 or prod(shape[2:]) != 1:
            raise UserError(f"{name!r} is {list(shape)}, not a matrix")
        shape = (*shape[:2], *[1] * pair.ones)
    if not pair.heads:
        return shape
    if not shape or shape[0] % pair.heads:
        raise UserError(f"{name!r} is {list(shape)}, which {pair.heads} heads do not divide")
    return (3 * shape[0], *shape[1:])


def outgoing(pairs: Iterable[Pair], tensors: Tensors, prefix: str) -> dict[str, Make]:
    """Their key -> function that makes the tensor, from ours under a prefix.

    Raises:
      UserError: a tensor of ours that is missing, or one that has no place there.
    """
    made: dict[str, Make] = {}
    used = set()
    for pair in pairs:
        key = prefix + pair.ours
        if key not in tensors:
            raise UserError(f"cannot export to diffusers: there is no tensor {key!r}")
        used.add(key)
        for part, name in enumerate(pair.theirs):
            made[name] = _part(pair._replace(ours=key), tensors[key], part)
    ignored = (f"{prefix}loss.",)
    for key in tensors:
        if key.startswith(prefix) and key not in used and not key.startswith(ignored):
            raise UserError(f"cannot export to diffusers: {key!r} has no place in its network")
    return made


def _part(pair: Pair, value: np.ndarray | Make, part: int) -> Make:
    return lambda: split(pair, array_of(value))[part]


def array_of(value: np.ndarray | Make) -> np.ndarray:
    """A tensor that may have to be made first."""
    return np.asarray(value() if callable(value) else value)


def incoming(
    pairs: Iterable[Pair], tensors: Mapping[str, Tensor], prefix: str, place: str
) -> dict[str, Tensor]:
    """Our key under a prefix -> tensor, read when asked for, from theirs in a place.

    Raises:
      UserError: a tensor of theirs that is missing, has an impossible shape, or that no pair names.
    """
    ours: dict[str, Tensor] = {}
    used: set[str] = set()
    for pair in pairs:
        for name in pair.theirs:
            if name not in tensors:
                raise UserError(f"{place!r} has no tensor {name!r}")
        used.update(pair.theirs)
        try:
            ours[prefix + pair.ours] = _joined(pair, [tensors[name] for name in pair.theirs])
        except UserError as error:
            raise UserError(f"{place!r}: {error}") from error
    for name, tensor in tensors.items():
        if name not in used:
            shape = list(tensor.shape)
            raise UserError(f"{place!r}: {name!r} {shape} has no place in a latent diffusion model")
    return ours


def _joined(pair: Pair, parts: list[Tensor]) -> Tensor:
    shape = our_shape(pair, [part.shape for part in parts])

    def read() -> np.ndarray:
        return join(pair, tuple(part.read() for part in parts))

    return Tensor(shape, parts[0].dtype, read)
