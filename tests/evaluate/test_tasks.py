"""Measures of a task: perfect on the truth, bad on what is not asked for."""

import json

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate import tasks
from tests.cli import ROOT, do

NUMBER = 12
BEST = {  # task -> measure, at least on the truth, at most on the images of other examples
    "text": ("caption", 1.0, 0.2),  # some captions occur twice
    "layout": ("box_iou", 0.95, 0.3),
    "semantic": ("segmentation_iou", 0.97, 0.5),
}


def examples_of(task):
    config = load_config(f"{ROOT}/configs/diffusion/shapes64.py:{task}")
    return tasks.validation_examples(config, NUMBER), config.conditioning.kind


@pytest.mark.parametrize("task", BEST)
def test_truth_is_right_and_another_image_is_not(task):
    examples, kind = examples_of(task)
    name, least, most = BEST[task]
    images = np.stack([example["image"] for example in examples])
    assert tasks.MEASURES[kind](images, examples)[name] >= least
    assert tasks.MEASURES[kind](np.roll(images, 1, axis=0), examples)[name] <= most


def test_classes_of_the_largest_and_of_the_only_shape():
    for file in ("shapes", "shapes64"):
        config = load_config(f"{ROOT}/configs/diffusion/{file}.py")
        examples = tasks.validation_examples(config, NUMBER)
        images = np.stack([example["image"] for example in examples])
        assert tasks.MEASURES["label"](images, examples) == {"class": 1.0}
        assert tasks.MEASURES["label"](images[::-1], examples)["class"] < 0.5


def test_gain_of_super_resolution_is_over_bicubic():
    examples, kind = examples_of("superres")
    bicubic = np.stack([tasks._enlarged(example) for example in examples])
    assert tasks.MEASURES[kind](bicubic, examples)["gain"] == 0
    noisy = [example["image"] ^ 1 for example in examples]  # off by one level: 48.13 dB
    measures = tasks.MEASURES[kind](np.stack(noisy), examples)
    assert measures["psnr"] == pytest.approx(20 * np.log10(255))
    assert measures["gain"] == measures["psnr"] - measures["psnr_bicubic"] > 20


def test_inpainting_is_measured_in_holes_and_outside():
    examples, kind = examples_of("inpainting")
    holes = np.stack([example["mask"] for example in examples]) >= 0.5
    images = np.stack([example["image"] for example in examples])
    means = np.stack([i[~h[..., 0]].mean(axis=0) for i, h in zip(images, holes)])
    filled = np.where(holes, means[:, None, None, :], images)
    measures = tasks.MEASURES[kind](filled, examples)
    assert measures["gain"] == pytest.approx(0)
    assert measures["gain_pooled"] == pytest.approx(0)
    assert measures["outside"] == 0
    shifted = images.astype(float) + np.where(holes, 2, -3)
    measures = tasks.MEASURES[kind](shifted, examples)
    assert measures["psnr"] == pytest.approx(20 * np.log10(255 / 2))
    assert measures["outside"] == 3
    half = np.where(np.arange(len(images))[:, None, None, None] % 2, images, shifted)
    measures = tasks.MEASURES[kind](half, examples)  # exact in every second, but for rounding
    assert measures["psnr"] == pytest.approx(10 * np.log10(255**2 / np.sqrt(4 / 12)))
    sizes = holes.sum(axis=(1, 2, 3))
    pooled = 4 * sizes[::2].sum() / sizes.sum()  # large holes count more there
    errors = [((m - i) ** 2)[h[..., 0]] for m, i, h in zip(means, images.astype(float), holes)]
    mean = np.concatenate(errors).mean()
    assert measures["gain_pooled"] == pytest.approx(10 * np.log10(mean / pooled))


@pytest.mark.parametrize("kind", tasks.VIEWS)
def test_conditions_are_pictures(kind):
    names = {"layout": "layout", "segmentation": "semantic", "lowres": "superres"}
    examples, _ = examples_of(names.get(kind, "inpainting"))
    picture = tasks.VIEWS[kind](examples[0])
    assert picture.dtype == np.uint8
    assert picture.shape[-1] == 3
    assert len(np.unique(picture)) > 1


def test_other_data_has_no_truth_to_read():
    config = load_config(f"{ROOT}/configs/diffusion/folder64.py:text")
    model = tasks.pipeline.Trained(config, {}, {}, None, 0)
    with pytest.raises(UserError, match="reads samples on the data 'shapes', of 'folder' only"):
        tasks.evaluate(model, None, number=1, batch=1, seed=0)


def test_from_training_to_a_figure(tmp_path, capsys):
    """Super-resolution, smallest: trained, measured, and used on a picture of any name."""
    ae, ldm = tmp_path / "ae", tmp_path / "ldm"
    do("train", f"--config={ROOT}/configs/first_stage/shapes64.py:tiny", f"--workdir={ae}")
    config = f"--config={ROOT}/configs/diffusion/shapes64.py:superres,tiny"
    do("train", config, f"--workdir={ldm}", f"--config.run.first_stage={ae}")
    do("evaluate", f"--workdir={ldm}", "--number=8", "--steps=2")
    result = json.loads((ldm / "evaluation.json").read_text())
    assert set(result["measures"]) == {"psnr", "psnr_bicubic", "gain"}
    assert result["protocol"]["steps"] == 2
    assert result["protocol"]["number"] == 8
    assert Image.open(ldm / "evaluation.png").width > 100
    Image.new("RGB", (16, 24), "red").save(tmp_path / "small one.png")
    image = f"--image={tmp_path}/small one.png"
    do("sample", f"--workdir={ldm}", image, f"--out={tmp_path}/out", "--steps=2")
    assert Image.open(tmp_path / "out" / "small one.png").size == (64, 96)
    assert f"1 images in {tmp_path}/out" in capsys.readouterr().out
