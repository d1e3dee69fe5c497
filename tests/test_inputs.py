"""What a person gives, read as inputs: one row per condition, mistakes in one line."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.inputs import read_inputs


def config_of(**conditioning):
    return ConfigDict(dict(conditioning=conditioning, data=dict(image_size=8)))


LABEL = config_of(kind="label", num_classes=3, dim=8, null_class=True)
LAYOUT = config_of(kind="layout", vocab_size=8192, max_objects=2, num_classes=5, dim=8, depth=1)
LOWRES = config_of(kind="lowres", factor=4)
MAPS = config_of(kind="segmentation", num_classes=4, channels=3, halvings=2)
FILL = config_of(kind="inpainting", mask="ldm")
SEQUENCE = config_of(kind="embeddings", number=2, dim=3)
NONE = config_of(kind="none")


@pytest.fixture
def files(tmp_path):
    """A picture, a mask of its size and one of another, a map, layouts, embeddings."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    mask = np.zeros((8, 12), np.uint8)
    mask[:, 6:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:4]).save(tmp_path / "short.png")
    Image.fromarray(np.uint8([[0, 1], [2, 3]] * 4)).save(tmp_path / "map.png")
    things = [{"class": 4, "box": [0, 0, 1, 1]}]
    (tmp_path / "one.json").write_text(json.dumps(things))
    (tmp_path / "two.json").write_text(json.dumps([things, []]))
    (tmp_path / "bad.json").write_text('[{"class": 4}]')
    np.save(tmp_path / "e.npy", np.ones((5, 2, 3)))
    (tmp_path / "folder").mkdir()
    for name in "ab":
        Image.fromarray(image).save(tmp_path / "folder" / f"{name}.png")
    return tmp_path, image


def test_labels_and_none():
    inputs, size, _, about = read_inputs(LABEL, {"class": "2,cat"}, ("dog", "cat", "cow"))
    assert about == [{"label": 2, "class": "cow"}, {"label": 1, "class": "cat"}]
    assert (inputs["label"].tolist(), size) == ([2, 1], None)
    assert read_inputs(LABEL, {"class": None}, None)[0]["label"].tolist() == [0, 1, 2]
    assert read_inputs(NONE, {"class": None}, None) == ({}, None, None, None)


def test_prompts(tmp_path):
    section = dict(kind="text", max_length=9)
    config = ConfigDict(dict(conditioning=section, data=dict(image_size=8, tokenizer="basic")))
    (tmp_path / "prompts.txt").write_text("a red circle\n\na cat\n")
    given = read_inputs(config, {"prompt": f"@{tmp_path}/prompts.txt"}, None)
    assert given.about == [{"prompt": "a red circle"}, {"prompt": "a cat"}]
    one = read_inputs(config, {"prompt": "a cat"}, None)
    np.testing.assert_array_equal(given.inputs["tokens"][1:], one.inputs["tokens"])


def test_layouts(files):
    place, _ = files
    one, *_ = read_inputs(LAYOUT, {"layout": str(place / "one.json")}, None)
    two, *_ = read_inputs(LAYOUT, {"layout": str(place / "two.json")}, None)
    assert one["tokens"].tolist() == [[4, 0, 8099, 8191, 8191, 8191, 0, 8099]]
    assert two["tokens"].shape == (2, 8)
    assert two["tokens"][1].tolist() == [8191] * 6 + [0, 8099]


def test_images(files):
    place, image = files
    inputs, size, names, _ = read_inputs(LOWRES, {"image": str(place / "folder")}, None)
    assert inputs["lowres"].shape == (2, 8, 12, 3)
    assert (size, names) == ((32, 48), ["a", "b"])
    np.testing.assert_allclose((inputs["lowres"][0] + 1) * 127.5, image, atol=1e-4)

    asked = {"image": str(place / "folder"), "mask": str(place / "mask.png")}
    inputs, size, names, _ = read_inputs(FILL, asked, None)
    assert size == (8, 12)
    assert inputs["mask"].shape == (2, 8, 12, 1)  # one mask for both images
    assert inputs["mask"][1, 0, :, 0].tolist() == [0] * 6 + [1] * 6

    inputs, size, names, _ = read_inputs(MAPS, {"segmentation": str(place / "map.png")}, None)
    assert (inputs["segmentation"].dtype, size) == (np.int32, (8, 2))


def test_embeddings(files):
    inputs, *_ = read_inputs(SEQUENCE, {"embeddings": str(files[0] / "e.npy")}, None)
    assert inputs["embeddings"].shape == (5, 2, 3)


def test_two_conditions_at_once(files):
    both = config_of(
        kind="several",
        shape=dict(kind="lowres", factor=4),
        what=dict(kind="label", num_classes=5, dim=8),
    )
    place, _ = files
    inputs, size, names, _ = read_inputs(
        both, {"image": str(place / "photo.png"), "class": "1,2"}, None
    )
    assert {name: len(rows) for name, rows in inputs.items()} == {"lowres": 2, "label": 2}
    assert size == (32, 48)


@pytest.mark.parametrize(
    "config,asked,message",
    [
        (LABEL, {"prompt": "a cat"}, "--prompt=a cat: this model has no such .* takes --class"),
        (NONE, {"class": "1"}, "--class=1: .* it takes --guide, --image, --mask"),
        (LAYOUT, {}, "needs --layout=FILE.json"),
        (LAYOUT, {"layout": "bad.json"}, "bad.json' is not a layout: KeyError: 'box'"),
        (LAYOUT, {"layout": "nowhere.json"}, "nowhere.json' cannot be read"),
        (LOWRES, {}, "needs --image=FILE or folder"),
        (LOWRES, {"image": "one.json"}, "one.json' cannot be read as an image"),
        (FILL, {"image": "photo.png"}, "needs --mask=FILE"),
        (FILL, {"image": "photo.png", "mask": "short.png"}, "--mask is 12x4 pixels, --image 12x8"),
        (MAPS, {"segmentation": "mask.png"}, "has class 255, not one of 0..3"),
        (SEQUENCE, {"embeddings": "one.json"}, "one.json' is not a .npy file"),
        (
            config_of(kind="embeddings", number=1, dim=3),
            {"embeddings": "e.npy"},
            r"not \[N, 1 to 1, 3\]",
        ),
        (config_of(kind="text", max_length=9), {"prompt": "x"}, "config.data.tokenizer=DIR"),
        (config_of(kind="text", max_length=9), {}, "needs --prompt=TEXT"),
    ],
)
def test_mistakes_are_one_clear_line(files, config, asked, message):
    place, _ = files
    asked = {k: str(place / v) if "." in v else v for k, v in asked.items()}
    with pytest.raises(UserError, match=message) as error:
        read_inputs(config, asked, None)
    assert "\n" not in str(error.value)
