import numpy as np
import pytest

from latent_diffusion_jax.data.shapes import CLASS_NAMES, COLOURS, KINDS, Shape, Shapes
from latent_diffusion_jax.errors import UserError


def source(**options) -> Shapes:
    return Shapes(**{"split": "train", "size": 1000} | options)


def test_an_example_depends_on_seed_and_index_alone():
    forward, backward = source(shapes=(1, 3)), source(shapes=(1, 3), size=40)
    first = [forward[i] for i in range(40)]
    again = [backward[i] for i in reversed(range(40))][::-1]
    for a, b in zip(first, again):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert not np.array_equal(source(seed=1)[0]["image"], first[0]["image"])


def test_validation_is_large_enough_and_no_larger():
    sizes = [(len(source(size=n)), len(source(size=n, split="validation"))) for n in (9, 10**6)]
    assert sizes == [(9, 9), (10**6, 2000)]


def test_train_and_validation_never_meet():
    train, validation = source(), source(split="validation")
    seen = {train[i]["image"].tobytes() for i in range(1000)}
    assert len(seen) == 1000
    assert seen.isdisjoint(validation[i]["image"].tobytes() for i in range(1000))


def test_shapes_and_types():
    example = source(image_size=48, shapes=(2, 2))[3]
    assert example["image"].shape == (48, 48, 3)
    assert example["image"].dtype == example["segmentation"].dtype == np.uint8
    assert example["segmentation"].shape == (48, 48)
    assert example["label"].dtype == example["box_labels"].dtype == np.int32
    assert example["boxes"].dtype == np.float32
    assert (example["box_labels"] >= 0).tolist() == [True, True, False]
    assert not example["boxes"][2].any()


def test_every_class_and_number_of_shapes_comes_up_evenly():
    examples = [source(shapes=(1, 3))[i] for i in range(600)]
    labels = np.bincount([e["label"] for e in examples], minlength=12)
    numbers = np.bincount([(e["box_labels"] >= 0).sum() for e in examples])
    assert len(labels) == len(CLASS_NAMES) == 12
    assert labels.min() > 25  # 50 expected; 25 is more than 3.6 standard deviations below
    assert numbers[0] == 0
    assert numbers[1:].min() > 150


def test_one_shape_box_segmentation_and_label_agree_with_the_pixels():
    shapes = source(image_size=64)
    for i in range(100):
        example = shapes[i]
        mask = example["segmentation"] > 0
        assert set(np.unique(example["segmentation"])) == {0, 1 + example["label"]}
        rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 64
        # A sharp corner may cover less than half of its pixels: up to 1.5 pixels at 60 degrees.
        np.testing.assert_allclose(found, example["boxes"][0], atol=2 / 64)
        colour = CLASS_NAMES[example["label"]].split()[0]
        inside = example["image"][mask].astype(float)
        np.testing.assert_allclose(np.median(inside, axis=0), COLOURS[colour], atol=16)
        outside = np.median(example["image"][~mask], axis=0)
        assert np.ptp(outside) == 0  # grey
        assert example["caption"] == f"a {CLASS_NAMES[example['label']]}"


def test_single_shapes_are_large_and_inside_the_image():
    boxes = np.array([source()[i]["boxes"][0] for i in range(300)])
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= 0.39
    assert boxes.min() >= 0.02
    assert boxes.max() <= 0.98


def test_several_shapes_are_largest_first_and_all_mostly_visible():
    shapes = source(image_size=64, shapes=(3, 3))
    for i in range(100):
        example = shapes[i]
        boxes, labels = example["boxes"], example["box_labels"]
        assert example["label"] == labels[0]
        assert boxes.min() >= 0.02 - 1e-6
        assert boxes.max() <= 0.98 + 1e-6
        # What is visible of a class, against the areas of its shapes (from their boxes).
        for label in set(labels):
            visible = (example["segmentation"] == 1 + label).mean()
            sides = np.prod(boxes[labels == label, 2:] - boxes[labels == label, :2], axis=-1)
            least = {"circle": 0.78, "square": 0.65, "triangle": 0.4}
            assert visible > 0.75 * least[CLASS_NAMES[label].split()[1]] * sides.sum()


def test_backgrounds_as_asked_and_nothing_else_changes():
    def greys(**options):
        images = [source(**options)[i] for i in range(60)]
        return np.array([np.median(e["image"][e["segmentation"] == 0]) for e in images])

    both, dark, light = greys(), greys(backgrounds=["dark"]), greys(backgrounds=("light",))
    assert (dark.min() >= 20, dark.max() <= 70) == (True, True)
    assert (light.min() >= 185, light.max() <= 235) == (True, True)
    assert 15 <= np.sum(both < 128) <= 45
    np.testing.assert_array_equal(dark[both < 128], both[both < 128])
    a, b = source(), source(backgrounds=["dark"])
    for i in range(20):
        np.testing.assert_array_equal(a[i]["boxes"], b[i]["boxes"])


def test_captions_say_where_the_boxes_are():
    shapes = source(shapes=(2, 3))
    apart = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    for i in range(100):
        example = shapes[i]
        names = [CLASS_NAMES[label] for label in example["box_labels"] if label >= 0]
        caption = example["caption"].removeprefix(f"a {names[0]} ")
        centres = (example["boxes"][:, :2] + example["boxes"][:, 2:]) / 2
        phrases = caption.split(" and ")
        assert len(phrases) == len(names) - 1
        for phrase, name, centre in zip(phrases, names[1:], centres[1:]):
            words = phrase.removesuffix(f" a {name}")
            axis, sign = apart[words]
            # A turned triangle's box is not quite centred on it, hence the small allowance.
            assert sign * (centres[0] - centre)[axis] > -0.03


def test_edges_are_antialiased_and_areas_exact():
    for kind in KINDS:
        shape = Shape(kind, "red", np.zeros(3, np.float32), 0.513, 0.487, 0.45, 0.1)
        coverage = shape.coverage(64)
        between = (coverage > 0.02) & (coverage < 0.98)
        assert between.sum() > 64  # about one pixel along the whole outline
        assert coverage.mean() == pytest.approx(0.45**2, rel=0.01)


def test_a_larger_image_is_the_same_scene():
    small, large = source(image_size=32)[7], source(image_size=256)[7]
    np.testing.assert_array_equal(small["boxes"], large["boxes"])
    shrunk = large["image"].reshape(32, 8, 32, 8, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small["image"]).mean() < 0.7


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "tset"}, "unknown split 'tset'"),
        ({"image_size": 31}, "image_size 31"),
        ({"image_size": 257}, "image_size 257"),
        ({"size": 0}, "size 0"),
        ({"seed": -1}, "seed -1"),
        ({"shapes": (0, 1)}, r"\(0, 1\)"),
        ({"shapes": (2, 1)}, r"\(2, 1\)"),
        ({"shapes": (1, 4)}, r"\(1, 4\)"),
        ({"backgrounds": ()}, r"backgrounds \(\) must name some of dark, light"),
        ({"backgrounds": ("drak",)}, "unknown shapes background 'drak'; did you mean 'dark'"),
    ],
)
def test_faults(options, message):
    with pytest.raises(UserError, match=message):
        source(**options)


def test_indices_out_of_range():
    for index in (-1, 1000):
        with pytest.raises(IndexError, match="1000 shapes"):
            source()[index]
