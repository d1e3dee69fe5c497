"""Against the diffusers library itself, where it and torch are installed."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from latent_diffusion_jax.conditioning.cond import Cond
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.convert import compvis, diffusers
from latent_diffusion_jax.convert.diffusers import first_stage, layouts, text, unet, unet_config
from latent_diffusion_jax.convert.pairs import their_shapes
from tests.convert.models import MODELS, apply, concatenated, make_model

torch = pytest.importorskip("torch", reason="parity with diffusers needs torch")
library = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers")
transformers = pytest.importorskip("transformers", reason="so do its text encoders")

from diffusers.pipelines.latent_diffusion import LDMBertModel  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs"
PREFIXES = {"first_stage": first_stage.PREFIX, "unet": unet.PREFIX, "text": text.PREFIX}
TOLERANCE = 3e-5
FOLDERS = {"first_stage": ("vae", "vqvae"), "unet": ("unet",), "text": ("text_encoder", "bert")}


def component(folder):
    """Loads a component; everything in the folder has a place, and everything is in the folder."""
    config = json.loads((folder / "config.json").read_text())
    name = config.get("_class_name") or config["architectures"][0]
    kind = LDMBertModel if name == "LDMBertModel" else None
    kind = kind or getattr(library, name, None) or getattr(transformers, name)
    if "_class_name" in config:
        known = inspect.signature(kind.__init__).parameters
        assert {key for key in config if not key.startswith("_")} <= set(known)
    loaded, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


def components(root):
    found = {}
    for name, folders in FOLDERS.items():
        for folder in folders:
            if (root / folder).is_dir():
                found[name] = component(root / folder)
    return found


def nchw(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def close(ours, theirs, what):
    theirs = theirs.numpy()
    if theirs.ndim == 4:
        theirs = np.moveaxis(theirs, 1, -1)
    error = np.abs(ours - theirs).max()
    print(f"{what}: {error:.1e} of {np.abs(theirs).max():.3g}")
    assert error < TOLERANCE, what


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def compare(model, theirs):
    """Forward passes of every network of a model, on images that are not square."""
    with torch.no_grad():
        if "first_stage" in theirs:
            compare_first_stage(model, theirs["first_stage"])
        if "unet" in theirs:
            compare_unet(model, theirs["unet"])
        if "text" in theirs:
            size, length = theirs["text"].config.vocab_size, model.networks["text"].max_length
            tokens = np.random.default_rng(0).integers(0, size, (2, length), dtype=np.int32)
            expected = theirs["text"](torch.from_numpy(tokens).long())[0]
            close(apply(model, "text", tokens), expected, "text")


def compare_first_stage(model, theirs):
    image, codebook = normal(0, 2, 16, 24, 3), model.config["first_stage"]["kind"] == "vq"
    expected = theirs.encode(nchw(image))
    expected = expected.latents if codebook else expected.latent_dist.parameters
    close(apply(model, "first_stage", image, method="encode"), expected, "encode")
    z = normal(1, 2, 8, 12, model.config["first_stage"]["embed_dim"])
    expected = theirs.decode(nchw(z)).sample
    if codebook:
        quantized = model.networks["first_stage"].apply(
            {"params": model.params["first_stage"]}, z, method="quantized"
        )
        z = np.asarray(quantized.entries)
    close(apply(model, "first_stage", z, method="decode"), expected, "decode")


def compare_unet(model, theirs):
    channels, extra = theirs.config.out_channels, concatenated(model.config)
    z, more = normal(2, 2, 8, 16, channels), normal(3, 2, 8, 16, extra)
    t = np.array([1, 500], np.int32)
    x, inputs = np.concatenate([z, more], axis=-1), {}
    context = None
    if type(theirs).__name__ == "UNet2DConditionModel":
        context = normal(4, 2, 5, theirs.config.cross_attention_dim)
        inputs["encoder_hidden_states"] = torch.from_numpy(context)
    expected = theirs(nchw(x), torch.from_numpy(t), **inputs).sample
    cond = Cond(concat=more if extra else None, context=context)
    close(apply(model, "unet", z, t, cond), expected, "unet")


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_both_ways(name, tmp_path):
    config, _ = MODELS[name]
    model = make_model(config)
    diffusers.export(tmp_path / "ours", model.tensors, config)
    theirs = components(tmp_path / "ours")
    compare(model, theirs)

    for part, folders in FOLDERS.items():  # their own files, in again
        for folder in folders:
            if (tmp_path / "ours" / folder).is_dir():
                theirs[part].save_pretrained(tmp_path / "theirs" / folder)
    for folder in ("scheduler", "conditioning"):
        if (tmp_path / "ours" / folder).is_dir():
            (tmp_path / "ours" / folder).rename(tmp_path / "theirs" / folder)
    if (tmp_path / "ours" / "model_index.json").is_file():
        (tmp_path / "ours" / "model_index.json").rename(tmp_path / "theirs" / "model_index.json")
    tensors, sections = diffusers.read(tmp_path / "theirs")
    assert sections == config
    assert set(tensors) == set(model.tensors)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), model.tensors[key], err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["celebahq256", "sd1", "sd2", "text256"])
def test_same_numbers_at_full_size(name, tmp_path):
    config = load_config(str(CONFIGS / "diffusion" / f"{name}.py"))
    model = make_model(config.to_dict())
    diffusers.export(tmp_path, model.tensors, config)
    compare(model, components(tmp_path))


def torch_shapes(tree, prefix, linear):
    """Key, without prefix -> shape in torch's layout, of a tree of shapes."""
    found = {key: (kind, leaf) for key, kind, leaf in compvis.leaves(tree, prefix)}
    shapes = {}
    for key, (kind, leaf) in found.items():
        shape = leaf.shape
        if kind == "kernel" and len(shape) == 2:
            ones = compvis.torch_rank(key, found, linear) - 2
            shape = (shape[1], shape[0], *[1] * ones)
        elif kind == "kernel":
            shape = (shape[3], shape[2], *shape[:2])
        shapes[key.removeprefix(prefix)] = shape
    return shapes


