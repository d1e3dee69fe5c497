"""Captions through the cross-attention port (paper section 4.3.1; Stable Diffusion's CLIP).

Tokens are made on the host by `transformers`' tokenisers, from a folder, a vocabulary file or a
name; the networks see int32 only.
"""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.conditioning.cond import Cond, Conditioner
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.transformer import ClipText, TextTransformer

Tokenize = Callable[[Sequence[str]], np.ndarray]  # captions -> int32 [B, max_length]

BERT_EMPTY = (101, 102)  # [CLS] [SEP]; the rest is [PAD], 0
CLIP_EMPTY = (49406, 49407)  # start, end
BASIC = "basic"  # the small vocabulary that ships: everyday words, and letters for all others
BASIC_SIZE = 636


def text(
    *,
    vocab_size: int,
    max_length: int,
    dim: int,
    depth: int,
    num_heads: int = 8,
    head_dim: int = 64,
    dtype: Any = jnp.float32,
) -> Conditioner:
    """Tokens int32 [B, max_length] -> context [B, max_length, dim], by a transformer trained along.

    The padding is not masked, as published. The null condition is the empty caption.
    """
    network = TextTransformer(vocab_size, max_length, dim, depth, num_heads, head_dim, dtype)
    return token_conditioner(network, empty_tokens(BERT_EMPTY, 0, max_length), frozen=False)


def clip(
    *,
    vocab_size: int = 49_408,
    max_length: int = 77,
    dim: int,
    depth: int,
    num_heads: int,
    activation: str,
    pad: int = CLIP_EMPTY[1],
    dtype: Any = jnp.float32,
) -> Conditioner:
    """Tokens int32 [B, max_length] -> context [B, max_length, dim], by CLIP's frozen text tower.

    `pad` fills up after the end token: the end token itself (Stable Diffusion 1) or 0 (2).
    """
    network = ClipText(vocab_size, max_length, dim, depth, num_heads, activation, dtype)
    tokens = token_conditioner(network, empty_tokens(CLIP_EMPTY, pad, max_length), frozen=True)

    def encode(params, inputs):
        context: Any = tokens.apply(params, inputs).context
        return {"context": context.astype(dtype)}

    return tokens._replace(encode=encode, encoded=encoded_text(max_length, dim, dtype))


def encoded_text(max_length: int, dim: int, dtype: Any = jnp.float32) -> Conditioner:
    """Context [B, max_length, dim] in `dtype`, as a text encoder made it before, as it is.

    The params are the null condition: {"null": {"context": [max_length, dim]}}.
    """
    shape = jax.ShapeDtypeStruct((max_length, dim), dtype)

    def null(params, inputs):
        return {"context": jnp.broadcast_to(params["null"]["context"], inputs["context"].shape)}

    return Conditioner(
        init=lambda key: {"null": {"context": jnp.zeros(shape.shape, shape.dtype)}},
        apply=lambda params, inputs, to_latent=None: Cond(
            context=inputs["context"].astype(jnp.float32)
        ),
        null=null,
        inputs=lambda height, width: {"context": shape},
        frozen=True,
    )


def empty_tokens(empty: Sequence[int], pad: int, max_length: int) -> np.ndarray:
    """The tokens of the empty caption, int32 [max_length]."""
    return np.asarray([*empty, *[pad] * (max_length - len(empty))], np.int32)


def token_conditioner(network: nn.Module, null_tokens: np.ndarray, frozen: bool) -> Conditioner:
    """A conditioner whose context is a network's result on `tokens` int32 [B, length].

    null_tokens: int32 [length], those that mean "no condition".
    """
    length = len(null_tokens)

    def init(key):
        return {"transformer": network.init(key, jnp.zeros((1, length), jnp.int32))["params"]}

    def apply(params, inputs, to_latent=None):
        tokens = inputs["tokens"]
        context: Any = network.apply({"params": params["transformer"]}, tokens)
        return Cond(context=context)

    def inputs(height, width):
        return {"tokens": jax.ShapeDtypeStruct((length,), jnp.int32)}

    def null(params, inputs):
        return {"tokens": jnp.broadcast_to(null_tokens, inputs["tokens"].shape)}

    return Conditioner(init, apply, null, inputs, frozen)


