"""The demo's pipeline at its smallest learns: reconstructions, and the class that was asked for."""

import json

import pytest

from latent_diffusion_jax.evaluate.oracle import accuracy
from latent_diffusion_jax.train.metrics import read_jsonl
from tests.cli import DIFFUSION, FIRST_STAGE, run

CLASSES = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ae(runs):
    steps = 500
    run(
        "train",
        FIRST_STAGE,
        f"--workdir={runs}/ae",
        f"--config.run.steps={steps}",
        f"--config.optim.schedule.max_decay_steps={steps}",
        "--config.run.log_every=10",
        "--config.run.eval_every=0",
        "--config.run.image_every=0",
    )
    return runs / "ae"


@pytest.fixture(scope="module")
def ldm(runs, ae):
    steps = 900
    options = [
        DIFFUSION,
        f"--workdir={runs}/ldm",
        f"--config.run.first_stage={ae}",
        "--config.data.source.size=2048",
        f"--config.run.steps={steps}",
        f"--config.optim.schedule.max_decay_steps={steps}",
        "--config.run.eval_every=0",
        "--config.run.image_every=0",
    ]
    run("encode", *options)
    run("train", *options)
    return runs / "ldm"


def test_reconstruction_loss_falls_fivefold(ae):
    losses = [line["loss"] for line in read_jsonl(str(ae / "metrics.jsonl")) if "loss" in line]
    assert losses[-1] < losses[0] / 5


def test_generated_shapes_are_what_was_asked_for(ldm):
    run("sample", f"--workdir={ldm}", "--number=48", "--batch=48")
    tally = accuracy(ldm / "samples")
    right, total = (sum(column) for column in zip(*tally.values(), strict=True))
    assert (len(tally), total) == (CLASSES, 48)
    assert right / total > 5 / CLASSES  # five times chance; 32 of 48 when this was written
    asked = json.loads((ldm / "samples" / "samples.json").read_text())
    assert asked["scale"] == 2.0
