"""From configs to objects: every mistake in a section is one clear line, and parts fit together."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.sharding import make_mesh

FIRST_STAGE, DIFFUSION = "configs/first_stage/shapes.py", "configs/diffusion/shapes.py"
GAN = "configs/first_stage/kl_f4.py"


def config_of(spec, **changes):
    """The config with dotted keys (`unet__dropout`) set, new ones included."""
    config = load_config(f"{spec}:tiny")
    with config.unlocked():
        for key, value in changes.items():
            *sections, name = key.split("__")
            target = config
            for section in sections:
                target = target[section]
            if value is None:
                del target[name]
            else:
                target[name] = value
    return config


def mesh(config):
    return build.unpack("mesh", make_mesh, config.mesh)


OF_OTHERS = ("schedule", "kind", "batch_size", "optim")  # keys that another constructor takes
MISSPELT = [
    (FIRST_STAGE, build.first_stage, "first_stage", "chanels", "channels"),
    (FIRST_STAGE, build.criterion, "loss", "kl_wieght", "kl_weight"),
    (GAN, build.criterion, "discriminator", "num_layer", "num_layers"),
    (GAN, build.objective, "discriminator.optim", "clip_nrm", "clip_norm"),
    (FIRST_STAGE, build.objective, "optim", "clip_nrm", "clip_norm"),
    (FIRST_STAGE, build.objective, "optim.schedule", "warm_up_step", "warm_up_steps"),
    (FIRST_STAGE, build.objective, "train", "acumulate", "accumulate"),
    (FIRST_STAGE, mesh, "mesh", "fdsp", "fsdp"),
    (FIRST_STAGE, lambda c: build.source(c, "train"), "data.source", "image_sise", "image_size"),
    (DIFFUSION, build.unet, "unet", "chanel_mult", "channel_mult"),
    (DIFFUSION, build.conditioner, "conditioning", "num_clases", "num_classes"),
    (DIFFUSION, build.criterion, "diffusion", "wieghting", "weighting"),
    (DIFFUSION, build.schedule, "diffusion.schedule", "linear_strat", "linear_start"),
]


@pytest.mark.parametrize("spec,make,section,key,nearest", MISSPELT)
def test_a_misspelt_key_names_itself_the_nearest_and_the_choices(spec, make, section, key, nearest):
    config = config_of(spec, **{f"{section}.{key}".replace(".", "__"): 1})
    start = f"unknown key in config.{section}: '{key}'; did you mean '{nearest}'? one of "
    with pytest.raises(UserError, match=re.escape(start)) as error:
        make(config)
    choices = str(error.value).removeprefix(start).split(", ")
    target = config
    for name in section.split("."):
        target = target[name]
    own = {name for name in target if name not in (key, *OF_OTHERS)}
    assert own <= set(choices)
    assert nearest in choices
    assert not {"parent", "options", "network", "terms"} & set(choices)


@pytest.mark.parametrize(
    "spec,make,changes,message",
    [
        (FIRST_STAGE, build.first_stage, {"first_stage__kind": "kll"}, "unknown first stage 'kll'"),
        (FIRST_STAGE, build.first_stage, {"first_stage__channels": None}, "lacks channels"),
        (FIRST_STAGE, build.first_stage, {"first_stage__kind": "vq"}, "lacks codebook_size"),
        (
            FIRST_STAGE,
            build.first_stage,
            {"first_stage__kind": "identity"},
            "'attention_levels'; one of image_channels, kind",
        ),
        (FIRST_STAGE, build.first_stage, {"first_stage__codebook_size": 8}, "no codebook"),
        (FIRST_STAGE, build.first_stage, {"data__image_size": 30}, "30 .* sizes: 28 or 32"),
        (FIRST_STAGE, build.first_stage, {"dtype": "bf16"}, "'bf16'.*bfloat16, float32"),
        (FIRST_STAGE, build.objective, {"optim__name": "adan"}, "did you mean 'adam'"),
        (FIRST_STAGE, build.objective, {"optim__lr": None}, "config.optim lacks lr"),
        (FIRST_STAGE, build.objective, {"optim__schedule__name": "cosine"}, "warmup_cosine"),
        (FIRST_STAGE, build.objective, {"phase": "difusion"}, "did you mean 'diffusion'"),
        (FIRST_STAGE, lambda c: build.source(c, "train"), {"data__source__name": "s"}, "shapes"),
        (FIRST_STAGE, build.first_stage, {"first_stage__num_groups": 3}, "num_groups = 3"),
        (DIFFUSION, build.unet, {"unet__num_groups": 7}, "8 channels .*unet.num_groups = 7"),
        (DIFFUSION, build.conditioner, {"conditioning__kind": "labels"}, "one of clip, embeddings"),
        (DIFFUSION, build.conditioner, {"conditioning__kind": "none"}, "'dim'; there are none"),
        (DIFFUSION, build.latents, {"latents__source": "cached"}, "did you mean 'cache'"),
        (DIFFUSION, build.schedule, {"diffusion__schedule__name": "lin"}, "unknown schedule 'lin'"),
        (DIFFUSION, build.unet, {"unet__model_channels": None}, "config.unet lacks model_channels"),
    ],
)
def test_other_mistakes_are_one_clear_line(spec, make, changes, message):
    with pytest.raises(UserError, match=message) as error:
        make(config_of(spec, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"unet__num_head_channels": 4}, "exactly one of"),
        ({"unet__num_heads": None}, "exactly one of"),
        ({"unet__num_heads": 3}, "16 channels do not divide by unet.num_heads = 3"),
    ],
)
def test_heads_that_do_not_fit(changes, message):
    init = build.init_params(config_of(DIFFUSION, **changes))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(init, jax.random.key(0))


def test_latents_that_the_unet_cannot_halve():
    config = config_of(DIFFUSION, unet__channel_mult=(1, 1, 1, 1, 1))
    with pytest.raises(UserError, match="8x8 .*image size 32x32, f = 4.*multiple of 64"):
        build.latent_shape(config)
    assert build.latent_shape(config_of(DIFFUSION, data__image_size=64)) == (16, 16, 4)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_latents_are_the_same_online_and_from_the_cache(kind):
    changes = dict(first_stage=load_config(f"{FIRST_STAGE}:{kind.replace('kl', '')}").first_stage)
    changes |= dict(first_stage__channels=8, data__image_size=8)
    online, cached = (
        build.latents(config_of(DIFFUSION, latents__source=source, **changes))
        for source in ("online", "cache")
    )
    stage = build.first_stage(config_of(DIFFUSION, **changes))
    image = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    frozen = {"first_stage": random_params(stage.init), "latent_scale": jnp.float32(0.5)}
    key = jax.random.key(1)
    moments = jax.jit(stage.encode)(frozen["first_stage"], image)
    z = jax.jit(online)(frozen, {"image": image}, key)
    np.testing.assert_allclose(cached(frozen, {"moments": moments}, key), z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(z, 0.5 * stage.sample(moments, key), rtol=1e-5, atol=1e-6)


def random_params(init):
    """Parameters far from the initial ones, of which many are zero."""
    random = np.random.default_rng(2)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes)


SMALL = dict(
    unet__model_channels=4,
    unet__num_groups=2,
    unet__channel_mult=(1,),
    unet__attention_resolutions=(),
    diffusion__condition_dropout=0.0,
)


def diffusion_loss(train, **changes):
    """params -> loss and gradients of a small UNet on cached latents, and its parameters."""
    config = config_of(DIFFUSION, latents__source="cache", **SMALL, **changes)
    criterion = build.criterion(config)
    moments = np.random.default_rng(3).normal(size=(2, 8, 8, 8)).astype(np.float32)
    batch = {"moments": moments, "label": np.int32([1, 2])}
    frozen = {"first_stage": {}, "latent_scale": jnp.float32(1)}

    def of(params):
        rest = frozen, batch, jax.random.key(0)
        if train:
            _, gradients, metrics = criterion.gradients[0](params, {}, *rest, 0)
            return metrics["loss"], gradients
        return criterion.evaluate(params, {}, *rest)["loss"], None

    return of, random_params(build.init_params(config))


def test_unet_dropout_acts_in_training_alone():
    def value(train, rate):
        loss, params = diffusion_loss(train, unet__dropout=rate)
        return float(jax.jit(loss)(params)[0])

    assert abs(value(True, 0.5) / value(True, 0.0) - 1) > 1e-3
    np.testing.assert_allclose(value(False, 0.5), value(True, 0.0), rtol=1e-6)


def test_remat_changes_no_gradient():
    gradients = []
    for remat in ("none", "dots"):
        loss, params = diffusion_loss(True, unet__dropout=0.5, unet__remat=remat)
        gradients.append(jax.tree.leaves(jax.jit(loss)(params)[1]))
    for plain, recomputed in zip(*gradients, strict=True):
        scale = np.abs(plain).max()
        np.testing.assert_allclose(recomputed, plain, rtol=1e-5, atol=1e-6 * scale + 1e-7)


def test_parameters_by_network():
    phase_1, phase_2 = (
        jax.eval_shape(build.init_params(config_of(spec)), jax.random.key(0))
        for spec in (FIRST_STAGE, DIFFUSION)
    )
    assert phase_1.keys() == {"autoencoder"}
    both = jax.eval_shape(build.init_params(config_of(GAN)), jax.random.key(0))
    assert both.keys() == {"autoencoder", "discriminator"}
    assert phase_2.keys() == {"unet", "conditioning"}
    unconditional = config_of(DIFFUSION, conditioning=ConfigDict(dict(kind="none")))
    assert jax.eval_shape(build.init_params(unconditional), jax.random.key(0)).keys() == {"unet"}


def test_batch_keys():
    assert build.batch_keys(config_of(FIRST_STAGE)) == ("image",)
    assert build.batch_keys(config_of(DIFFUSION)) == ("image", "label")
    assert build.batch_keys(config_of(DIFFUSION), cached=True) == ("moments", "label")


def test_shapes_are_traced_once_for_a_config(monkeypatch):
    config = config_of(DIFFUSION, seed=12345)
    shapes = build.param_shapes(config)
    frozen = build.frozen_shapes(config, training=False)
    monkeypatch.setattr(build, "init_params", None)
    monkeypatch.setattr(build, "first_stage", None)
    again = build.param_shapes(config)
    assert again == shapes
    assert build.frozen_shapes(config) == frozen
    again.clear()
    assert build.param_shapes(config) == shapes


def test_shapes_follow_the_config():
    config = config_of(DIFFUSION)
    assert build.frozen_shapes(config)["first_stage"]
    with config.unlocked():
        config.first_stage = ConfigDict({"kind": "identity"})
    assert build.frozen_shapes(config) == {"first_stage": {}}
