"""Tokens, from vocabularies small enough to write down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.conditioning.cond import together
from latent_diffusion_jax.conditioning.label import label
from latent_diffusion_jax.conditioning.spatial import lowres
from latent_diffusion_jax.conditioning.text import clip, make_tokenize, text
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.products import traced_for
from tests.models import write_clip_tokenizer

WORDS = ["a", "photograph", "of", "two", "dogs", "on", "the", "beach", "dog", "##s", "cat"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """bert-base-uncased's places for the special tokens, and a few words after them."""
    place = tmp_path_factory.mktemp("bert")
    special = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (place / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    return place


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_bert_tokens(vocabulary, kind):
    path = vocabulary / "vocab.txt" if kind == "file" else vocabulary
    tokens = make_tokenize("text", str(path), 8)(["Two DOGS", "", "cats on the xyz a dog a cat"])
    number = {word: 104 + i for i, word in enumerate(WORDS)}
    assert tokens.dtype == np.int32
    assert tokens[0].tolist() == [101, number["two"], number["dogs"], 102, 0, 0, 0, 0]
    assert tokens[1].tolist() == [101, 102, 0, 0, 0, 0, 0, 0]
    cut = [number["cat"], number["##s"], number["on"], number["the"], 100, number["a"]]
    assert tokens[2].tolist() == [101, *cut, 102]


def test_a_tokeniser_that_knows_nothing_is_refused(vocabulary, tmp_path):
    lines = (vocabulary / "vocab.txt").read_text().split("\n")
    (tmp_path / "vocab.txt").write_text("\n".join(lines[:104]))
    with pytest.raises(UserError, match="knows no word of"):
        make_tokenize("text", str(tmp_path), 8)


def test_a_vocabulary_of_other_numbers_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]))
    with pytest.raises(UserError, match=r"\[CLS\] as 2, the published vocabulary as 101"):
        make_tokenize("text", str(tmp_path), 8)


def test_clip_tokens(tmp_path):
    """From vocab.json and merges.txt; the end token fills up, or what `pad` says."""
    vocab = write_clip_tokenizer(tmp_path)
    tokens = make_tokenize("clip", str(tmp_path), 7)(["A Dog", ""])
    assert tokens[0].tolist() == [49406, vocab["a</w>"], vocab["dog</w>"], *[49407] * 4][:7]
    assert tokens[1].tolist() == [49406, *[49407] * 6]
    padded = make_tokenize("clip", str(tmp_path), 5, pad=0)(["dog"])
    assert padded[0].tolist() == [49406, vocab["dog</w>"], 49407, 0, 0]


@pytest.mark.parametrize("kind", ["text", "clip"])
def test_a_missing_tokeniser_says_how_to_give_one(kind, tmp_path):
    with pytest.raises(UserError, match="config.data.tokenizer=DIR") as error:
        make_tokenize(kind, str(tmp_path / "nowhere"), 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "conditioner,null",
    [
        (text(vocab_size=200, max_length=6, dim=8, depth=1), [101, 102, 0, 0, 0, 0]),
        (
            clip(dim=8, depth=1, num_heads=2, activation="gelu", max_length=4),
            [49406, 49407, 49407, 49407],
        ),
        (
            clip(dim=8, depth=1, num_heads=2, activation="gelu", max_length=4, pad=0),
            [49406, 49407, 0, 0],
        ),
    ],
    ids=["text", "clip", "clip padded with 0"],
)
def test_null_is_the_empty_caption(conditioner, null):
    length = len(null)
    tokens = np.ones((3, length), np.int32)
    assert np.asarray(conditioner.null({}, {"tokens": tokens})["tokens"]).tolist() == [null] * 3
    cond = jax.eval_shape(
        lambda key: conditioner.apply(conditioner.init(key), {"tokens": tokens}), jax.random.key(0)
    )
    assert cond.context.shape == (3, length, 8)
    assert conditioner.frozen == (null[0] == 49406)


@traced_for("tpu")  # CPUs hand float32 on, and round it for the cache alone
def test_what_a_frozen_encoder_makes_stands_for_its_captions():
    """Beside another condition, with the null condition; in the type that it computes in."""
    sizes = dict(vocab_size=9, dim=8, depth=1, num_heads=2, activation="gelu", max_length=4)
    both = together({"text": clip(dtype=jnp.bfloat16, **sizes), "image": lowres()})
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: random.normal(0, 0.3, x.shape).astype(np.float32),
        jax.eval_shape(both.init, jax.random.key(0)),
    )
    image = random.normal(size=(2, 4, 4, 3)).astype(np.float32)
    inputs = {"tokens": np.int32([[1, 2, 3, 4], [5, 6, 7, 8]]), "lowres": image}
    made = both.encode(params, inputs)
    assert {name: value.dtype for name, value in made.items()} == {"context": jnp.bfloat16}
    nothing = both.encode(params, both.null(params, inputs))["context"][0]
    stored, kept = {"null": {"context": nothing}}, {"lowres": image, **made}
    assert set(both.encoded.keys) == {"lowres", "context"}
    shapes = jax.eval_shape(both.encoded.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, stored)
    for theirs, ours in (
        (both.apply(params, inputs), both.encoded.apply(stored, kept)),
        (
            both.apply(params, both.null(params, inputs)),
            both.encoded.apply(stored, both.encoded.null(stored, kept)),
        ),
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert clip(**sizes).encoded
    assert not text(vocab_size=9, max_length=4, dim=8, depth=1).encoded


def test_a_frozen_network_rules_out_training_another():
    sizes = dict(dim=8, depth=1, num_heads=2, activation="gelu")
    with pytest.raises(UserError, match="conditioning.class is to be trained, which a frozen one"):
        together({"text": clip(**sizes), "class": label(num_classes=3, dim=8)})
