"""What cannot be read or written ends in one line that says why."""

import json

import numpy as np
import pytest

from latent_diffusion_jax.convert import diffusers
from latent_diffusion_jax.convert.files import open_tensors, write_tensors
from latent_diffusion_jax.errors import UserError
from tests.convert.models import CLIP, CONDITIONAL, KL, MODELS, UNET, VQ, make_model, sections

WEIGHTS = "diffusion_pytorch_model.safetensors"
NONE = dict(kind="none")
TEXT_UNET = {**CONDITIONAL, "attention_resolutions": (1, 2)}


@pytest.fixture(scope="module")
def plain():
    return make_model(MODELS["unconditional_vq"][0])


def line(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "config,reason",
    [
        (
            sections(
                KL,
                {
                    **{k: v for k, v in UNET.items() if k != "num_head_channels"},
                    "attention_resolutions": (1, 2),
                    "num_heads": 2,
                },
                NONE,
            ),
            "attention heads of one width, but 2 heads .* are 16, 32 channels wide",
        ),
        (sections(KL, {**TEXT_UNET, "resblock_updown": True}, CLIP), "resblock_updown"),
        (sections(KL, {**UNET, "channel_mult": (2, 2)}, NONE), r"unet.channel_mult \[2, 2\]"),
        (sections(KL, TEXT_UNET, NONE), "spatial transformers and no context"),
        (sections(KL, UNET, CLIP), "reads no context"),
        (sections({**KL, "z_channels": 3}, UNET, NONE), r"embed_dim \(4\) other than .* \(3\)"),
        (sections({**KL, "channel_mult": (2, 2)}, UNET, NONE), r"first_stage.channel_mult"),
        (sections(KL, UNET, NONE, scale=None), "set config.latents.scale"),
        (
            sections(KL, UNET, NONE, diffusion=dict(schedule=dict(name="sqrt"), prediction="eps")),
            "unknown schedule that diffusers has: 'sqrt'",
        ),
        (
            sections(
                KL,
                UNET,
                NONE,
                diffusion=dict(schedule=dict(name="cosine", cosine_s=0.1), prediction="eps"),
            ),
            "cosine_s other than 0.008",
        ),
        (sections(VQ, {**UNET, "num_head_channels": 24}, NONE), "do not divide by"),
        (sections(VQ, {**UNET, "depht": 1}, NONE), "unknown key in config.unet: 'depht'"),
    ],
)
def test_models_that_diffusers_does_not_have(config, reason, plain, tmp_path):
    ours = "do not divide" not in reason and "unknown key" not in reason
    model = make_model(config) if ours else plain
    with pytest.raises(UserError, match=reason):
        diffusers.export(tmp_path / "a", model.tensors, config)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_are_missing_or_too_many(plain, tmp_path):
    config, key = plain.config, "model.diffusion_model.out.2.weight"
    fewer = {k: v for k, v in plain.tensors.items() if k != key}
    assert f"no tensor '{key}'" in line(diffusers.export, tmp_path / "a", fewer, config)
    more = {**plain.tensors, "model.diffusion_model.label_emb.weight": np.zeros((1, 1))}
    assert "'model.diffusion_model.label_emb.weight' has no place" in line(
        diffusers.export, tmp_path / "a", more, config
    )
    key = "model.diffusion_model.middle_block.1.qkv.weight"
    odd = {**plain.tensors, key: np.zeros((100, 64, 1))}
    assert f"'{key}' is [100, 64, 1]" in line(diffusers.export, tmp_path / "a", odd, config)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_and_no_tokenizer(plain, tmp_path):
    (tmp_path / "a").mkdir()
    diffusers.export(tmp_path / "a", plain.tensors, plain.config)
    assert "exists: choose another" in line(
        diffusers.export, tmp_path / "a", plain.tensors, plain.config
    )
    model = make_model(MODELS["text"][0])
    assert "no tokenizer in" in line(
        diffusers.export, tmp_path / "b", model.tensors, model.config, tokenizer=tmp_path
    )


def test_folders_that_are_none(tmp_path):
    assert "no folder" in line(diffusers.read, tmp_path / "a")
    assert "neither config.json nor unet/" in line(diffusers.read, tmp_path)
    for text, reason in (("{", "JSON"), ("[1]", "JSON object"), ("{}", "unknown class")):
        (tmp_path / "config.json").write_text(text)
        assert reason in line(diffusers.read, tmp_path)


@pytest.fixture
def stored(plain, tmp_path):
    diffusers.export(tmp_path / "a", plain.tensors, plain.config)
    return tmp_path / "a"


