"""The experiments' own arithmetic, and that they go on where they were; no training."""

import json

import numpy as np
import pytest

from benchmarks import experiments
from latent_diffusion_jax.config import load_config
from tests.cli import ROOT
from tests.test_launch import script


def test_features_are_means_of_squares_of_pixels():
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    found = experiments.small(images).reshape(3, 8, 8, 3)
    np.testing.assert_allclose(found[1, 2, 5], images[1, 8:12, 20:24].mean(axis=(0, 1)) / 255)


def test_spread_is_within_classes():
    labels = np.array([0, 1, 0, 1])
    features = np.array([[0.0], [10], [2], [14]])
    np.testing.assert_allclose(experiments.within(features, labels), np.sqrt((1 + 4) / 2))


def test_what_was_measured_is_not_measured_again(tmp_path):
    def fail():
        raise AssertionError

    first = experiments.Rows(tmp_path / "x")
    first.add({"scale": 1.0, "number": 48}, lambda: {"class": 0.5})
    again = experiments.Rows(tmp_path / "x")
    again.add({"scale": 1.0, "number": 48}, fail)
    assert again.found == [{"scale": 1.0, "number": 48, "class": 0.5}]
    with pytest.raises(AssertionError):
        again.add({"scale": 1.0, "number": 96}, fail)
    assert len(json.loads((tmp_path / "x.json").read_text())) == 1


def test_cost_of_a_training_is_counted(tmp_path):
    lines = [{"step": 50, "images_per_second": 20.0, "flops_per_second": 4e12}, {"step": 50}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = load_config(f"{ROOT}/configs/diffusion/shapes_sweep.py:tiny")
    assert experiments.training_flops(str(tmp_path), config, 100) == pytest.approx(0.2 * 8 * 100)


def test_the_stored_step_that_is_closest(tmp_path):
    for step in ("100", "200", "300"):
        (tmp_path / "averages" / "checkpoints" / step).mkdir(parents=True)
    assert [experiments.nearest(str(tmp_path), s) for s in (1, 160, 900)] == [100, 200, 300]


@pytest.mark.parametrize("name", ["compression", "first_stages", "guidance", "lengths", "steps"])
def test_scripts_train_before_they_measure(name, tmp_path):
    """With a `python` that only says what it was told."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = script(f"experiments/{name}.sh", str(tmp_path / "runs"), PATH=path, FACTORS="1 4")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[-1].startswith(f"-m benchmarks.experiments {name} {tmp_path}/runs/")
    assert "train --config=configs/first_stage/shapes.py:" in told[0] + told[1]
    workdirs = [word for word in told[-1].split() if word.startswith(f"{tmp_path}/runs/")]
    assert all(f"--workdir={workdir}" in " ".join(told[:-1]) for workdir in workdirs)
