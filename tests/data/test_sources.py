import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.data.sources import SOURCES, make_source
from latent_diffusion_jax.errors import UserError


def test_makes_a_source_by_name(tmp_path):
    shapes = make_source(name="shapes", split="validation", size=5, image_size=40)
    assert (len(shapes), shapes[4]["image"].shape) == (5, (40, 40, 3))
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    folder = make_source(name="folder", split="train", path=tmp_path, validation_fraction=0.0)
    np.testing.assert_array_equal(folder[0]["image"], np.zeros((3, 3, 3)))


def test_faults_name_the_value_and_the_choices():
    with pytest.raises(UserError, match="unknown data source 'shape'.*'shapes'.*array_record"):
        make_source(name="shape", split="train")
    with pytest.raises(UserError, match="unknown split 'test'"):
        make_source(name="shapes", split="test")
    with pytest.raises(UserError, match="unexpected keyword argument 'siez'.*image_size, size"):
        make_source(name="shapes", split="train", siez=3)
    with pytest.raises(UserError, match="missing a required .*'path'"):
        make_source(name="folder", split="train")


@pytest.mark.parametrize("source", SOURCES.values())
def test_every_option_is_documented(source):
    import inspect

    for option in inspect.signature(source).parameters:
        assert option in source.__doc__
