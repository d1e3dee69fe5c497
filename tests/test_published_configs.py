"""Configs of published models build the published networks: counts, checkpoint keys, settings.

Networks are traced from shapes, each distinct one once; nothing is allocated.
"""

import inspect
import json
import math
import zlib
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax.core import Scope

from configs.diffusion import celebahq_sweep, imagenet_sweep
from latent_diffusion_jax import build
from latent_diffusion_jax.config import load_config, to_json
from tests.published import GOLDEN, named

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = [
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for path in sorted(CONFIGS.glob("*/*.py"))
    if "from configs import published" in path.read_text()
]
ARGUMENTS = {
    "diffusion/celebahq_sweep": tuple(celebahq_sweep.COLUMNS),
    "diffusion/imagenet_sweep": tuple(imagenet_sweep.COLUMNS),
    "diffusion/inpainting256": ("noattn", "kl", "pixels"),
    "diffusion/inpainting_big": ("512",),
}
SPECS = [f"{file}:{arg}" for file in FILES for arg in ("", *ARGUMENTS.get(file, ()))]

MODELS = json.loads((GOLDEN / "parameters.json").read_text())["models"]
SHIPPED = {
    "first_stage/kl_f4": "kl-f4",
    "first_stage/kl_f8": "kl-f8",
    "first_stage/kl_f16": "kl-f16",
    "first_stage/kl_f32": "kl-f32",
    "first_stage/vq_f4": "vq-f4",
    "first_stage/vq_f4_noattn": "vq-f4-noattn",
    "first_stage/vq_f8": "vq-f8",
    "first_stage/vq_f8_n256": "vq-f8-n256",
    "first_stage/vq_f16": "vq-f16",
    "diffusion/celebahq256": "celeba256",
    "diffusion/ffhq256": "ffhq256",
    "diffusion/lsun_bedrooms256": "lsun_beds256",
    "diffusion/lsun_churches256": "lsun_churches256",
    "diffusion/imagenet256": "cin256-v2",
    "diffusion/imagenet256_f8": "cin256",
    "diffusion/text256": "txt2img-1p4B-eval",
    "diffusion/text2img256": "text2img256",
    "diffusion/layout256": "layout2img-openimages256",
    "diffusion/semantic256": "semantic_synthesis256",
    "diffusion/semantic512": "semantic_synthesis512",
    "diffusion/superres_bsr": "bsr_sr",
    "diffusion/inpainting_big": "inpainting_big",
    "diffusion/retrieval768": "768x768",
    "diffusion/sd1": "stable-diffusion-v1",
    "diffusion/sd2_base": "stable-diffusion-v2",
    "diffusion/sd2": "stable-diffusion-v2",
}
# Millions as printed in the paper, and what they count. Two are left out that no reading gives:
# 260 of the CelebA-HQ sweep's LDM-16 and 391 of the ImageNet sweep's LDM-4; see the docstrings.
UNET, WITH_CONDITIONING, WITH_FIRST_STAGE = (
    ("unet",),
    ("unet", "conditioning"),
    ("unet", "first_stage"),
)
PRINTED = {
    "diffusion/celebahq256:": (274, UNET),
    "diffusion/ffhq256:": (274, UNET),
    "diffusion/lsun_churches256:": (294, UNET),
    "diffusion/lsun_bedrooms256:": (274, UNET),
    "diffusion/celebahq_sweep:1": (270, UNET),
    "diffusion/celebahq_sweep:2": (265, UNET),
    "diffusion/celebahq_sweep:4": (274, UNET),
    "diffusion/celebahq_sweep:8": (258, UNET),
    "diffusion/celebahq_sweep:32": (258, UNET),
    "diffusion/imagenet_sweep:1": (396, UNET),
    "diffusion/imagenet_sweep:2": (391, UNET),
    "diffusion/imagenet_sweep:8": (395, UNET),
    "diffusion/imagenet_sweep:16": (395, UNET),
    "diffusion/imagenet_sweep:32": (395, UNET),
    "diffusion/imagenet256:": (400, UNET),
    "diffusion/imagenet256_f8:": (395, UNET),
    "diffusion/layout256:": (306, WITH_CONDITIONING),
    "diffusion/layout_coco256:": (345, WITH_CONDITIONING),
    "diffusion/superres_bicubic:": (169, WITH_FIRST_STAGE),
    "diffusion/inpainting256:": (215, UNET),
    "diffusion/inpainting256:noattn": (215, UNET),
    "diffusion/inpainting256:kl": (215, UNET),
    "diffusion/inpainting256:pixels": (215, UNET),
    "diffusion/inpainting_big:": (387, UNET),
    "diffusion/semantic256:": (215, UNET),
}
TRACED: dict[str, object] = {}


