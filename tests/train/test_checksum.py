import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.train import checksum as module
from latent_diffusion_jax.train.checksum import checksums
from latent_diffusion_jax.train.sharding import batch_sharding, make_mesh


def checksum(x):
    return checksums({"x": jnp.asarray(x)})["['x']"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_every_flipped_bit_changes_it(dtype):
    array = np.asarray(jnp.arange(6).reshape(2, 3).astype(dtype))
    found = {checksum(array)}
    flips = 8 * array.nbytes
    for bit in range(flips):
        data = bytearray(array.tobytes())
        data[bit // 8] ^= 1 << bit % 8
        found.add(checksum(np.frombuffer(bytes(data), array.dtype).reshape(array.shape)))
    assert len(found) == flips + 1


def test_every_place_counts():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert checksum(x) != checksum(x[::-1])
    assert checksum(x) != checksum(x[:, ::-1])
    assert checksum(x) != checksum(-x)  # an even number of flipped signs
    assert checksum(np.array([True, False])) != checksum(np.array([False, True]))


def test_it_does_not_depend_on_the_sharding():
    x = np.random.default_rng(0).standard_normal((16, 5), np.float32)
    spread = jax.device_put(x, batch_sharding(make_mesh(data=2, fsdp=4)))
    assert checksum(spread) == checksum(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "uint8", "int32"])
@pytest.mark.parametrize("shape", [(), (0, 3), (7, 5), (3, module.BLOCK)])
def test_it_does_not_depend_on_where_it_is_computed(dtype, shape, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 200, shape)).astype(dtype)
    here = checksum(x)
    monkeypatch.setattr(module, "_is_in_memory", lambda x: False)
    assert checksum(x) == here
