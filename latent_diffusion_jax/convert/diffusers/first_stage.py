"""The first stage as diffusers' `AutoencoderKL` or `VQModel`."""

from collections.abc import Iterator, Mapping
from typing import Any

from latent_diffusion_jax.convert.diffusers.config import Config, check, listed, number
from latent_diffusion_jax.convert.pairs import FIRST_STAGE, Pair, layer, matrix
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.autoencoder import Autoencoder

KL, VQ = "AutoencoderKL", "VQModel"
PREFIX = FIRST_STAGE

# What every first stage here is, in diffusers' words; its own defaults too.
SAME = dict(act_fn="silu")
# What diffusers can do and no first stage here does.
OFF = dict(
    latents_mean=None,
    latents_std=None,
    lookup_from_codebook=False,
    norm_type="group",
    shift_factor=None,
    use_post_quant_conv=True,
    use_quant_conv=True,
)
# What a config.json may leave out. The published VQModels do leave out the scale, which is 1:
# diffusers' own default is Stable Diffusion's (huggingface/diffusers issue 6725).
DEFAULTS: dict[str, Config] = {
    KL: dict(latent_channels=4, scaling_factor=0.18215),
    VQ: dict(latent_channels=3, num_vq_embeddings=256, scaling_factor=1.0),
}
SHARED: Config = dict(
    in_channels=3,
    layers_per_block=1,
    mid_block_add_attention=True,
    norm_num_groups=32,
    out_channels=3,
    sample_size=None,
)
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def pairs(autoencoder: Autoencoder) -> Iterator[Pair]:
    """Every tensor of a first stage."""
    mults, blocks = autoencoder.channel_mult, autoencoder.num_res_blocks
    last = len(mults) - 1
    yield from layer("encoder.conv_in", "encoder.conv_in")
    before = 1
    for level, mult in enumerate(mults):
        ours, theirs = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        yield from _level(autoencoder, ours, theirs, level, blocks, before != mult)
        before = mult
        if level < last:
            yield from layer(f"{ours}.downsample.conv", f"{theirs}.downsamplers.0.conv")
    yield from _ends(autoencoder, "encoder")
    yield from layer("decoder.conv_in", "decoder.conv_in")
    yield from _ends(autoencoder, "decoder")
    for level, mult in reversed(list(enumerate(mults))):
        ours, theirs = f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"
        yield from _level(autoencoder, ours, theirs, level, blocks + 1, before != mult)
        before = mult
        if level > 0:
            yield from layer(f"{ours}.upsample.conv", f"{theirs}.upsamplers.0.conv")
    yield from layer("quant_conv", "quant_conv")
    yield from layer("post_quant_conv", "post_quant_conv")
    if autoencoder.codebook_size:
        yield from layer("quantize.embedding", "quantize.embedding", bias=False)


def _level(
    autoencoder: Autoencoder, ours: str, theirs: str, level: int, blocks: int, widens: bool
) -> Iterator[Pair]:
    for i in range(blocks):
        yield from _res(f"{ours}.block.{i}", f"{theirs}.resnets.{i}", widens and i == 0)
        if level in autoencoder.attention_levels:
            yield from _attention(f"{ours}.attn.{i}", f"{theirs}.attentions.{i}")


def _ends(autoencoder: Autoencoder, coder: str) -> Iterator[Pair]:
    yield from _res(f"{coder}.mid.block_1", f"{coder}.mid_block.resnets.0", False)
    if autoencoder.mid_attention:
        yield from _attention(f"{coder}.mid.attn_1", f"{coder}.mid_block.attentions.0")
    yield from _res(f"{coder}.mid.block_2", f"{coder}.mid_block.resnets.1", False)
    yield from layer(f"{coder}.norm_out", f"{coder}.conv_norm_out")
    yield from layer(f"{coder}.conv_out", f"{coder}.conv_out")


def _res(ours: str, theirs: str, shortcut: bool) -> Iterator[Pair]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield from layer(f"{ours}.{name}", f"{theirs}.{name}")
    if shortcut:
        yield from layer(f"{ours}.nin_shortcut", f"{theirs}.conv_shortcut")


