"""What sampling can do beyond a sampler and guidance, on networks with random weights."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax import build, pipeline, sampling
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.products import traced_for
from latent_diffusion_jax.train import sharding
from latent_diffusion_jax.train.sharding import make_mesh
from tests import models


def trained(task):
    return models.trained(f"diffusion/shapes64.py:{task},tiny")


MESH = make_mesh()


def images_of(task="unconditional", inputs=None, number=2, seed=0, **changes):
    model = trained(task)
    extras = {k: changes.pop(k) for k in list(changes) if k in sampling.Extras._fields}
    options = {**model.config.sample, "steps": 2, **changes}
    batches = sampling.generate(
        model,
        MESH,
        inputs=inputs or {},
        number=number,
        batch=8,
        seed=seed,
        extras=sampling.Extras(**extras),
        **options,
    )
    return np.concatenate(list(batches))


@pytest.fixture
def compilations(caplog):
    """The names of the functions that XLA compiles from here on."""

    def names():
        lines = [r.getMessage() for r in caplog.records if "Finished XLA comp" in r.getMessage()]
        return [line.split("jit(")[1].split(")")[0] for line in lines]

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield names


def test_one_program_serves_every_prompt_seed_and_scale(compilations):
    """A full run compiles the sampler once: four batches, other tokens, seeds and scales too."""
    model = trained("text")
    compiled = sampling.make_generate(model.config, MESH, **{**model.config.sample, "steps": 2})
    tokens = np.random.default_rng(0).integers(0, 600, (16, 24)).astype(np.int32)
    for seed, rows in ((0, tokens[:8]), (1, tokens[8:])):
        key = jax.random.key(seed)
        compiled(model.params, model.frozen, {"tokens": rows}, key, np.arange(8))
    assert compilations().count("generate") == 1
    images_of("text", {"tokens": np.concatenate([tokens, tokens])}, number=27, scale=3.0)
    assert compilations().count("generate") == 2  # a run of its own, of four batches
    images_of("text", {"tokens": tokens}, number=16, steps=3)
    assert compilations().count("generate") == 3


RNG = np.random.default_rng(0)
CAPTIONS = {"tokens": RNG.integers(0, 600, (2, 24)).astype(np.int32)}
MAPS = {"segmentation": RNG.integers(0, 13, (2, 64, 64)).astype(np.int32)}


@pytest.mark.parametrize(
    ("spec", "inputs"),
    [
        ("shapes64.py:text,tiny", CAPTIONS),
        ("shapes64.py:semantic,tiny", MAPS),
        ("celebahq256.py:tiny", {}),  # VQ
    ],
)
def test_kernels_cast_once_make_the_same_images(spec, inputs):
    """As accelerators compute; on CPUs some layers stay float32, and get rounded kernels."""
    model = models.trained(f"diffusion/{spec}", "--config.dtype=bfloat16")
    once = pipeline.in_compute_dtype(model)
    options = {**model.config.sample, "steps": 2}
    with traced_for("gpu"):
        run = sampling.make_generate(model.config, make_mesh(data=1), **options)
        images = [
            run(each.params, each.frozen, inputs, jax.random.key(0), np.arange(2))
            for each in (model, once)
        ]
    np.testing.assert_array_equal(*images)
    assert np.ptp(images[0]) > 0.1
    dtypes = {
        (path[0].key, x.dtype.name)
        for path, x in jax.tree.leaves_with_path({**once.params, **once.frozen})
        if path[-1].key == "kernel"
    }
    own = {("conditioning", "float32")} & dtypes
    assert dtypes - own == {("unet", "bfloat16"), ("first_stage", "bfloat16")}
    others = [
        x.dtype for path, x in jax.tree.leaves_with_path(once.params) if path[-1].key != "kernel"
    ]
    assert set(others) == {jnp.dtype("float32")}


@pytest.fixture(scope="module")
def photo():
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)


def test_known_pixels_stay_and_the_hole_does_not(photo):
    hole = np.zeros((2, 64, 64, 1), np.float32)
    hole[:, 10:50, 20:] = 1
    out = images_of(inputs={"start": photo, "hole": hole})
    known = np.broadcast_to(hole == 0, photo.shape)
    np.testing.assert_array_equal(out[known], photo[known])
    assert np.abs(out[~known] - photo[~known]).mean() > 0.1


def test_strength_says_how_much_of_an_image_is_left(photo):
    model = trained("unconditional")
    stage = build.first_stage(model.config)
    autoencoder = model.frozen["first_stage"]
    plain = stage.decode(autoencoder, stage.mode(stage.encode(autoencoder, photo)))
    far = [
        np.abs(images_of(inputs={"start": photo}, steps=20, strength=s, options={}) - plain).mean()
        for s in (0.05, 0.5, 1.0)
    ]
    assert far[0] < far[1] < far[2]


def test_interpolation_begins_and_ends_at_images_of_the_seed():
    ends = images_of(number=2, options={"eta": 0.0})
    weights = np.linspace(0, 1, 5, dtype=np.float32)
    between = images_of(inputs={"between": weights}, number=5, options={"eta": 0.0})
    np.testing.assert_allclose(between[[0, -1]], ends, atol=2e-4)
    steps = np.abs(np.diff(between, axis=0)).mean(axis=(1, 2, 3))
    assert steps.max() < np.abs(ends[0] - ends[1]).mean()


def test_a_guide_draws_samples_to_it(photo):
    small = photo.reshape(2, 8, 8, 8, 8, 3).mean(axis=(2, 4)) * 3  # one that is not all but grey

    def distance(scale):
        images = images_of(inputs={"guide": small}, steps=10, guide_scale=scale)
        seen = np.asarray(jax.image.resize(images, small.shape, "cubic"))
        return np.square(seen - small).sum()

    assert distance(0.01) < distance(0.0)


def test_windows_and_tiles_at_another_size():
    whole = images_of(size=(64, 96), window=96, tile=96)
    np.testing.assert_allclose(whole, images_of(size=(64, 96)), atol=2e-4)  # all fits into one
    parts = images_of(size=(64, 96), window=64, tile=32)
    assert parts.shape == (2, 64, 96, 3)
    assert not np.allclose(parts, whole, atol=0.05)
    for name in ("window", "tile"):
        with pytest.raises(UserError, match=f"--{name}=30 must be a multiple of 8 pixels"):
            images_of(**{name: 30})


def test_windows_cut_what_is_concatenated_too():
    low = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    out = images_of("superres", {"lowres": low}, size=(64, 96), window=64)
    other = images_of("superres", {"lowres": -low}, size=(64, 96), window=64)
    assert out.shape == (2, 64, 96, 3)
    assert np.abs(out - other).mean() > 1e-3


def test_weights_that_lie_split_give_the_images_of_one_device(monkeypatch):
    monkeypatch.setattr(sharding.state_shardings, "__defaults__", (64,))
    model = trained("unconditional")
    options = {**model.config.sample, "steps": 2, "extras": sampling.Extras(window=32)}

    def images(mesh):
        generate = sampling.make_generate(model.config, mesh, **options)
        weights = sharding.put_tree(mesh, (model.params, model.frozen))
        return np.asarray(generate(*weights, {}, jax.random.key(0), np.arange(8)))

    split = images(make_mesh(data=2, fsdp=4))
    np.testing.assert_allclose(split, images(make_mesh(data=1)), atol=1e-5)


def test_an_interval_of_no_step_is_no_guidance():
    tokens = np.random.default_rng(0).integers(0, 600, (2, 24)).astype(np.int32)
    plain, guided, outside, inside = (
        images_of("text", {"tokens": tokens}, **options)
        for options in (
            dict(scale=1.0),
            dict(scale=4.0),
            dict(scale=4.0, interval=(1000, 1001)),
            dict(scale=4.0, interval=(0, 1000)),
        )
    )
    np.testing.assert_allclose(outside, plain, atol=2e-4)
    np.testing.assert_allclose(inside, guided, atol=2e-4)
    assert np.abs(plain - guided).mean() > 1e-4


def test_dynamic_thresholding_acts_on_what_is_beyond_the_range_of_data(monkeypatch):
    plain = images_of()
    monkeypatch.setattr(sampling, "THRESHOLD_FLOOR", 1e6)  # nothing is
    np.testing.assert_allclose(images_of(threshold=0.5), plain, atol=2e-4)
    monkeypatch.setattr(sampling, "THRESHOLD_FLOOR", 0.1)
    assert np.abs(images_of(threshold=0.5) - plain).mean() > 0.01


def test_names_of_files_are_those_of_the_inputs(tmp_path):
    images = np.zeros((4, 8, 8, 3), np.float32)
    names = ["a", "b", "a", "a_1"]
    pipeline.write_samples(tmp_path, iter([images]), 4, None, {}, names)
    written = {path.name for path in tmp_path.glob("*.png")}
    assert written == {"a.png", "b.png", "a_1.png", "a_1_1.png", "grid.png"}
    assert np.asarray(Image.open(tmp_path / "a.png")).shape == (8, 8, 3)
