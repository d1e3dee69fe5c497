"""`sample --like` of a PNG that says how it was made, and what is refused."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.demo.denoising import Denoiser
from latent_diffusion_jax.demo.settings import fingerprint, read_given, write_png
from latent_diffusion_jax.train.sharding import make_mesh
from tests import models
from tests.cli import do, mistake
from tests.demo.test_settings import SETTINGS, png

SPEC = "diffusion/shapes64.py:unconditional,tiny"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workdir, and the second image of three of a change of another image."""
    place = tmp_path_factory.mktemp("made")
    model = models.trained(SPEC)
    settings = dataclasses.replace(
        SETTINGS, files={"image": ("photo.png", png(64, 64))}, strength=0.5
    )
    given = read_given(settings, model)
    *_, last = Denoiser(model, make_mesh()).run(settings, given)
    path = place / "made.png"
    path.write_bytes(write_png(last.images[1], 1, settings, fingerprint(model)))
    return models.write_workdir(place / "ldm", SPEC), path


def test_the_same_image_again(made, tmp_path):
    workdir, path = made
    do("sample", f"--workdir={workdir}", f"--like={path}", f"--out={tmp_path}")
    assert (tmp_path / "made.png").read_bytes() == path.read_bytes()


def test_mistakes(made, tmp_path, capsys):
    workdir, path = made

    def of(*options):
        return mistake(capsys, "sample", f"--workdir={workdir}", *options)

    assert "--seed and --like" in of(f"--like={path}", "--seed=3")
    assert "would be written over" in of(f"--like={path}", f"--out={path.parent}")
    assert "no such file" in of(f"--like={tmp_path}/none.png").lower()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "plain.png")
    assert "holds no settings" in of(f"--like={tmp_path}/plain.png")
    line = of(f"--like={path}", f"--out={tmp_path}", "--config.dtype=bfloat16")
    assert "was made by another model" in line
    assert "bfloat16 here" in line
