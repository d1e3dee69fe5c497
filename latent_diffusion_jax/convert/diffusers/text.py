"""Text encoders as transformers' `CLIPTextModel` and diffusers' `LDMBertModel`."""

from collections.abc import Iterator, Mapping
from typing import Any

from latent_diffusion_jax.conditioning.text import CLIP_EMPTY
from latent_diffusion_jax.convert.diffusers.config import Config, check, number
from latent_diffusion_jax.convert.pairs import CONDITIONING, Pair, layer
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.transformer import ACTIVATIONS, ClipText, TextTransformer

CLIP, BERT = "CLIPTextModel", "LDMBertModel"
PREFIX = f"{CONDITIONING}transformer."

# transformers' own padding token, in the published folders too, where nothing pads with it
UNSET_PAD = 1

CLIP_SAME = dict(layer_norm_eps=1e-5, model_type="clip_text_model")
CLIP_DEFAULTS: Config = dict(
    hidden_act="quick_gelu",
    hidden_size=512,
    intermediate_size=2048,
    max_position_embeddings=77,
    num_attention_heads=8,
    num_hidden_layers=12,
    pad_token_id=UNSET_PAD,
    vocab_size=49408,
)
BERT_SAME = dict(activation_function="gelu", model_type="ldmbert", scale_embedding=False)
BERT_DEFAULTS: Config = dict(
    d_model=1280,
    encoder_attention_heads=8,
    encoder_ffn_dim=5120,
    encoder_layers=32,
    head_dim=64,
    max_position_embeddings=77,
    vocab_size=30522,
)
CLIP_LAYERS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
)


def clip_pairs(network: ClipText) -> Iterator[Pair]:
    """Every tensor of CLIP's text tower, whose names are the same in both."""

    def same(name: str, bias: bool = True) -> Iterator[Pair]:
        return layer(f"text_model.{name}", f"text_model.{name}", bias)

    yield from same("embeddings.token_embedding", bias=False)
    yield from same("embeddings.position_embedding", bias=False)
    for block in range(network.depth):
        for name in CLIP_LAYERS:
            yield from same(f"encoder.layers.{block}.{name}")
    yield from same("final_layer_norm")


def clip_config(network: ClipText, pad: int) -> Config:
    """The config.json of CLIP's text tower."""
    return dict(
        CLIP_SAME,
        hidden_act=network.activation,
        hidden_size=network.dim,
        intermediate_size=4 * network.dim,
        max_position_embeddings=network.max_length,
        num_attention_heads=network.num_heads,
        num_hidden_layers=network.depth,
        pad_token_id=pad,
        vocab_size=network.vocab_size,
    )


def clip_section(config: Mapping[str, Any], place: str) -> tuple[Config, ClipText]:
    """The section `conditioning` of a config.json, and the network.

    Raises:
      UserError: a text tower that this package does not have.
    """
    config = {**CLIP_SAME, **CLIP_DEFAULTS, **config}
    if str(config["hidden_act"]) not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"{place!r}: hidden_act is {config['hidden_act']!r}; known: {known}")
    section: Config = dict(
        vocab_size=number(config, "vocab_size", place),
        max_length=number(config, "max_position_embeddings", place),
        dim=number(config, "hidden_size", place),
        depth=number(config, "num_hidden_layers", place),
        num_heads=number(config, "num_attention_heads", place),
        activation=config["hidden_act"],
    )
    network = ClipText(**section)
    check(config, clip_config(network, config["pad_token_id"]), place)
    pad = config["pad_token_id"]
    if not isinstance(pad, int) or pad == UNSET_PAD:
        # OpenAI's models are given the end token after the end, OpenCLIP's zeros
        pad = CLIP_EMPTY[1] if section["activation"] == "quick_gelu" else 0
    return dict(kind="clip", **section, pad=pad), network


def bert_pairs(network: TextTransformer) -> Iterator[Pair]:
    """Every tensor of the paper's transformer."""
    yield from layer("token_emb", "model.embed_tokens", bias=False)
    yield from layer("pos_emb.emb", "model.embed_positions", bias=False)
    for block in range(network.depth):
        theirs = f"model.layers.{block}"
        attention = f"attn_layers.layers.{2 * block}"
        mlp = f"attn_layers.layers.{2 * block + 1}"
        yield from layer(f"{attention}.0", f"{theirs}.self_attn_layer_norm")
        for which in "qkv":
            name = f"{theirs}.self_attn.{which}_proj"
            yield from layer(f"{attention}.1.to_{which}", name, bias=False)
        yield from layer(f"{attention}.1.to_out", f"{theirs}.self_attn.out_proj")
        yield from layer(f"{mlp}.0", f"{theirs}.final_layer_norm")
        yield from layer(f"{mlp}.1.net.0.0", f"{theirs}.fc1")
        yield from layer(f"{mlp}.1.net.2", f"{theirs}.fc2")
    yield from layer("norm", "model.layer_norm")
    yield from layer("to_logits", "to_logits")


def bert_config(network: TextTransformer) -> Config:
    """The config.json of the paper's transformer."""
    return dict(
        BERT_SAME,
        d_model=network.dim,
        encoder_attention_heads=network.num_heads,
        encoder_ffn_dim=4 * network.dim,
        encoder_layers=network.depth,
        head_dim=network.head_dim,
        max_position_embeddings=network.max_length,
        vocab_size=network.vocab_size,
    )


def bert_section(config: Mapping[str, Any], place: str) -> tuple[Config, TextTransformer]:
    """The section `conditioning` of a config.json, and the network.

    Raises:
      UserError: a transformer that this package does not have.
    """
    config = {**BERT_SAME, **BERT_DEFAULTS, **config}
    section: Config = dict(
        vocab_size=number(config, "vocab_size", place),
        max_length=number(config, "max_position_embeddings", place),
        dim=number(config, "d_model", place),
        depth=number(config, "encoder_layers", place),
        num_heads=number(config, "encoder_attention_heads", place),
        head_dim=number(config, "head_dim", place),
    )
    network = TextTransformer(**section)
    check(config, bert_config(network), place)
    return dict(kind="text", **section), network