def empty(name, config):
    """A component without weights, as diffusers makes it from a config.json."""
    config = {k: v for k, v in config.items() if k not in ("_class_name", "model_type")}
    with torch.device("meta"):
        if name == text.BERT:
            return LDMBertModel(LDMBertModel.config_class(**config))
        if name == text.CLIP:
            return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        return getattr(library, name)(**config)


def matches(pairs, ours, theirs):
    """Every tensor of ours is in exactly one pair; the pairs give theirs, shape by shape."""
    pairs = list(pairs)
    assert sorted(pair.ours for pair in pairs) == sorted(ours)
    given = {}
    for pair in pairs:
        given |= zip(pair.theirs, their_shapes(pair, ours[pair.ours]), strict=True)
    expected = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    if isinstance(theirs, transformers.CLIPTextModel):  # releases before 5 have that prefix
        expected = {f"text_model.{k.removeprefix('text_model.')}": s for k, s in expected.items()}
    assert given == expected
    return sum(int(np.prod(shape)) for shape in given.values())


def described(part, net, shapes, config):
    """Class, config.json and pairs of a component."""
    if part == "first_stage":
        theirs, pairs = first_stage.to_config(net, 1.0, 256), first_stage.pairs(net)
        return theirs["_class_name"], theirs, pairs
    if part == "unet":
        to_k = shapes.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
        channels = shapes["input_blocks.0.0.weight"][1]
        theirs = unet_config.to_config(net, channels, to_k and to_k[1], 64)
        return theirs["_class_name"], theirs, unet.pairs(net)
    if "clip" in layouts.conditions(config["conditioning"]):
        return text.CLIP, text.clip_config(net, 0), text.clip_pairs(net)
    return text.BERT, text.bert_config(net), text.bert_pairs(net)


@pytest.mark.parametrize(
    "name,pipeline",
    [
        ("celebahq256", "LDMPipeline"),
        ("imagenet256_f8", None),
        ("superres_bsr", "LDMSuperResolutionPipeline"),
        ("text256", "LDMTextToImagePipeline"),
        ("sd1", "StableDiffusionPipeline"),
        ("sd1_inpainting", "StableDiffusionInpaintPipeline"),
        ("sd2", "StableDiffusionPipeline"),
    ],
)
def test_published_models_have_the_tensors_of_diffusers(name, pipeline):
    config = load_config(str(CONFIGS / "diffusion" / f"{name}.py")).to_dict()
    assert layouts.layout_of(config).pipeline == pipeline
    model = make_model(config, fill=lambda shapes, prefix: shapes)
    linear = config["unet"].get("linear_projections", False)
    sizes = {}
    for part, net in model.networks.items():
        shapes = torch_shapes(model.params[part], PREFIXES[part], linear)
        kind, theirs, pairs = described(part, net, shapes, config)
        sizes[part] = matches(pairs, shapes, empty(kind, theirs))
    published = config["published"]["parameters"]
    assert sizes["unet"] == published["unet"]
    assert sizes["first_stage"] == published["first_stage"]
    if "text" in sizes:
        assert sizes["text"] == published["conditioning"]
