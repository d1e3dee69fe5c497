"""Checksums of arrays where they lie, the same on every mesh.

The checksum of an array is the sum, mod 2^32, of mix(bits + position) over its 32-bit words. mix
(the finaliser of Appleby's MurmurHash3) is one to one, so that a change inside one word, a single
flipped bit above all, changes the sum for certain; several changes cancel with probability 2^-32.
Sums of integers do not depend on their order, hence neither on sharding nor on topology.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)  # 64-bit types become pairs of words in a new last axis
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):  # flattening would gather a sharded array
        position = position * np.uint32(size % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    h = bits + position * np.uint32(0x9E3779B9)
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """Path of each leaf -> its checksum."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = {}
    for path, x in leaves:
        sums[jax.tree_util.keystr(path)] = value = _checksum(x)
        if jax.process_count() > 1:  # several programs at once can wait for each other for ever
            value.block_until_ready()
    return {path: int(value) for path, value in jax.device_get(sums).items()}
