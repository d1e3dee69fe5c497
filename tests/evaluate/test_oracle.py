import itertools
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from latent_diffusion_jax.data.shapes import (
    CLASS_NAMES,
    KINDS,
    MAX_TURN,
    Shape,
    Shapes,
    describe,
    render,
)
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate import oracle
from latent_diffusion_jax.evaluate.scene import read_scene, read_shape, segment

RED, GREEN, GREY = (220, 40, 40), (40, 165, 60), (200, 200, 200)


def canvas(*squares, size=64):
    """Squares (x0, y0, x1, y1, rgb) in pixels over dark grey."""
    image = np.full((size, size, 3), 40, np.uint8)
    for x0, y0, x1, y1, rgb in squares:
        image[y0:y1, x0:x1] = rgb
    return image


def decoded(image, generator):
    """What a decoder of about 30 dB makes of an image: soft edges and noise."""
    soft = ndimage.gaussian_filter(image.astype(float), (0.7, 0.7, 0))
    return np.clip(np.rint(soft + generator.normal(0, 6, image.shape)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("image_size, number", [(32, 500), (64, 200), (256, 24)])
def test_reads_the_class_back(image_size, number):
    shapes = Shapes(split="validation", image_size=image_size, seed=7)
    right = [oracle.class_right(shapes[i]["image"], shapes[i]["label"]) for i in range(number)]
    assert np.mean(right) >= 0.99


def test_reads_the_class_of_blurred_shapes():
    shapes = Shapes(split="validation", seed=8)
    right = []
    for i in range(100):
        image = Image.fromarray(shapes[i]["image"]).filter(ImageFilter.GaussianBlur(1))
        right.append(oracle.class_right(np.asarray(image), shapes[i]["label"]))
    assert np.mean(right) >= 0.97


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_reads_scenes_back(most, noisy):
    shapes = Shapes(split="validation", image_size=64, seed=9, shapes=(most, most))
    generator = np.random.default_rng(0)
    scores = []
    for example in (shapes[i] for i in range(50)):
        image = decoded(example["image"], generator) if noisy else example["image"]
        scores.append(
            [
                oracle.caption_right(image, example["caption"]),
                oracle.box_iou(image, example["boxes"], example["box_labels"]),
                oracle.segmentation_iou(image, example["segmentation"]),
            ]
        )
        assert oracle.psnr(image, example["image"]) > 27
    # Of 500 scenes each all captions are right; boxes 0.98, segmentations 0.999 and noisy 0.99.
    assert (np.mean(scores, axis=0) >= ([0.97, 0.97, 0.97] if noisy else [0.99, 0.97, 0.995])).all()


@pytest.mark.parametrize("image_size", [32, 64])
def test_tells_touching_shapes_of_one_colour_apart(image_size):
    generator = np.random.default_rng(0)
    right = []
    for kind, other in itertools.product(KINDS, KINDS):
        for angle in np.deg2rad(np.arange(7, 367, 45)):
            turns = generator.uniform(-MAX_TURN, MAX_TURN, 2)
            large = Shape(kind, "blue", np.array([45, 80, 220]), 0.5, 0.5, 0.32, turns[0])
            small = Shape(other, "blue", np.array([35, 95, 210]), 0.0, 0.0, 0.22, turns[1])
            away = 0.9 * (large.radius + small.radius)  # as near as any come
            small = small._replace(x=0.5 + away * np.cos(angle), y=0.5 + away * np.sin(angle))
            image, segmentation = render([large, small], 40.0, image_size)
            if ndimage.label(segmentation)[1] == 1:
                right.append(oracle.caption_right(image, describe([large, small])))
    assert len(right) > 20
    assert np.mean(right) >= 0.95


def test_places_and_sizes_are_those_of_the_pixels():
    large, small = read_scene(canvas((8, 20, 28, 40, RED), (40, 4, 52, 16, GREEN)))
    assert (large.name, small.name) == ("red square", "green square")
    assert min(large.confidence, small.confidence) > 0.95
    np.testing.assert_allclose(np.multiply(large.box, 64), [8, 20, 28, 40], atol=0.3)
    np.testing.assert_allclose(np.multiply(small.box, 64), [40, 4, 52, 16], atol=0.3)
    np.testing.assert_allclose(np.multiply(large.centre, 64), [18, 30], atol=0.1)
    assert large.area == pytest.approx(400 / 64**2, rel=0.02)


def test_what_is_hidden_is_imagined():
    covered = canvas((10, 10, 34, 34, RED), (30, 20, 46, 36, GREEN))
    seen = {shape.name: shape for shape in read_scene(covered)}
    np.testing.assert_allclose(np.multiply(seen["red square"].box, 64), [10, 10, 34, 34], atol=1)
    segmentation = segment(covered)
    assert (segmentation == 1 + CLASS_NAMES.index("green square")).sum() == 16 * 16
    assert (segmentation == 1 + CLASS_NAMES.index("red square")).sum() == 24 * 24 - 4 * 14


def test_sees_nothing_in_flat_images_noise_and_clutter():
    generator = np.random.default_rng(0)
    for shade in (0, 60, 255):
        flat = np.full((32, 32, 3), shade, np.uint8)
        assert read_shape(flat).name == "none"
        assert read_scene(flat) == []
        assert not segment(flat).any()
    for coarse in (4, 8, 16, 32) * 10:
        noise = generator.integers(0, 256, (coarse, coarse, 3)).astype(np.uint8)
        image = np.asarray(Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC))
        assert read_shape(image).name == "none"
        assert not oracle.caption_right(image, "a red circle left of a blue square")
    several = Shapes(split="train", shapes=(3, 3))
    assert all(read_shape(several[i]["image"]).name == "none" for i in range(50))


@pytest.mark.parametrize(
    "square, names",
    [
        ((18, 18, 44, 44, GREY), ["none"]),
        ((6, 28, 58, 36, RED), ["none"]),  # a bar
        ((18, 18, 44, 44, (55, 40, 40)), []),  # faint
        ((30, 30, 34, 34, RED), []),  # a blemish
    ],
)
def test_what_is_no_shape(square, names):
    image = canvas(square)
    assert read_shape(image).name == "none"
    assert [seen.name for seen in read_scene(image)] == names


SCENE = canvas((4, 20, 24, 40, RED), (40, 20, 52, 32, GREEN))


@pytest.mark.parametrize(
    "caption, parts",
    [
        ("a red square left of a green square", (1, 1, 1)),
        ("a green square right of a red square", (1, 1, 1)),
        ("a blue square left of a green square", (0.5, 1, 1)),
        ("a red circle left of a green square", (1, 0.5, 1)),
        ("a red square right of a green square", (1, 1, 0)),
        ("a red square above a green square", (1, 1, 0)),
        ("a red square", (0.5, 0.5, np.nan)),
        (
            "a red square left of a green square and above a red square",
            (2 / 3, 2 / 3, 0.5),
        ),
    ],
)
def test_a_caption_is_right_if_all_its_parts_are(caption, parts):
    np.testing.assert_allclose(list(oracle.caption_parts(SCENE, caption).values()), parts)
    assert oracle.caption_right(SCENE, caption) == (parts == (1, 1, 1))


def test_an_extra_shape_is_a_fault_even_if_it_is_grey():
    caption = "a red square left of a green square"
    for rgb in (RED, GREY):
        extra = SCENE.copy()
        extra[44:56, 30:42] = rgb
        assert oracle.caption_parts(extra, caption)["places"] == 1
        assert not oracle.caption_right(extra, caption)


def test_of_two_alike_either_may_be_the_first():
    image = canvas((4, 20, 24, 40, RED), (40, 20, 52, 32, RED))
    assert oracle.caption_right(image, "a red square left of a red square")
    assert oracle.caption_right(image, "a red square right of a red square")
    assert not oracle.caption_right(image, "a red square above a red square")


@pytest.mark.parametrize(
    "caption", ["", "a cat", "a red circle near a blue square", "a red circle "]
)
def test_other_captions_are_refused(caption):
    with pytest.raises(UserError, match="is not of shapes"):
        oracle.caption_right(SCENE, caption)


def test_images_that_are_not_levels_of_255_are_refused():
    with pytest.raises(UserError, match=r"float64 \(64, 64, 3\)"):
        read_scene(SCENE / 255)


def test_boxes_elsewhere_and_of_other_classes_count_less():
    red, green = CLASS_NAMES.index("red square"), CLASS_NAMES.index("green square")
    box = np.array([4, 20, 24, 40]) / 64
    right = np.array([box, [40 / 64, 20 / 64, 52 / 64, 32 / 64], [0, 0, 0, 0]])
    assert oracle.box_iou(SCENE, right, np.array([red, green, -1])) > 0.96
    assert oracle.box_iou(SCENE, right, np.array([green, red, -1])) == 0
    assert oracle.box_iou(SCENE, right[:2], np.array([red, red])) == pytest.approx(0.5, abs=0.02)
    moved = box[None] + [[10 / 64, 0, 10 / 64, 0]]  # half of it
    assert oracle.box_iou(SCENE, moved, np.array([red])) == pytest.approx(1 / 3, abs=0.02)


def test_segmentation_iou_of_nothing_is_of_the_background_alone():
    truth = segment(SCENE)
    assert oracle.segmentation_iou(SCENE, truth) == 1
    share = (truth == 0).mean()
    assert oracle.segmentation_iou(canvas(), truth) == pytest.approx(share / 3)


def test_errors_in_closed_form():
    image, truth = canvas(), canvas()
    assert oracle.psnr(image, truth) == np.inf
    assert oracle.psnr(image + np.uint8(1), truth) == pytest.approx(20 * np.log10(255))
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    image[:16] -= 4
    image[40, 40, 1] += 7
    assert oracle.inside_outside(image, truth, mask) == (2, 7)


def test_accuracy_counts_by_class(tmp_path):
    Image.fromarray(canvas((10, 10, 40, 40, RED))).save(tmp_path / "0.png")
    classes = ["red square", "red square", "red circle"]
    records = [{"file_name": f"{i}.png", "class": name} for i, name in enumerate(classes)]
    Image.fromarray(canvas()).save(tmp_path / "1.png")
    Image.fromarray(canvas((10, 10, 40, 40, RED))).save(tmp_path / "2.png")
    (tmp_path / "samples.json").write_text(json.dumps({"images": records}))
    assert oracle.accuracy(tmp_path) == {"red square": (1, 2), "red circle": (0, 1)}
