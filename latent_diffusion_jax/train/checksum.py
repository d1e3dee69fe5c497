"""Checksums of arrays where they lie, the same on every mesh.

The checksum of an array is the sum, mod 2^32, of mix(bits + position) over its 32-bit words. mix
(the finaliser of Appleby's MurmurHash3) is one to one, so that a change inside one word, a single
flipped bit above all, changes the sum for certain; several changes cancel with probability 2^-32.
Sums of integers do not depend on their order, hence neither on sharding nor on topology.
"""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SPREAD = np.uint32(0x9E3779B9)
BLOCK = 2**16  # words that numpy takes at once: they stay in the cache


def _mix(h: Any) -> Any:
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _word(dtype: np.dtype) -> np.dtype:
    """What an array is read as: 64-bit types become pairs of words in a new last axis."""
    return np.dtype(f"uint{8 * min(dtype.itemsize, 4)}")


@jax.jit
def _where_it_lies(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _word(x.dtype)).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):  # flattening would gather a sharded array
        position = position * np.uint32(size % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(_mix(bits + position * SPREAD), dtype=jnp.uint32)


def _in_memory(x: np.ndarray) -> int:
    """The same by numpy: to compile a program for each shape takes seconds at every start."""
    bits = np.ascontiguousarray(x).reshape(-1).view(_word(x.dtype))
    places = np.arange(BLOCK, dtype=np.uint32) * SPREAD
    total = 0
    for start in range(0, len(bits), BLOCK):
        block = bits[start : start + BLOCK].astype(np.uint32)
        first = np.uint32(start * int(SPREAD) % 2**32)
        total += int(_mix(block + (places[: len(block)] + first)).sum(dtype=np.uint64))
    return total % 2**32


def _is_in_memory(x: Any) -> bool:
    if not isinstance(x, jax.Array):
        return True
    on_cpu = {device.platform for device in x.devices()} == {"cpu"}
    return on_cpu and x.is_fully_addressable and x.is_fully_replicated


def checksums(tree: Any) -> dict[str, int]:
    """Path of each leaf -> its checksum."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums: dict[str, Any] = {}
    for path, x in leaves:
        name = jax.tree_util.keystr(path)
        if _is_in_memory(x):
            sums[name] = _in_memory(np.asarray(x))
            continue
        sums[name] = value = _where_it_lies(x)
        if jax.process_count() > 1:  # several programs at once can wait for each other for ever
            value.block_until_ready()
    return {path: int(value) for path, value in jax.device_get(sums).items()}


def digest(tree: Any) -> str:
    """Eight hexadecimal digits that tell weights from others, wherever they lie."""
    return f"{zlib.crc32(json.dumps(checksums(tree)).encode()):08x}"