def edit(path, changes):
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize(
    "file,changes,reason",
    [
        ("unet/config.json", dict(norm_eps=1e-6), "norm_eps is 1e-06; this package has only 1e-05"),
        ("unet/config.json", dict(freq_shift=1), "freq_shift is 1"),
        ("unet/config.json", dict(flip_sin_to_cos=False), "flip_sin_to_cos is false"),
        ("unet/config.json", dict(num_class_embeds=10), "num_class_embeds is 10"),
        ("unet/config.json", dict(block_out_channels="absent"), "block_out_channels is null"),
        ("unet/config.json", dict(block_out_channels=[32, 50]), "block_out_channels is [32, 50]"),
        ("unet/config.json", dict(block_out_channels=[32, 48]), "block_out_channels is [32, 48]"),
        ("unet/config.json", dict(block_out_channels=[32, "64"]), "not a list of int"),
        ("unet/config.json", dict(layers_per_block=[1, 2]), "layers_per_block is [1, 2]"),
        ("unet/config.json", dict(layers_per_block=-1), "not a positive integer"),
        ("unet/config.json", dict(up_block_types=["UpBlock2D"] * 2), "up_block_types is"),
        ("unet/config.json", dict(attention_head_dim=0), "attention_head_dim is 0"),
        ("unet/config.json", dict(layers_per_block=2), "has no tensor 'down_blocks.0.resnets.1"),
        ("unet/config.json", dict(_class_name="UNet3D"), "unknown class in"),
        ("unet/config.json", dict(_class_name="VQModel"), "one of UNet2DConditionModel, UNet2D"),
        ("unet/config.json", dict(in_channels=7), "'conv_in.weight' is [32, 3, 3, 3]"),
        ("unet/config.json", dict(in_channels="3"), 'in_channels is "3", not a positive integer'),
        ("unet/config.json", dict(out_channels=4), "'conv_out.weight' is [3, 32, 3, 3]"),
        ("vqvae/config.json", dict(norm_type="spatial"), 'norm_type is "spatial"'),
        ("vqvae/config.json", dict(scaling_factor=0), "scaling_factor is 0"),
        ("vqvae/config.json", dict(mid_block_add_attention=False), "has no place"),
        ("vqvae/config.json", dict(_class_name="AutoencoderKL"), "has no place"),
        ("scheduler/scheduler_config.json", dict(beta_schedule="absent"), "no beta_schedule"),
        ("scheduler/scheduler_config.json", dict(beta_schedule="sigmoid"), "'sigmoid' is none of"),
        ("scheduler/scheduler_config.json", dict(beta_start=None), "beta_start is None"),
        ("scheduler/scheduler_config.json", dict(trained_betas=[0.1]), "trained_betas"),
        ("scheduler/scheduler_config.json", dict(rescale_betas_zero_snr=True), "zero_snr"),
        ("scheduler/scheduler_config.json", dict(prediction_type="flow"), "'flow' is none of"),
    ],
)
def test_folders_of_other_models(file, changes, reason, stored):
    edit(stored / file, changes)
    message = line(diffusers.read, stored)
    assert reason in message
    assert str(stored) in message


def change(path, **tensors):
    old = {key: tensor.read() for key, tensor in open_tensors(path).items()}
    write_tensors(path, {k: v for k, v in {**old, **tensors}.items() if v is not None})


def test_folders_with_other_weights(stored):
    path = stored / "unet" / WEIGHTS
    whole = path.read_bytes()
    for name, value, reason in (
        ("to_q", None, "has no tensor 'mid_block.attentions.0.to_q.weight'"),
        ("to_q", np.zeros((64, 32), np.float32), "differ in shape"),
        ("to_out.0", np.zeros((64, 64, 3, 3), np.float32), "is [64, 64, 3, 3], not a matrix"),
    ):
        change(path, **{f"mid_block.attentions.0.{name}.weight": value})
        message = line(diffusers.read, stored)
        assert reason in message
        assert str(stored / "unet") in message
        path.write_bytes(whole)
    change(path, **{"conv_in.weight": np.zeros((32, 7, 3, 3), np.float32)})
    edit(stored / "unet" / "config.json", dict(in_channels=7))
    assert "takes 4 channels beside the latent" in line(diffusers.read, stored)
    change(path, **{"conv_out.weight": np.zeros((5, 32, 3, 3), np.float32)})
    edit(stored / "unet" / "config.json", dict(out_channels=5))
    assert "gives 5 channels, the first stage's latent has 3" in line(diffusers.read, stored)
    change(path, time_cond=np.zeros(3, np.float32))
    assert "'time_cond' [3] has no place" in line(diffusers.read, stored)
    path.unlink()
    assert "no weights in" in line(diffusers.read, stored)


def test_a_unet_without_what_it_reads(tmp_path):
    model = make_model(MODELS["text"][0])
    diffusers.export(tmp_path / "a", model.tensors, model.config)
    (tmp_path / "a" / "bert").rename(tmp_path / "elsewhere")
    assert "no text_encoder/ or bert/" in line(diffusers.read, tmp_path / "a")
    tensors, told = diffusers.read(tmp_path / "elsewhere")  # alone, it can be read
    assert told["conditioning"] == model.config["conditioning"]
    assert all(key.startswith("cond_stage_model.transformer.") for key in tensors)


def test_a_condition_that_is_none(tmp_path):
    model = make_model(MODELS["classes"][0])
    diffusers.export(tmp_path / "a", model.tensors, model.config)
    place = tmp_path / "a" / "conditioning" / "config.json"
    for text in ("{}", '{"kind": "several", "text": 1}', '{"kind": 3}'):
        place.write_text(text)
        assert str(place) in line(diffusers.read, tmp_path / "a")
    lacking = {k: v for k, v in model.config.items() if k != "latents"}
    assert "lacks latents" in line(diffusers.export, tmp_path / "b", model.tensors, lacking)


def test_vq_is_not_for_stable_diffusion_pipelines(tmp_path):
    config = sections(VQ, TEXT_UNET, CLIP)
    assert diffusers.export(tmp_path / "a", make_model(config).tensors, config) is None
    assert diffusers.read(tmp_path / "a")[1] == config
