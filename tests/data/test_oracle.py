import numpy as np
import pytest
from PIL import Image, ImageFilter

from latent_diffusion_jax.data.shapes import Shapes
from tests.oracle import read_shape


@pytest.mark.parametrize("image_size, number", [(32, 500), (64, 200), (256, 24)])
def test_reads_the_class_back(image_size, number):
    shapes = Shapes(split="validation", image_size=image_size, seed=7)
    examples = [shapes[i] for i in range(number)]
    right = [read_shape(e["image"]).name == shapes.class_names[e["label"]] for e in examples]
    assert np.mean(right) >= 0.99


def test_reads_blurred_shapes():
    shapes = Shapes(split="validation", seed=8)
    right = []
    for i in range(100):
        image = Image.fromarray(shapes[i]["image"]).filter(ImageFilter.GaussianBlur(1))
        name = read_shape(np.asarray(image)).name
        right.append(name == shapes.class_names[shapes[i]["label"]])
    assert np.mean(right) >= 0.97


def test_sees_nothing_in_flat_images_noise_and_clutter():
    generator = np.random.default_rng(0)
    for shade in (0, 60, 255):
        assert read_shape(np.full((32, 32, 3), shade, np.uint8)).name == "none"
    for coarse in (4, 8, 16, 32) * 10:
        noise = generator.integers(0, 256, (coarse, coarse, 3)).astype(np.uint8)
        image = np.asarray(Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC))
        assert read_shape(image).name == "none"
    several = Shapes(split="train", shapes=(3, 3))
    assert all(read_shape(several[i]["image"]).name == "none" for i in range(50))


def test_sees_nothing_in_a_grey_shape_or_another_form():
    image = np.full((32, 32, 3), 30, np.uint8)
    image[8:22, 8:22] = 200
    assert read_shape(image).name == "none"
    image[8:22, 8:22] = 30
    image[13:19, 3:29] = (220, 40, 40)  # a bar
    assert read_shape(image).name == "none"
