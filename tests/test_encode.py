"""What `encode` stores, and that training on it is training on the images and captions."""

import json

import jax
import numpy as np
import pytest

from latent_diffusion_jax import build, phases
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.data.latents import Latents
from latent_diffusion_jax.encode import encode
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.checkpoint import write_weights
from latent_diffusion_jax.train.sharding import make_mesh, put_batch
from latent_diffusion_jax.train.state import TrainState
from tests.cli import ROOT
from tests.test_build import random_params

CLIP = dict(kind="clip", max_length=6, dim=8, depth=1, num_heads=2, activation="gelu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """CLIP's, of letters alone."""
    place = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (place / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    return str(place)


@pytest.fixture(scope="module")
def config(tokenizer):
    """Captions by a frozen text encoder; images that are mirrored."""
    config = load_config(
        f"{ROOT}/configs/diffusion/shapes.py:tiny",
        [
            *("--config.first_stage.channels=8", "--config.first_stage.num_groups=4"),
            *("--config.data.source.size=20", "--config.data.flip=True"),
            *("--config.unet.channel_mult=(1,)", "--config.unet.attention_resolutions=(1,)"),
            *("--config.latents.scale=0.5", "--config.latents.source=cache"),
            *("--config.latents.variants=3", "--config.diffusion.condition_dropout=0.5"),
            *("--config.sample.steps=2", "--config.sample.scale=3.0"),
        ],
    )
    with config.unlocked():
        config.data.tokenizer = tokenizer
        config.conditioning = CLIP
    return config


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


@pytest.fixture(scope="module")
def workdir(config, mesh, tmp_path_factory):
    """One with random networks, encoded."""
    place = tmp_path_factory.mktemp("encode")
    stage, conditioner = build.first_stage(config), build.conditioner(config)
    write_weights(f"{place}/first_stage", {"autoencoder": random_params(stage.init)}, {}, {})
    text = random_params(conditioner.init)
    write_weights(f"{place}/conditioning", {"conditioning": text}, {}, {})
    encode(config, str(place), mesh)
    return place


def test_every_variant_is_the_image_as_it_was_cut(config, workdir, mesh):
    cache = Latents(directory=workdir / "latents" / "train")
    assert (cache.variants, len(cache), cache.null.keys()) == (3, 20, {"context"})
    frozen = phases.prepare_frozen(config, str(workdir), mesh)
    stage, source = build.first_stage(config), build.source(config, "train")
    images = np.stack([source[i]["image"] for i in range(8)]).astype(np.float32) / 127.5 - 1
    both = [
        np.asarray(jax.jit(stage.encode)(frozen["first_stage"], x))
        for x in (images, images[:, :, ::-1])
    ]
    mirrored = []
    for variant in range(3):
        moments = cache.fetch(np.arange(8), np.full(8, variant))["moments"]
        far = [np.abs(moments - each).max(axis=(1, 2, 3)) for each in both]
        np.testing.assert_allclose(np.minimum(*far), 0, atol=1e-4)
        mirrored.append(far[1] < far[0])
    assert 0 < np.mean(mirrored) < 1
    assert len(np.unique(mirrored, axis=0)) > 1
    validation = Latents(directory=workdir / "latents" / "validation")
    assert validation.variants == 1


def make_loss(config, frozen, mesh):
    """(params, batch) -> the loss in training, compiled."""
    train = build.criterion(config).gradients[0]

    @jax.jit
    def loss(params, frozen, batch):
        return train(params, {}, frozen, batch, jax.random.key(0), 0)[2]["loss"]

    return lambda params, batch: float(loss(params, frozen, put_batch(mesh, batch)))


def test_training_on_stored_texts_is_training_on_captions(config, workdir, mesh):
    """The same loss of the same images, half of the captions dropped, without the encoder."""
    phase = phases.make_phase(config, str(workdir), mesh)
    assert phase.frozen["conditioning"].keys() == {"null"}
    shapes = {name: value.shape for name, value in next(phase.batches).items()}
    assert shapes == {"moments": (8, 8, 8, 8), "context": (8, 6, 8)}
    stored = Latents(directory=workdir / "latents" / "validation").fetch(np.arange(8))
    params = random_params(build.init_params(config))
    loss = make_loss(config, phase.frozen, mesh)
    ours = loss(params, stored)
    other_texts = {**stored, "context": -stored["context"]}
    assert abs(loss(params, other_texts) / ours - 1) > 1e-5

    online = config.copy_and_resolve_references()
    online.latents.source = "online"
    frozen = phases.prepare_frozen(online, str(workdir), mesh)
    frozen["latent_scale"] = np.float32(0.5)
    batch = phases.first_examples(online, build.source(online, "validation"), 8)
    assert batch.keys() == {"image", "tokens"}
    np.testing.assert_allclose(make_loss(online, frozen, mesh)(params, batch), ours, rtol=1e-6)


def test_pictures_and_validation_need_no_encoder(config, workdir, mesh):
    phase = phases.make_phase(config, str(workdir), mesh)
    params = random_params(build.init_params(config))
    state = TrainState(np.int32(0), params, (), {}, {})
    assert np.isfinite(phase.evaluate(state)["validation_loss"])
    assert np.isfinite(phase.visualise(state, 1)["samples"]).all()


def test_another_encoder_or_number_is_refused(config, workdir, mesh, tmp_path):
    for name in ("first_stage", "latents"):
        (tmp_path / name).symlink_to(workdir / name)
    text = random_params(build.conditioner(config).init)
    text["transformer"]["text_model.final_layer_norm"]["bias"][0] += 1
    write_weights(f"{tmp_path}/conditioning", {"conditioning": text}, {}, {})
    with pytest.raises(UserError, match=r"conditioning_weights: \d+ here, \d+ in the cache: run"):
        phases.make_phase(config, str(tmp_path), mesh)
    other = config.copy_and_resolve_references()
    other.latents.variants = 2
    with pytest.raises(UserError, match="variants: 2 here, 3 in the cache: run `encode`"):
        phases.make_phase(other, str(workdir), mesh)
    other.latents.variants = 0
    with pytest.raises(UserError, match="latents.variants 0 must be at least 1"):
        encode(other, str(workdir), mesh)