@pytest.fixture(autouse=True, scope="module")
def zeros():
    """Parameters start at zero here: to trace their random numbers takes half of the time."""

    def param(self, name, init_fn, *args, **kwargs):
        return original(self, name, lambda key, shape, dtype=None: jnp.zeros(shape, dtype), *args)

    original = Scope.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scope, "param", param)
        yield


@cache
def config_of(spec):
    return load_config(f"{CONFIGS}/{spec.replace(':', '.py:', 1)}")


def once(trace, *follows_from):
    """A trace's result, made once for each content of what it follows from."""
    text = json.dumps(follows_from, sort_keys=True)
    if text not in TRACED:
        TRACED[text] = trace()
    return TRACED[text]


def plain(section):
    return json.loads(section.to_json())


def networks(config):
    """Shapes of each network's parameters."""
    config = config.copy_and_resolve_references()
    if "unet" in config:
        config.unet.remat = "none"  # takes longer to trace, and changes no weight
    key = jax.eval_shape(lambda: jax.random.key(0))
    stage = build.first_stage(config)
    first_stage = once(lambda: jax.eval_shape(stage.init, key), plain(config.first_stage))
    if config.phase == "first_stage":
        return {"autoencoder": first_stage}
    learned = build.conditioner(config).init
    conditioning = once(lambda: jax.eval_shape(learned, key), plain(config.conditioning))
    side = 2 ** (len(config.unet.channel_mult) - 1)  # weights do not depend on it
    z = jax.ShapeDtypeStruct((1, side, side, stage.channels), jnp.float32)
    cond, t = ports(config, side), jax.ShapeDtypeStruct((1,), jnp.int32)
    unet = once(
        lambda: jax.eval_shape(build.unet(config).init, key, z, t, cond)["params"],
        plain(config.unet),
        [x.shape for x in jax.tree.leaves((z, cond))],
    )
    return {"unet": unet, "first_stage": first_stage, "conditioning": conditioning}


