"""Command lines as a person gives them: in a process of their own, or in this one (sooner done)."""

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest

from latent_diffusion_jax.__main__ import main

ROOT = Path(__file__).parents[1]
FIRST_STAGE = f"--config={ROOT}/configs/first_stage/shapes.py"
DIFFUSION = f"--config={ROOT}/configs/diffusion/shapes.py"
FOLDER = f"--config={ROOT}/configs/first_stage/folder64.py"

# What makes the variants of a config as small as `:tiny`, of which a command takes one.
SMALL = [
    "--config.first_stage.channels=8",
    "--config.first_stage.channel_mult=(1,1)",
    "--config.data.source.size=32",
    "--config.train.batch_size=8",
    "--config.run.steps=4",
    "--config.run.log_every=1",
    "--config.run.eval_every=2",
    "--config.run.image_every=2",
    "--config.run.checkpoint_every=2",
    "--config.run.eval_batches=1",
]
SMALL_UNET = [
    "--config.unet.model_channels=8",
    "--config.unet.num_groups=8",
    "--config.unet.channel_mult=(1,)",
    "--config.unet.attention_resolutions=()",
    "--config.sample.steps=3",
]
FIRST_STAGE_KEYS = "--config.first_stage."


def without(options: list[str], prefix: str) -> list[str]:
    """Those of `options` that do not begin so."""
    return [option for option in options if not option.startswith(prefix)]


def start(
    *arguments: str, devices: int = 1, wrapper: Sequence[str] = (), **popen
) -> subprocess.Popen:
    """Starts a command on fake devices, its two outputs readable as one text."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [*wrapper, sys.executable, "-m", "latent_diffusion_jax", *map(str, arguments)],
        cwd=ROOT,
        **{
            "env": {**os.environ, "XLA_FLAGS": flags},
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            **popen,
        },
    )


def run(*arguments: str, devices: int = 1, code: int = 0, **popen) -> str:
    """Runs a command to its end, which must have that exit code; returns what it said."""
    process = start(*arguments, devices=devices, **popen)
    said = process.communicate()[0]
    assert process.returncode == code, said
    return said


def do(*arguments: str) -> None:
    """Runs a command in this process; it must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


@contextlib.contextmanager
def compilations():
    """Collects the names of the functions that XLA compiles inside, in a list."""
    names: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record):
            _, found, rest = record.getMessage().partition("Finished XLA compilation of jit(")
            if found:
                names.append(rest.partition(")")[0])

    handler = Collect()
    logging.getLogger("jax").addHandler(handler)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logging.getLogger("jax").removeHandler(handler)


def mistake(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Runs a command that must end with exit code 2 and one line; returns the line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def arrays(workdir, step):
    """What a checkpoint holds, in one order."""
    with ocp.StandardCheckpointer() as checkpointer:
        place = workdir / "checkpoints" / str(step)
        items = [checkpointer.restore(place / name) for name in ("weights", "optimizer")]
    return jax.tree.leaves(items)
