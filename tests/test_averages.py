"""Averages of a length that is chosen after training, through the command line."""

import json
import shutil

import numpy as np
import pytest

from latent_diffusion_jax import pipeline
from latent_diffusion_jax.train.sharding import make_mesh
from tests.cli import DIFFUSION, SMALL, SMALL_UNET, do, mistake, without
from tests.train.toy import assert_same_bits

PIXELS = [
    f"{DIFFUSION}:pixels",
    *without(SMALL, "--config.first_stage."),
    *SMALL_UNET,
    "--config.data.image_size=16",
    "--config.run.image_every=0",
    "--config.run.snapshot_every=1",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages") / "ldm"
    lengths = "--config.train.ema_lengths=(0.05,0.1)"
    do("train", *PIXELS, lengths, f"--workdir={folder}")
    return folder


def test_samples_are_of_the_length_asked_for(workdir, tmp_path):
    def sampled(*options):
        do("sample", f"--workdir={workdir}", "--number=2", f"--out={tmp_path}/x", *options)
        return json.loads((tmp_path / "x" / "samples.json").read_text())

    assert "ema_length" not in sampled()
    found = sampled("--ema_length=0.2")
    assert (found["ema_length"], found["step"]) == (0.2, 4)


def test_the_first_length_is_what_is_used_without_one(workdir):
    mesh = make_mesh()
    plain, made = (pipeline.load(str(workdir), mesh, x).params["unet"] for x in (None, 0.05))
    for path, x in [("out.2", "kernel"), ("input_blocks.0.0", "bias")]:
        np.testing.assert_allclose(made[path][x], plain[path][x], atol=1e-4)
    conditioning = (
        pipeline.load(str(workdir), mesh, x).params["conditioning"] for x in (None, 0.1)
    )
    assert_same_bits(*conditioning)  # is not averaged


def test_mistakes_are_one_line(workdir, tmp_path, capsys):
    line = mistake(capsys, "sample", f"--workdir={workdir}", "--ema_length=0.5")
    assert "a length of averages of 0.5; choose from above 0 to 0.289" in line
    line = mistake(capsys, "sample", "--from=x.ckpt", "--ema_length=0.1")
    assert "--ema_length is of a --workdir that stored averages" in line
    bare = shutil.copytree(workdir, tmp_path / "bare", ignore=shutil.ignore_patterns("averages"))
    line = mistake(capsys, "evaluate", f"--workdir={bare}", "--ema_length=0.1")
    assert "has no stored averages to make some of length 0.1: train with" in line