def _attention(ours: str, theirs: str) -> Iterator[Pair]:
    yield from layer(f"{ours}.norm", f"{theirs}.group_norm")
    for here, there in ATTENTION.items():
        yield from matrix(f"{ours}.{here}", f"{theirs}.{there}", ones=2)


def to_config(autoencoder: Autoencoder, scale: float, sample_size: int | None) -> Config:
    """The config.json of a first stage.

    Raises:
      UserError: diffusers has no such first stage.
    """
    kl = not autoencoder.codebook_size
    if kl and autoencoder.embed_dim != autoencoder.z_channels:
        raise UserError(
            f"diffusers' {KL} has no first_stage.embed_dim ({autoencoder.embed_dim}) other than"
            f" first_stage.z_channels ({autoencoder.z_channels})"
        )
    levels = range(len(autoencoder.channel_mult))
    attention = ["Attn" * (level in autoencoder.attention_levels) for level in levels]
    config = dict(
        SAME,
        _class_name=KL if kl else VQ,
        block_out_channels=[mult * autoencoder.channels for mult in autoencoder.channel_mult],
        down_block_types=[f"{a}DownEncoderBlock2D" for a in attention],
        in_channels=autoencoder.image_channels,
        latent_channels=autoencoder.z_channels,
        layers_per_block=autoencoder.num_res_blocks,
        mid_block_add_attention=autoencoder.mid_attention,
        norm_num_groups=autoencoder.num_groups,
        out_channels=autoencoder.image_channels,
        scaling_factor=scale,
        up_block_types=[f"{a}UpDecoderBlock2D" for a in reversed(attention)],
    )
    if autoencoder.channel_mult[0] != 1:
        raise UserError(
            "diffusers has no first stage with first_stage.channel_mult"
            f" {list(autoencoder.channel_mult)}: its first convolution has as many channels as its"
            " first level"
        )
    if sample_size is not None:
        config["sample_size"] = sample_size
    if not kl:
        config["num_vq_embeddings"] = autoencoder.codebook_size
        config["vq_embed_dim"] = autoencoder.embed_dim
    return config


def from_config(config: Mapping[str, Any], place: str) -> tuple[Config, Autoencoder]:
    """The section `first_stage` of a config.json, and the network.

    Raises:
      UserError: a first stage that this package does not have, or an entry that is missing.
    """
    name = config["_class_name"]
    config = {**SAME, **OFF, **SHARED, **DEFAULTS[name], **config}
    widths = listed(config, "block_out_channels", int, place)
    types = listed(config, "down_block_types", str, place)
    latent = number(config, "latent_channels", place)
    section: Config = dict(
        channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=number(config, "layers_per_block", place),
        z_channels=latent,
        embed_dim=latent,
        attention_levels=tuple(level for level, kind in enumerate(types) if "Attn" in kind),
        mid_attention=bool(config["mid_block_add_attention"]),
        image_channels=number(config, "in_channels", place),
        num_groups=number(config, "norm_num_groups", place),
    )
    if name == VQ:
        section["codebook_size"] = number(config, "num_vq_embeddings", place)
        if config.get("vq_embed_dim") is not None:
            section["embed_dim"] = number(config, "vq_embed_dim", place)
    autoencoder = Autoencoder(**section)
    try:
        ours = to_config(autoencoder, scale_of(config, place), config["sample_size"])
    except UserError as error:
        raise UserError(f"{place!r}: {error}") from error
    if name == VQ and config.get("vq_embed_dim") is None:
        del ours["vq_embed_dim"]
    check(config, {**OFF, **ours}, place)
    return dict(kind="vq" if name == VQ else "kl", **section), autoencoder


def scale_of(config: Mapping[str, Any], place: str) -> float:
    """The latent scale.

    Raises:
      UserError: it is no positive number.
    """
    scale = {**DEFAULTS[config["_class_name"]], **config}["scaling_factor"]
    if not isinstance(scale, int | float) or not scale > 0:
        raise UserError(f"{place!r}: scaling_factor is {scale!r}, not a positive number")
    return float(scale)
