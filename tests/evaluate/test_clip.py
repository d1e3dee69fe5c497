"""CLIP scores, from folders as `CLIPModel.save_pretrained` writes them."""

import json

import jax
import numpy as np
import pytest

from latent_diffusion_jax.convert.clip import SUFFIXES, load_clip
from latent_diffusion_jax.convert.files import write_tensors
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate.clip import MEAN, Clip, ClipImage, make_clip_score, prepare
from latent_diffusion_jax.nn.transformer import ClipText
from tests.models import write_clip_tokenizer

SIZES = dict(hidden_size=16, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
CONFIG = {
    "model_type": "clip",
    "projection_dim": 8,
    "text_config": dict(SIZES, max_position_embeddings=7, vocab_size=49408, hidden_act="gelu"),
    "vision_config": dict(SIZES, image_size=12, patch_size=4, hidden_act="gelu"),
}
NETWORK = Clip(
    ClipText(49408, 7, 16, 2, 2, "gelu"), ClipImage(12, 4, 16, 2, 2, "gelu"), projection_dim=8
)


def draw(path, leaf):
    seed = list(jax.tree_util.keystr(path).encode())
    return np.random.default_rng(seed).normal(size=leaf.shape).astype(np.float32) / 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, and the parameters that it was written from."""
    place = tmp_path_factory.mktemp("clip")
    pixels, tokens = np.zeros((1, 12, 12, 3)), np.zeros((1, 7), np.int32)
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0), pixels, tokens)["params"]
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    tensors = {}
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        *layers, last = (key.key for key in path if key.key not in ("text", "image"))
        if last == "kernel":
            array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
        tensors["".join(layers) + (SUFFIXES[last] if layers else last)] = np.ascontiguousarray(
            array
        )
    write_tensors(place / "model.safetensors", tensors)
    (place / "config.json").write_text(json.dumps(CONFIG))
    write_clip_tokenizer(place)
    return place, params


def test_a_folder_is_read(folder):
    network, params, tokenize = load_clip(str(folder[0]))
    assert network == NETWORK
    jax.tree.map(np.testing.assert_array_equal, params, folder[1])
    assert tokenize(["dog"])[0, 2] == 49407


def test_agrees_with_transformers(folder):
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPModel.from_pretrained(folder[0]).eval()
    network, params, tokenize = load_clip(str(folder[0]))
    pixels = np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype(np.float32)
    tokens = tokenize(["a dog", "dog", "a b c d e f g"])
    ours = network.apply({"params": params}, pixels, tokens)
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(tokens.astype(np.int64)),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
        )
    cosines = (out.image_embeds * out.text_embeds).sum(-1).numpy()
    np.testing.assert_allclose(ours, cosines, atol=2e-6)
    assert np.ptp(cosines) > 0.01


def test_the_score_is_the_mean_over_all_pairs(folder):
    network, params, tokenize = load_clip(str(folder[0]))
    score = make_clip_score(network, params, tokenize)
    images = np.random.default_rng(1).integers(0, 256, (35, 12, 12, 3), dtype=np.uint8)
    examples = [{"caption": "a" * (i % 5) + " dog"} for i in range(35)]
    tokens = tokenize([example["caption"] for example in examples])
    cosines = network.apply({"params": params}, np.stack([prepare(x, 12) for x in images]), tokens)
    assert np.min(cosines) > 0
    found = score(images, examples)["clip_score"]
    np.testing.assert_allclose(found, 100 * np.mean(cosines), rtol=1e-5)
    opposite = {**params, "text_projection": {"kernel": -params["text_projection"]["kernel"]}}
    assert make_clip_score(network, opposite, tokenize)(images, examples) == {"clip_score": 0}


def test_images_are_prepared():
    grey = np.full((30, 20, 3), 51, np.uint8)
    shown = prepare(grey, 12)
    assert shown.shape == (12, 12, 3)
    np.testing.assert_allclose(shown[0, 0, 0], (0.2 - MEAN[0]) / 0.26862954, rtol=1e-6)
    wide = np.zeros((12, 36, 3), np.uint8)
    wide[:, 12:24] = 255  # the middle, as it is
    assert np.ptp(prepare(wide, 12)[..., 0]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "holds 'siglip', not 'clip'"),
        ({"projection_dim": 9}, r"'text_projection.weight' is \[16, 8\], not \[16, 9\]"),
        ({"vision_config": {**CONFIG["vision_config"], "patch_size": 0}}, "patch_size is 0"),
        ({"text_config": {**CONFIG["text_config"], "hidden_act": "relu"}}, "hidden_act is 'relu'"),
        ({"vision_config": {**CONFIG["vision_config"], "num_hidden_layers": 3}}, "has no tensor"),
    ],
)
def test_another_model_is_refused(folder, tmp_path, change, message):
    for file in folder[0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(UserError, match=message):
        load_clip(str(tmp_path))


def test_a_folder_that_is_not_there():
    with pytest.raises(UserError, match="no CLIP in 'nowhere': a CLIP score needs a folder"):
        load_clip("nowhere")
