"""What a PNG says of how it was made: all of it, whoever wrote it."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from latent_diffusion_jax.demo.settings import (
    KEY,
    Settings,
    fingerprint,
    read_given,
    read_png,
    write_png,
)
from latent_diffusion_jax.errors import UserError
from tests import models

SETTINGS = Settings(
    seed=2**32 - 1,
    number=3,
    sampler="ddim",
    options={"eta": 0.5},
    steps=7,
    timesteps="trailing",
    scale=1.5,
)
FULL = dataclasses.replace(
    SETTINGS,
    size=(64, 96),
    strength=0.3,
    texts={"prompt": "ein grüner Kreis\n✓"},
    files={"image": ("föto.png", bytes(range(256)) * 5000)},
)
IMAGE = np.random.default_rng(0).uniform(-1.1, 1.1, (8, 12, 3)).astype(np.float32)


@pytest.mark.parametrize("settings", [SETTINGS, FULL], ids=["plain", "full"])
def test_a_png_holds_its_image_and_its_settings(settings, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(write_png(IMAGE, 2, settings, "0123abcd float32"))
    assert read_png(str(path)) == (settings, 2, "0123abcd float32")
    with Image.open(path) as image:
        np.testing.assert_allclose(
            np.asarray(image), np.clip((IMAGE + 1) * 127.5, 0, 255), atol=0.501
        )


def doctored(path, **changes):
    """A PNG whose settings somebody wrote by hand."""
    with Image.open(io.BytesIO(write_png(IMAGE, 0, FULL, "x"))) as image:
        made = {**json.loads(image.info[KEY]), **changes}
        text = PngImagePlugin.PngInfo()
        text.add_text(KEY, json.dumps({k: v for k, v in made.items() if v != "absent"}))
        image.save(path, pnginfo=text)
    return str(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps="absent"), "broken settings: 'steps'"),
        (dict(steps="many"), "broken settings: invalid literal"),
        (dict(extra=1), "unknown extra"),
        (dict(index=3), "index 3 of 3"),
        (dict(number=10**9), "index 0 of 1000000000"),
        (dict(texts={"image": "/etc/passwd"}), "unknown 'image'; one of class, prompt"),
        (dict(files={"prompt": ["x", ""]}), "unknown 'prompt'; one of embeddings, guide"),
        (dict(files={"image": ["x", "?"]}), "broken settings"),
        (dict(size=[1]), "broken settings"),
    ],
)
def test_settings_that_somebody_changed(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        read_png(doctored(tmp_path / "a.png", **changes))
    assert "\n" not in str(error.value)


def test_files_without_settings(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="plain.png' holds no settings"):
        read_png(str(tmp_path / "plain.png"))
    with pytest.raises(UserError, match="text.png' cannot be read as an image"):
        read_png(str(tmp_path / "text.png"))


def given(task, files=None, texts=None, **changes):
    model = models.trained(f"diffusion/shapes64.py:{task},tiny")
    settings = dataclasses.replace(SETTINGS, files=files or {}, texts=texts or {}, **changes)
    return read_given(settings, model)


def png(height, width, mode="RGB"):
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, "png")
    return out.getvalue()


def test_inputs_of_every_image_of_a_run():
    assert given("text", texts={"prompt": "a red circle"}).inputs["tokens"].shape == (3, 24)
    low = given("superres", {"image": ("../../a.png", png(16, 32))})
    assert (low.inputs["lowres"].shape, low.size) == ((3, 16, 32, 3), (64, 128))


BOX = b'[{"class": "%s", "box": [0, 0, 1, 1]}]'


@pytest.mark.parametrize(
    "task, asked, message",
    [
        ("text", dict(texts={"prompt": "@/etc/passwd"}), "must not begin with @"),
        ("text", {}, "needs --prompt"),
        ("superres", dict(files={"image": ("a.png", b"text")}), "^'a.png' cannot be read as an"),
        (
            "superres",
            dict(files={"image": ("a.png", png(3000, 3000, "1"))}),
            "'a.png' is 3000x3000",
        ),
        (
            "superres",
            dict(files={"image": ("a.png", png(20000, 20000, "1"))}),
            "too large an image",
        ),
        ("superres", dict(files={"image": ("a.png", png(1024, 1024, "1"))}), "of 4096x4096 have"),
        (
            "superres",
            dict(files={"image": ("a.png", png(8, 8))}, size=(9, 9)),
            "size 9x9: .* 32x32",
        ),
        (
            "inpainting",
            dict(files={"image": ("a.png", png(64, 64)), "mask": ("m.png", png(32, 64))}),
            "--mask is 64x32 pixels, --image 64x64",
        ),
        (
            "layout",
            dict(files={"layout": ("l.json", BOX % b"dragon")}),
            "^'l.json' is not a layout",
        ),
        ("unconditional", dict(texts={"class": "1"}), "no such condition"),
    ],
)
def test_mistakes_are_one_line_that_names_no_folder(task, asked, message):
    with pytest.raises(UserError, match=message) as error:
        given(task, **asked)
    assert "\n" not in str(error.value)
    assert "/tmp/" not in str(error.value)


def test_other_weights_and_types_have_another_fingerprint():
    model = models.trained("diffusion/shapes.py:tiny")
    half = model._replace(config=model.config.copy_and_resolve_references())
    half.config.dtype = "bfloat16"
    moved = model._replace(frozen={**model.frozen, "latent_scale": np.float32(1.5)})
    assert len({fingerprint(each) for each in (model, half, moved)}) == 3
    assert fingerprint(model) == fingerprint(model._replace(step=3))
