"""The flags that XLA is given."""

import os
import subprocess
import sys

import pytest

from latent_diffusion_jax import xla


@pytest.mark.parametrize(
    ("flags", "added"),
    [("", 2), ("--xla_cpu_copy_insertion_use_region_analysis=false", 1), ("/a/file", 0)],
)
def test_flags_of_xla_are_added_to_those_of_the_user(flags, added, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    xla.tune()
    now = os.environ["XLA_FLAGS"]
    assert now.startswith(flags)
    assert len(now.split()) == added + bool(flags)
    xla.tune()
    assert os.environ["XLA_FLAGS"] == now


def test_convolutions_on_cpus_are_eigens():
    program = """
import jax, jax.numpy as jnp
from latent_diffusion_jax import xla

xla.tune()
x = jnp.ones((1, 8, 8, 16))
conv = lambda x: jax.lax.conv(x, jnp.ones((16, 8, 3, 3)), (1, 1), "SAME")
print(jax.jit(conv).lower(x).compile().as_text())
"""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", program]
    hlo = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert " convolution(" in hlo.stdout
    assert "ynn" not in hlo.stdout


def test_nothing_is_added_beside_libtpu(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    monkeypatch.setattr("importlib.util.find_spec", {"libtpu": object()}.get)
    xla.tune()
    assert os.environ["XLA_FLAGS"] == "--a=1"
