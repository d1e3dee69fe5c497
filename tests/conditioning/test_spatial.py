import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.conditioning.spatial import (
    embeddings,
    inpainting,
    lowres,
    nearest,
    segmentation,
)
from latent_diffusion_jax.errors import UserError
from tests.published import golden, nhwc, value


def test_published_rescaler():
    a, info = golden("cond_spatial_rescaler_182to3")
    conditioner = segmentation(num_classes=182, channels=3)
    kernel = value(info["weight_key"], (3, 182, 1, 1))[:, :, 0, 0].T
    params = {"channel_mapper": {"kernel": kernel}}
    cond = conditioner.apply(params, {"segmentation": a["label_map"]})
    np.testing.assert_allclose(cond.concat, nhwc(a["out"]), rtol=0, atol=1e-7)
    assert cond.context is None


def test_no_segmentation_is_an_all_zero_map():
    conditioner = segmentation(num_classes=5, channels=3)
    null = conditioner.null({}, {"segmentation": jnp.ones((1, 8, 8), jnp.int32)})
    cond = conditioner.apply(conditioner.init(jax.random.key(0)), null)
    np.testing.assert_array_equal(cond.concat, np.zeros((1, 2, 2, 3)))


def test_odd_maps_lose_their_last_row():
    """As torch's interpolate by 1/2 does, whose samples lie between pixels 2i and 2i + 1."""
    conditioner = segmentation(num_classes=3, channels=1, halvings=1)
    params = {"channel_mapper": {"kernel": np.float32([[0], [1], [2]])}}
    maps = np.int32([[[0, 1, 2], [1, 2, 0], [2, 2, 2]]])
    cond = conditioner.apply(params, {"segmentation": maps})
    np.testing.assert_allclose(cond.concat, np.full((1, 1, 1, 1), 1.0))


def test_lowres_is_concatenated_as_it_is():
    image = np.random.default_rng(0).uniform(-1, 1, (2, 4, 6, 3)).astype(np.float32)
    conditioner = lowres(factor=4)
    np.testing.assert_array_equal(conditioner.apply({}, {"lowres": image}).concat, image)
    assert conditioner.inputs(16, 24)["lowres"].shape == (4, 6, 3)
    np.testing.assert_array_equal(conditioner.null({}, {"lowres": image})["lowres"], 0 * image)


def test_ldm_inpainting_as_published():
    """FACTS of the original: masked pixels black, mask -1 outside and 1 in the hole, after z."""
    image = np.full((1, 8, 8, 3), 0.5, np.float32)
    mask = np.zeros((1, 8, 8, 1), np.float32)
    mask[:, 4:] = 0.7
    seen = {}

    def to_latent(x):
        seen["image"] = x
        return x[:, ::4, ::4]

    inputs = {"image_to_fill": image, "mask": mask}
    concat = inpainting(mask="ldm").apply({}, inputs, to_latent).concat
    np.testing.assert_array_equal(seen["image"][0, :, 0, 0], [0.5] * 4 + [-1] * 4)
    assert concat.shape == (1, 2, 2, 4)
    np.testing.assert_array_equal(concat[0, :, 0, 3], [-1, 1])

    concat = inpainting(mask="stable_diffusion").apply({}, inputs, to_latent).concat
    np.testing.assert_array_equal(seen["image"][0, :, 0, 0], [0.5] * 4 + [0] * 4)
    np.testing.assert_array_equal(concat[0, :, 0, 0], [0, 1])


def test_unknown_mask_names_the_choices():
    with pytest.raises(UserError, match="'sd'; one of ldm, stable_diffusion"):
        inpainting(mask="sd")


def test_nearest_is_torchs():
    x = np.arange(7)[None, :, None, None]
    np.testing.assert_array_equal(nearest(x, 3, 1)[0, :, 0, 0], [0, 2, 4])


def test_embeddings_are_the_context():
    x = np.ones((2, 4, 8), np.float32)
    conditioner = embeddings(number=4, dim=8)
    np.testing.assert_array_equal(conditioner.apply({}, {"embeddings": x}).context, x)
    assert not conditioner.null({}, {"embeddings": x})["embeddings"].any()
