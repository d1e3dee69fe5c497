"""Folders of diffusers, out and in again, without diffusers or torch."""

import json

import numpy as np
import pytest

from latent_diffusion_jax.convert import diffusers
from latent_diffusion_jax.convert.diffusers import first_stage, unet_config
from latent_diffusion_jax.convert.files import open_tensors, write_tensors
from tests.convert.models import KL, MODELS, VQ, make_model


def same(read, tensors):
    assert set(read) == set(tensors)
    for key, tensor in read.items():
        array = tensor.read()
        assert tensor.shape == array.shape == tensors[key].shape, key
        assert tensor.dtype == array.dtype
        np.testing.assert_array_equal(array, tensors[key], err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again(name, tmp_path):
    config, pipeline = MODELS[name]
    model = make_model(config)
    lazy = {key: lambda array=array: array for key, array in model.tensors.items()}
    assert diffusers.export(tmp_path / "a", lazy, config) == pipeline
    assert (tmp_path / "a" / "model_index.json").exists() == (pipeline is not None)
    tensors, sections = diffusers.read(tmp_path / "a")
    same(tensors, model.tensors)
    assert sections == config


@pytest.mark.parametrize(
    "section",
    [KL, VQ, {**KL, "attention_levels": (0, 1)}, {**VQ, "mid_attention": False, "embed_dim": 2}],
)
def test_first_stage_alone(section, tmp_path):
    config = dict(phase="first_stage", first_stage=section)
    model = make_model(config)
    assert diffusers.export(tmp_path / "a", model.tensors, config) is None
    tensors, sections = diffusers.read(tmp_path / "a")
    same(tensors, model.tensors)
    assert sections == {**config, "latents": dict(scale=1.0)}


# As published: Stable Diffusion 1.5 and 2.1, LDM on CelebA-HQ.
BLOCKS = dict(
    down_block_types=[*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    up_block_types=["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    block_out_channels=[320, 640, 1280, 1280],
    _class_name="UNet2DConditionModel",
    _diffusers_version="0.6.0",
    act_fn="silu",
    center_input_sample=False,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    in_channels=4,
    layers_per_block=2,
    mid_block_scale_factor=1,
    norm_eps=1e-05,
    norm_num_groups=32,
    out_channels=4,
)
SD1 = dict(BLOCKS, attention_head_dim=8, cross_attention_dim=768, sample_size=64)
SD2 = dict(
    BLOCKS,
    attention_head_dim=[5, 10, 20, 20],
    cross_attention_dim=1024,
    dual_cross_attention=False,
    num_class_embeds=None,
    only_cross_attention=False,
    sample_size=96,
    upcast_attention=True,
    use_linear_projection=True,
)
CELEBA = dict(
    _class_name="UNet2DModel",
    act_fn="silu",
    attention_head_dim=32,
    block_out_channels=[224, 448, 672, 896],
    center_input_sample=False,
    down_block_types=["UNetResDownBlock2D", *["UNetResAttnDownBlock2D"] * 3],
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    in_channels=3,
    layers_per_block=2,
    norm_eps=1e-05,
    norm_num_groups=32,
    out_channels=3,
    sample_size=64,
    up_block_types=[*["UNetResAttnUpBlock2D"] * 3, "UNetResUpBlock2D"],
)


@pytest.mark.parametrize(
    "published,section",
    [
        (SD1, dict(num_heads=8, attention_resolutions=(1, 2, 4), transformer_depth=1)),
        (SD2, dict(num_head_channels=64, linear_projections=True, channel_mult=(1, 2, 4, 4))),
        (CELEBA, dict(num_head_channels=32, attention_resolutions=(2, 4, 8), model_channels=224)),
    ],
)
def test_published_unets(published, section):
    found, unet = unet_config.from_config(published, "x")
    assert {key: found[key] for key in section} == section
    assert unet.out_channels == published["out_channels"]


def test_published_scales():
    vq = dict(block_out_channels=[128, 256, 512], _class_name="VQModel")
    assert first_stage.scale_of(vq, "x") == 1.0
    assert first_stage.scale_of({**vq, "_class_name": "AutoencoderKL"}, "x") == 0.18215


def folder(tmp_path, name="unconditional_vq", **options):
    config, _ = MODELS[name]
    model = make_model(config)
    diffusers.export(tmp_path / "a", model.tensors, config, **options)
    return model, tmp_path / "a"


def rewrite(path, new, change=lambda key, array: (key, array)):
    """Stores a component's tensors under another file name, each one changed."""
    tensors = {key: tensor.read() for key, tensor in open_tensors(path).items()}
    place = path.with_name("new.ckpt" if new.endswith("bin") else "new.safetensors")
    write_tensors(place, dict(change(key, array) for key, array in tensors.items()))
    path.unlink()
    place.rename(path.with_name(new))


def test_weights_are_dealt_to_several_files(tmp_path):
    model, place = folder(tmp_path, max_shard_size=40_000)
    index = json.loads((place / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards == sorted(p.name for p in (place / "unet").glob("*.safetensors"))
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05}.safetensors"
    same(diffusers.read(place)[0], model.tensors)


def test_old_names_and_files(tmp_path):
    model, place = folder(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(key, array):
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        is_matrix = array.ndim == 2 and "attentions" in key and "vqvae" in str(path)
        return key, array[:, :, None, None] if is_matrix else array

    for part in ("unet", "vqvae"):
        path = place / part / "diffusion_pytorch_model.safetensors"
        rewrite(path, "diffusion_pytorch_model.bin", age)
    same(diffusers.read(place)[0], model.tensors)


def test_half_precision_and_old_clip_names(tmp_path):
    model, place = folder(tmp_path, "stable_diffusion_1")
    path = place / "text_encoder/model.safetensors"
    rewrite(path, "model.safetensors", lambda k, a: (k.removeprefix("text_model."), a))
    rewrite(path, "model.fp16.safetensors", lambda k, a: (k, a.astype(np.float16)))
    positions = np.arange(9)[None]
    extra = {"embeddings.position_ids": positions}
    stored = {k: t.read for k, t in open_tensors(path.with_name("model.fp16.safetensors")).items()}
    write_tensors(path, {**stored, **extra})
    path.with_name("model.fp16.safetensors").unlink()
    tensors, _ = diffusers.read(place)
    half = {k: a.astype(np.float16) if "cond" in k else a for k, a in model.tensors.items()}
    same(tensors, half)


def test_tokenizer_goes_along(tmp_path):
    source = tmp_path / "bert"
    source.mkdir()
    (source / "vocab.txt").write_text("[PAD]")
    (source / "notes.md").write_text("not of a tokenizer")
    _, place = folder(tmp_path, "text", tokenizer=source)
    assert [p.name for p in (place / "tokenizer").iterdir()] == ["vocab.txt"]
    index = json.loads((place / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "BertTokenizer"]
    assert diffusers.read(place)[1]["conditioning"]["tokenizer"] == str(place / "tokenizer")
