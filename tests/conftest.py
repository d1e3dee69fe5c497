"""Every test sees 8 fake CPU devices, strict rank promotion and a lasting compilation cache."""

# ruff: noqa: E402, what follows the environment imports jax
import gc
import os
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """What a file of tests compiled is of no use to the others, and adds up to gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