@functools.cache  # of a vocabulary that is read from files, asked for by each evaluation
def make_tokenize(kind: str, tokenizer: str, max_length: int, pad: int | None = None) -> Tokenize:
    """The tokeniser of a "text" or "clip" condition.

    Args:
      kind: "text" (WordPiece, lower case) or "clip" (byte pairs).
      tokenizer: a folder as `save_pretrained` writes it (vocab.txt; vocab.json and merges.txt), a
        `vocab.txt`, a name that `transformers` finds in its cache or on its hub, or for "text"
        BASIC, a vocabulary of BASIC_SIZE word pieces that ships with the package.
      max_length: captions are cut there.
      pad: CLIP's filling after the end token; default: the end token.

    Raises:
      UserError: nothing usable is there, or it knows none of a sentence's words.
    """
    load = {"text": _bert, "clip": _clip}[kind]
    try:
        encode = load(tokenizer)
    except UserError:
        raise
    except Exception as error:  # transformers raises nearly everything, over many lines
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"no tokeniser in {tokenizer!r} ({reason}); give its folder:"
            " --config.data.tokenizer=DIR"
        ) from error
    start, end = BERT_EMPTY if kind == "text" else CLIP_EMPTY
    if kind == "text":
        pad = 0
    elif pad is None:
        pad = end

    def tokenize(captions: Sequence[str]) -> np.ndarray:
        rows = np.full((len(captions), max_length), pad, np.int32)
        for row, words in zip(rows, encode(list(captions)), strict=True):
            tokens = [start, *words[: max_length - 2], end]
            row[: len(tokens)] = tokens
        return rows

    return tokenize


PROBE = "a photograph of two dogs on the beach"


def _bert(tokenizer: str) -> Callable[[list[str]], list[list[int]]]:
    BertTokenizer = _transformers().BertTokenizer

    path = Path(__file__).with_name("vocabulary.txt") if tokenizer == BASIC else Path(tokenizer)
    vocabulary = path / "vocab.txt" if path.is_dir() else path
    if vocabulary.is_file():
        # `vocab_file=` is ignored by transformers 5, which then knows no word at all
        words = vocabulary.read_text(encoding="utf-8").split("\n")
        fast = BertTokenizer(vocab={w: i for i, w in enumerate(words) if w})
    else:
        fast = BertTokenizer.from_pretrained(tokenizer)
    for name, number in (("[CLS]", BERT_EMPTY[0]), ("[SEP]", BERT_EMPTY[1]), ("[PAD]", 0)):
        if fast.convert_tokens_to_ids(name) != number:
            raise UserError(
                f"tokeniser {tokenizer!r} has {name} as {fast.convert_tokens_to_ids(name)}, the"
                f" published vocabulary as {number}: use bert-base-uncased's vocab.txt"
            )
    return _probed(fast, tokenizer)


def _clip(tokenizer: str) -> Callable[[list[str]], list[list[int]]]:
    return _probed(_transformers().CLIPTokenizer.from_pretrained(tokenizer), tokenizer)


def _transformers() -> Any:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch
    import transformers

    return transformers


def _probed(fast: Any, tokenizer: str) -> Callable[[list[str]], list[list[int]]]:
    """The tokeniser without its special tokens, once it has been seen to know words."""

    def encode(captions):
        return fast(captions, add_special_tokens=False)["input_ids"]

    ids = encode([PROBE])[0]
    if not ids or all(i == fast.unk_token_id for i in ids):
        raise UserError(f"tokeniser {tokenizer!r} knows no word of {PROBE!r}: it is not whole")
    return encode
