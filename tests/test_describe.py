"""Counts equal the published ones, FLOPs and bytes what they should be, with nothing allocated."""

import json

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.describe import arrays, count, describe, flops, table
from latent_diffusion_jax.nn.attend import choose_form, dot_product_attention
from latent_diffusion_jax.train.sharding import bytes_per_device, make_mesh

DIFFUSION, FIRST_STAGE = "configs/diffusion/shapes.py", "configs/first_stage/shapes.py"
VQ_F4 = dict(
    kind="vq",
    codebook_size=8192,
    channels=128,
    channel_mult=(1, 2, 4),
    num_res_blocks=2,
    z_channels=3,
    embed_dim=3,
)
KL_F8 = dict(
    kind="kl", channels=128, channel_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4, embed_dim=4
)
CELEBA256 = dict(
    model_channels=224,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=2,
    attention_resolutions=(2, 4, 8),
    num_head_channels=32,
)
CIN256_V2 = dict(
    model_channels=192,
    channel_mult=(1, 2, 3, 5),
    num_res_blocks=2,
    attention_resolutions=(2, 4, 8),
    num_heads=1,
    transformer_depth=1,
)


SMALL = ["--config.latents.source=cache", "--config.unet.channel_mult=1"]


def with_sections(spec, **sections):
    config = load_config(spec)
    for name, section in sections.items():
        config[name] = ConfigDict(section)
    return config


def published(unet, conditioning):
    config = with_sections(
        DIFFUSION,
        first_stage=VQ_F4,
        unet=unet,
        conditioning=conditioning,
        latents=dict(source="cache"),
    )
    config.data.image_size = 256
    return config


@pytest.mark.parametrize(
    "config,expected",
    [
        (published(CELEBA256, dict(kind="none")), {"unet": 274_056_163}),
        (
            published(CIN256_V2, dict(kind="label", num_classes=1000, dim=512)),
            {"unet": 400_920_579, "conditioning": 512_512},
        ),
        (with_sections(FIRST_STAGE, first_stage=KL_F8), {"autoencoder": 83_653_863}),
        (with_sections(FIRST_STAGE, first_stage=VQ_F4), {"autoencoder": 55_322_782}),
    ],
)
def test_published_counts(config, expected):
    shapes = jax.eval_shape(build.init_params(config), jax.random.key(0))
    assert {name: count(tree) for name, tree in shapes.items()} == expected


@pytest.fixture(scope="module")
def tiny():
    """Batch of 8 on 8 devices, latents cached."""
    config = load_config(f"{DIFFUSION}:tiny", SMALL)
    return config, describe(config)


def test_facts_of_a_config(tiny):
    config, facts = tiny
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["phase"], facts["image"], facts["latent"], facts["f"]) == (
        "diffusion",
        [32, 32, 3],
        [8, 8, 4],
        4,
    )
    about = facts["parameters"]
    assert {name: part["trained"] for name, part in about.items()} == {
        "unet": True,
        "conditioning": True,
        "first_stage": False,
    }
    for part in about.values():
        assert part["total"] == sum(part["parts"].values()) > 0
    trained = about["unet"]["total"] + about["conditioning"]["total"]
    of_state = facts["bytes_of_state_per_device"]
    assert of_state["parameters"] == 4 * trained
    assert of_state["ema"] == 4 * about["unet"]["total"]
    assert 0 <= of_state["optimizer"] - 8 * trained <= 16  # Adam's two moments, and its counters
    assert of_state["frozen"] == 4 * (about["first_stage"]["total"] + 1)  # the latent scale
    text = table(facts)
    assert f"{about['unet']['total']:,}" in text
    assert "8 x 8 x 4 (f = 4)" in text
    assert "unet/input_blocks.0.0/kernel" in arrays(config)


def test_a_step_costs_three_forward_passes(tiny):
    """Backward is twice forward; Adam and the averages add a little per parameter."""
    _, facts = tiny
    forward = 8 * facts["flops_forward_per_image"]["unet"]
    assert 2.7 < facts["flops_per_step"] / forward < 3.5


def test_attention_that_takes_turns_is_counted_whole(monkeypatch):
    """Twice the positions, four times the FLOPs: also where a loop runs over queries or heads."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def of(n, form):
        assert choose_form("cpu", jnp.float32, 8, n, n, 40) == form
        x = jax.ShapeDtypeStruct((1, n, 8, 40), jnp.float32)
        return flops(dot_product_attention, x, x, x)

    few = of(256, "heads_first")
    assert few >= 2 * 2 * 8 * 40 * 256**2  # scores and sums of values, 2 per multiply-add
    assert of(4096, "head_by_head") / few == pytest.approx(16**2, rel=0.01)
    assert of(32768, "chunked") / few == pytest.approx(128**2, rel=0.01)


def test_accumulation_costs_the_same(tiny):
    _, facts = tiny
    halves = describe(load_config(f"{DIFFUSION}:tiny", [*SMALL, "--config.train.accumulate=2"]))
    assert abs(halves["flops_per_step"] / facts["flops_per_step"] - 1) < 0.1


def test_fsdp_divides_the_bytes_of_large_arrays():
    tree = {
        name: jax.ShapeDtypeStruct(shape, "float32")
        for name, shape in {"kernel": (3, 3, 256, 512), "bias": (512,)}.items()
    }
    assert bytes_per_device(tree, make_mesh(fsdp=1)) == 4 * (9 * 256 * 512 + 512)
    assert bytes_per_device(tree, make_mesh(fsdp=4)) == 4 * (9 * 256 * 128 + 512)


def test_nothing_is_allocated():
    """A network of terabytes, which no machine that runs this test could hold."""
    config = load_config(f"{DIFFUSION}:tiny")
    config.unet.model_channels, config.unet.channel_mult = 2**17, (1,)
    before = sum(x.nbytes for x in jax.live_arrays())
    facts = describe(config)
    assert facts["bytes_of_state_per_device"]["parameters"] > 2**42
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 2**20