def ports(config, side):
    """Shapes of the UNet's ports, which do not depend on the depth of a text encoder."""

    def shallow(section):
        if isinstance(section, dict):
            section = {name: shallow(value) for name, value in section.items()}
            return {**section, "depth": 1} if "depth" in section else section
        return section

    config = config.copy_and_resolve_references()
    config.conditioning = shallow(plain(config.conditioning))
    stage, conditioner = build.first_stage(config), build.conditioner(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    pixels = side * stage.factor
    inputs = {
        name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
        for name, x in conditioner.inputs(pixels, pixels).items()
    }

    def apply(params, inputs):
        latent = jnp.zeros((1, side, side, stage.channels))
        return conditioner.apply(params, inputs, lambda image: latent)

    return jax.eval_shape(apply, jax.eval_shape(conditioner.init, key), inputs)


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def seal(tree):
    """Parameters, keys and their checksum as golden/parameters.json has them."""
    kernels = {
        ".".join([*(entry.key for entry in path[:-1]), "weight"])
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
        if path[-1].key == "kernel"
    }
    lines = []
    for key, leaf in named(tree).items():
        shape = leaf.shape
        if key in kernels:  # torch: [out, in, ...]
            shape = (shape[-1], shape[-2], *shape[:-2])
        lines.append(f"{key} {'x'.join(map(str, shape))}\n")
    text = "".join(sorted(lines))
    return {"parameters": count(tree), "keys": len(lines), "crc32": zlib.crc32(text.encode())}


@pytest.mark.parametrize("file", SHIPPED)
def test_counts_and_keys_are_the_checkpoints(file):
    published = MODELS[SHIPPED[file]]
    trees = networks(config_of(f"{file}:"))
    for name, tree in trees.items():
        facts, expected = seal(tree), published.get(name, {"parameters": 0})
        assert {fact: facts[fact] for fact in expected} == expected, name
    total = sum(count(tree) for tree in trees.values())
    assert published.get("total", total) == total


@pytest.mark.parametrize("file", SHIPPED)
def test_settings_are_the_checkpoints(file):
    settings = MODELS[SHIPPED[file]]["settings"]
    config = config_of(f"{file}:")
    ours = {"batch_size": config.train.batch_size, "image_size": config.data.image_size}
    if config.phase == "first_stage":
        ours["kl_weight"] = config.loss.get("kl_weight")
    else:
        schedule = config.diffusion.schedule
        ours |= {
            "linear": [schedule.linear_start, schedule.linear_end],
            "loss": config.diffusion.loss,
            "scale_factor": config.latents.scale,
        }
    assert config.phase == "first_stage" or config.train.ema_networks == ("unet",)
    expected = {k: v for k, v in settings.items() if k not in ("base_learning_rate", "use_ema")}
    assert {name: ours[name] for name in expected} == expected
    if "batch_size" in expected:
        base, batch = settings["base_learning_rate"], settings["batch_size"]
        scaled = base if file == "diffusion/lsun_churches256" else base * batch  # see there
        assert config.optim.lr == pytest.approx(scaled, rel=1e-9)


@pytest.mark.parametrize("spec", SPECS)
def test_stated_counts_are_those_of_the_networks(spec):
    config = config_of(spec)
    stated = dict(config.published.get("parameters", {}))
    if stated:
        trees = networks(config)
        assert {name: count(trees[name]) for name in stated} == stated
    assert set(stated) <= {"autoencoder", "unet", "first_stage", "conditioning"}
    assert {"task", "data", "source"} <= set(config.published)


@pytest.mark.parametrize("spec", PRINTED)
def test_counts_are_those_printed_in_the_paper(spec):
    """Which prints some rounded and some cut off."""
    millions, counted = PRINTED[spec]
    trees = networks(config_of(spec))
    assert abs(sum(count(trees[name]) for name in counted) - 1e6 * millions) < 1e6


def test_the_text_model_has_1_45_billion():
    trees = networks(config_of("diffusion/text256:"))
    assert round(count((trees["unet"], trees["conditioning"])) / 1e7) == 145


@pytest.mark.parametrize("file", FILES)
def test_tiny_has_the_same_parts_and_builds(file):
    full, tiny = config_of(f"{file}:"), config_of(f"{file}:tiny")
    assert set(tiny) == set(full)
    for section in ("first_stage", "conditioning", "unet"):
        if section in full:
            assert set(full[section]) <= set(tiny[section])
    objective = build.objective(tiny)
    parts = [plain(tiny[name]) for name in ("first_stage", "conditioning", "unet") if name in tiny]
    state = once(
        lambda: jax.eval_shape(objective.init, jax.random.key(0)),
        *parts,
        tiny.optim.name,
        tiny.train.ema_networks,
    )
    assert count(state.params) < 1e6
    assert set(state.ema) == set(tiny.train.ema_networks)


@pytest.mark.parametrize("spec", SPECS)
def test_variants_are_sound(spec):
    """Their JSON, which workdirs keep, holds plain values; latents fit the UNet."""
    config = config_of(spec)
    assert json.loads(to_json(config))["published"]
    side, _, channels = build.latent_shape(config)
    assert side * build.first_stage(config).factor == config.data.image_size
    assert channels == build.first_stage(config).channels


@pytest.mark.parametrize("file", FILES)
def test_docstring_is_the_documentation(file):
    docstring = inspect.cleandoc((CONFIGS / f"{file}.py").read_text().split('"""')[1])
    assert f"--config=configs/{file}.py" in docstring
    assert "Not trained here." in " ".join(docstring.split())
    for argument in ("tiny", *ARGUMENTS.get(file, ())):
        assert f"`:{argument}`" in docstring


@pytest.mark.parametrize("file", FILES)
def test_the_documentation_lists_it(file):
    folder, name = file.split("/")
    assert f"| `{name}` |" in (CONFIGS.parent / "docs" / "models.md").read_text()
    if folder == "diffusion":
        assert f"| `{name}` |" in (CONFIGS.parent / "README.md").read_text()
