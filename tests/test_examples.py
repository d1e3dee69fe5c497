"""Every kind of condition, made of the embedded data, and of a folder that has what it takes."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from configs.tasks import TASKS
from latent_diffusion_jax import build
from latent_diffusion_jax.conditioning.layout import token_corner
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.data.loader import make_loader
from latent_diffusion_jax.data.shapes import CLASS_NAMES
from latent_diffusion_jax.errors import UserError
from tests.cli import ROOT

SHAPES = f"{ROOT}/configs/diffusion/shapes64.py"
FOLDER = f"{ROOT}/configs/diffusion/folder64.py"


def batch_of(config, split="train", **options):
    loader = make_loader(
        build.source(config, split),
        batch_size=4,
        image_size=config.data.image_size,
        seed=0,
        train=split == "train",
        prepare=build.prepare(config),
        keys=build.batch_keys(config),
        **options,
    )
    return next(loader)


@pytest.mark.parametrize("task", TASKS)
def test_the_loader_gives_what_the_conditioner_reads(task):
    config = load_config(f"{SHAPES}:{task}")
    batch = batch_of(config)
    expected = build.inputs(config, 4)
    assert {n: (x.shape, x.dtype) for n, x in batch.items() if n != "image"} == {
        n: (s.shape, s.dtype) for n, s in expected.items()
    }


def test_inputs_agree_with_the_image():
    """A low-resolution image is the image's mean, the rest of an image to fill is the image."""
    low = batch_of(load_config(f"{SHAPES}:superres"))
    blocks = low["image"].reshape(4, 16, 4, 16, 4, 3).mean(axis=(2, 4))
    assert np.abs(blocks - low["lowres"]).mean() < 0.02
    fill = batch_of(load_config(f"{SHAPES}:inpainting"))
    np.testing.assert_array_equal(fill["image"], fill["image_to_fill"])
    assert set(np.unique(fill["mask"])) == {0, 1}
    assert len(np.unique(fill["mask"].sum(axis=(1, 2, 3)))) > 1  # each its own


def test_layout_tokens_are_the_boxes_in_any_order():
    config = load_config(f"{SHAPES}:layout")
    size = config.conditioning.vocab_size
    half_a_cell = 0.5 / (math.isqrt(size) - 1)
    source, prepare = build.source(config, "train"), build.prepare(config)
    example = next(e for e in map(source.__getitem__, range(20)) if e["box_labels"][1] >= 0)
    orders = set()
    for seed in range(8):
        tokens = prepare(example, np.random.default_rng(seed))["tokens"]
        things = tokens[:6].reshape(2, 3)
        orders.add(tuple(things[:, 0]))
        for label, corner, _ in things:
            box = example["boxes"][list(example["box_labels"]).index(label)]
            corner = token_corner(corner, size)
            np.testing.assert_allclose(corner, box[:2], atol=half_a_cell + 1e-6)
        assert set(tokens[6 : 3 * config.conditioning.max_objects]) == {size - 1}  # none
    assert len(orders) == 2


def test_captions_held_out_never_meet():
    config = load_config(f"{SHAPES}:text")
    sides = [build.source(config, split) for split in ("train", "validation")]
    captions = [{side[i]["caption"] for i in range(400)} for side in sides]
    assert not captions[0] & captions[1]
    assert len(captions[1]) > 50
    assert all("a " in caption for caption in captions[0] | captions[1])
    config.data.source.held_out = 1.0
    with pytest.raises(UserError, match=r"held_out 1.0 must be from 0 to below 1"):
        build.source(config, "train")


@pytest.fixture
def folder(tmp_path):
    """Images with everything that a `metadata.jsonl` can say."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
        Image.fromarray(np.full((70, 90), i % 3, np.uint8)).save(tmp_path / f"map{i}.png")
        np.save(tmp_path / f"{i}.npy", np.full((2, 4), i))
        lines.append(
            {
                "file_name": f"{i}.png",
                "text": "a red circle",
                "objects": [{"class": ["cat", "dog"][i % 2], "box": [0.2, 0.1, 0.9, 0.8]}],
                "segmentation": f"map{i}.png",
                "embeddings": f"{i}.npy",
            }
        )
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.mark.parametrize("task", [t for t in TASKS if t != "unconditional"])
def test_a_folder_of_ones_own(folder, task):
    config = load_config(f"{FOLDER}:{task}")
    config.data.source.path = str(folder)
    config.data.source.validation_fraction = 0.0
    batch = batch_of(config)
    expected = build.inputs(config, 4)
    assert {n: x.shape for n, x in batch.items() if n != "image"} == {
        n: s.shape for n, s in expected.items()
    }


def test_embeddings_come_from_files(folder):
    config = load_config(f"{FOLDER}:unconditional")
    config.data.source.path, config.data.source.validation_fraction = str(folder), 0.0
    config.conditioning = dict(kind="embeddings", number=2, dim=4)
    batch = batch_of(config)
    assert batch["embeddings"].shape == (4, 2, 4)
    assert len(np.unique(batch["embeddings"])) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": None}, "the data has no caption, which this model is trained on"),
        ({"objects": [{"class": 1}]}, r"metadata.jsonl' line 1: objects .* KeyError 'box'"),
        (
            {"objects": [{"class": "cat", "box": [0.5, 0, 0.2, 1]}]},
            r"line 1: box \[0.5, 0.0, 0.2, 1.0\] is not x0 < x1, y0 < y1 in 0..1",
        ),
        ({"segmentation": "none.png"}, "line 1 names 'none.png', which is missing"),
    ],
)
def test_mistakes_in_a_folder(folder, change, message):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    every = lines if "text" in change else lines[:1]
    for line in every:
        line.update(change)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = load_config(f"{FOLDER}:text")
    config.data.source.path, config.data.source.validation_fraction = str(folder), 0.0
    with pytest.raises(UserError, match=message):
        batch_of(config)


def test_options_of_the_data_are_checked():
    config = load_config(f"{SHAPES}:superres")
    config.data.degradation = "bicubi"
    with pytest.raises(UserError, match="unknown degradation 'bicubi'; did you mean 'bicubic'"):
        build.prepare(config)
    with config.unlocked():
        del config.data.degradation
        config.data.degradations = "bicubic"
    with pytest.raises(UserError, match=r"unknown key in config.data: 'degradations'; did you"):
        build.prepare(config)
    assert len(CLASS_NAMES) == load_config(f"{SHAPES}:layout").conditioning.num_classes
