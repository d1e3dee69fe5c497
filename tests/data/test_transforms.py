import io

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.data import transforms

RAMP = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def saved(image: Image.Image, kind: str = "png", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def test_rgb_is_read_as_it_is():
    np.testing.assert_array_equal(transforms.read_rgb(saved(Image.fromarray(RAMP))), RAMP)


def test_alpha_is_composited_on_white():
    image = np.zeros((1, 3, 4), np.uint8)
    image[..., 0], image[0, :, 3] = 200, (0, 255, 51)  # alpha 0, 1, 0.2
    read = transforms.read_rgb(saved(Image.fromarray(image)))
    np.testing.assert_array_equal(read[0], [[255, 255, 255], [200, 0, 0], [244, 204, 204]])


def test_transparent_palette_and_grey_alpha_are_composited():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    read = transforms.read_rgb(saved(image, transparency=0))
    np.testing.assert_array_equal(read[0], [[255, 255, 255], [40, 50, 60]])
    read = transforms.read_rgb(saved(Image.new("LA", (1, 1), (0, 0))))
    np.testing.assert_array_equal(read[0], [[255, 255, 255]])


@pytest.mark.parametrize("mode, value, expected", [("L", 77, 77), ("1", 1, 255)])
def test_grey_is_widened(mode, value, expected):
    read = transforms.read_rgb(saved(Image.new(mode, (4, 3), value)))
    np.testing.assert_array_equal(read, np.full((3, 4, 3), expected, np.uint8))


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)
    for kind in ("png", "tiff"):
        read = transforms.read_rgb(saved(Image.fromarray(grey), kind))
        np.testing.assert_array_equal(read[0, :, 1], [0, 1, 128, 255])


def test_cmyk_is_converted():
    read = transforms.read_rgb(saved(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "tiff"))
    np.testing.assert_array_equal(read, np.full((2, 2, 3), (255, 0, 0), np.uint8))


def test_exif_rotation_is_honoured():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    read = transforms.read_rgb(saved(Image.fromarray(RAMP), exif=exif))
    np.testing.assert_array_equal(read, np.rot90(RAMP, -1))


def test_squares_are_the_largest_that_fit():
    generator = np.random.default_rng(0)
    assert transforms.center_square(5, 9, generator) == (0, 2, 5)
    squares = {transforms.random_square(5, 9, generator) for _ in range(200)}
    assert squares == {(0, left, 5) for left in range(5)}


def test_crop_at_native_size_copies_pixels():
    np.testing.assert_array_equal(transforms.resize(RAMP, (0, 1, 5), 5), RAMP[:, 1:6])


def test_resize_down_averages_and_up_keeps_flat():
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = transforms.resize(checks, (0, 0, 64), 8)
    assert small.shape == (8, 8)
    assert np.abs(small.astype(int) - 127).max() <= 2  # antialiased, not subsampled
    flat = np.full((3, 5, 3), 90, np.uint8)
    np.testing.assert_array_equal(transforms.resize(flat, (0, 0, 3), 16), np.full((16, 16, 3), 90))


def test_range_round_trip_is_exact():
    levels = np.arange(256, dtype=np.uint8)
    values = transforms.to_float(levels)
    assert values.dtype == np.float32
    assert (values[0], values[-1]) == (-1, 1)
    np.testing.assert_array_equal(transforms.to_uint8(values), levels)
    np.testing.assert_array_equal(transforms.to_uint8(np.array([-3.0, 3.0])), [0, 255])


@pytest.mark.parametrize("read", [transforms.read_rgb, transforms.read_classes])
def test_too_many_pixels_are_an_oserror(read, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(OSError, match="64 pixels"):
        read(saved(Image.new("RGB", (8, 8))))


def test_image_segmentation_and_boxes_move_together():
    image, segmentation = np.zeros((8, 16, 3), np.uint8), np.zeros((8, 16), np.uint8)
    image[2:4, 5:8], segmentation[2:4, 5:8] = 255, 3
    boxes = np.array([[5 / 16, 2 / 8, 8 / 16, 4 / 8], [0, 0, 3 / 16, 1], [0, 0, 0, 0]], np.float32)
    example = {
        "image": image,
        "segmentation": segmentation,
        "boxes": boxes,
        "box_labels": np.array([2, 5, -1], np.int32),
        "caption": "a bar",
    }
    out = transforms.transform(example, (0, 4, 8), 8, flip=True)
    assert out["caption"] == "a bar"
    for plane in (out["image"][..., 0] > 0, out["segmentation"] == 3):
        expected = np.zeros((8, 8), bool)
        expected[2:4, 4:7] = True  # 5..8 - 4 = 1..4, mirrored
        np.testing.assert_array_equal(plane, expected)
    np.testing.assert_allclose(out["boxes"], [[4 / 8, 2 / 8, 7 / 8, 4 / 8], [0] * 4, [0] * 4])
    np.testing.assert_array_equal(out["box_labels"], [2, -1, -1])  # the second was cropped away
    np.testing.assert_array_equal(example["image"], image)
