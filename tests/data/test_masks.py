import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from latent_diffusion_jax.data import masks
from latent_diffusion_jax.errors import UserError


def made_of_boxes(mask):
    """Whether squares of 29 pixels inside it cover it: no round end does that."""
    inner = ndimage.minimum_filter(mask, 29, mode="constant")
    return np.array_equal(ndimage.maximum_filter(inner, 29, mode="constant"), mask)


@pytest.mark.parametrize("height, width", [(256, 256), (64, 64), (32, 48), (96, 64), (8, 8)])
def test_masks_are_binary_and_neither_empty_nor_full(height, width):
    generator = np.random.default_rng(0)
    for _ in range(100):
        mask = masks.draw_mask(height, width, generator)
        assert mask.shape == (height, width, 1)
        assert mask.dtype == np.float32
        assert set(np.unique(mask)) == {0.0, 1.0}
        assert 0.01 <= mask.mean() <= 0.95


def test_a_generator_in_the_same_state_draws_the_same_mask():
    first, again, other = (masks.draw_mask(64, 64, np.random.default_rng(s)) for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_half_of_the_masks_are_boxes():
    generator = np.random.default_rng(0)
    drawn = [masks.draw_mask(256, 256, generator)[..., 0] for _ in range(300)]
    assert np.mean([made_of_boxes(mask) for mask in drawn]) == pytest.approx(0.5, abs=0.08)


def test_coverage_is_that_of_lama():
    """Its own generator, on 4000 masks: strokes 0.460, boxes 0.244."""
    generator = np.random.default_rng(0)
    for draw, mean in ((masks.draw_strokes, 0.460), (masks.draw_boxes, 0.244)):
        covered = [draw(256, 256, generator).mean() for _ in range(500)]
        assert np.mean(covered) == pytest.approx(mean, abs=0.035)
        small = [draw(64, 64, generator).mean() for _ in range(500)]
        assert np.mean(small) == pytest.approx(mean, abs=0.05)


@pytest.mark.parametrize("side", [256, 32])
def test_a_stroke_is_one_connected_chain(side):
    generator = np.random.default_rng(0)
    for i in range(100):
        image = Image.new("L", (side, side))
        masks.draw_stroke(image, generator, mirrored=i % 2 == 0)
        assert ndimage.label(np.asarray(image), np.ones((3, 3)))[1] == 1


def test_strokes_are_as_thick_as_a_brush_and_at_most_six():
    generator = np.random.default_rng(0)
    widest = []
    for _ in range(200):
        mask = masks.draw_strokes(256, 256, generator)
        parts, count = ndimage.label(mask, np.ones((3, 3)))
        assert 1 <= count <= 6
        widest.append(2 * ndimage.distance_transform_edt(np.pad(mask, 1)).max())
    assert min(widest) >= 4
    assert np.median(widest) > 60  # brushes of 5 to 104 pixels, crossing


def test_boxes_keep_off_the_border_and_to_their_sides():
    generator = np.random.default_rng(0)
    sides = []
    for _ in range(300):
        mask = masks.draw_boxes(256, 256, generator)
        assert not mask[:10].any()
        assert not mask[-10:].any()
        assert not mask[:, :10].any()
        assert not mask[:, -10:].any()
        assert made_of_boxes(mask)
        parts, count = ndimage.label(mask)
        assert 1 <= count <= 4
        for index, found in enumerate(ndimage.find_objects(parts)):
            if (parts[found] == index + 1).all():  # alone, not a union
                sides += [found[0].stop - found[0].start, found[1].stop - found[1].start]
    assert min(sides) == 30
    assert 140 <= max(sides) <= 150


@pytest.mark.parametrize("height, width", [(1, 1), (8, 5000)])
def test_sizes_that_no_mask_fits_are_refused(height, width):
    with pytest.raises(UserError, match=f"{height} x {width} pixels"):
        masks.draw_mask(height, width, np.random.default_rng(0))
