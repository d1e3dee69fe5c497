"""The UNet's blocks, as diffusers' `UNet2DConditionModel` and `UNet2DModel` name them."""

from collections.abc import Iterator

from latent_diffusion_jax.convert.pairs import UNET, Pair, fused, layer, matrix
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.unet import UNet

PREFIX = UNET
TRANSFORMER_BLOCK = {  # layer, alike in both -> whether it has a bias
    **{f"attn{n}.to_{which}": False for n in (1, 2) for which in "qkv"},
    **dict.fromkeys(("attn1.to_out.0", "attn2.to_out.0", "norm1", "norm2", "norm3"), True),
    **dict.fromkeys(("ff.net.0.proj", "ff.net.2"), True),
}


def pairs(unet: UNet) -> Iterator[Pair]:
    """Every tensor of a UNet."""
    width, last = unet.model_channels, len(unet.channel_mult) - 1
    yield from layer("time_embed.0", "time_embedding.linear_1")
    yield from layer("time_embed.2", "time_embedding.linear_2")
    yield from layer("input_blocks.0.0", "conv_in")
    channels, skips = width, [width]
    for level, mult in enumerate(unet.channel_mult):
        there = f"down_blocks.{level}"
        for i in range(unet.num_res_blocks):
            here = f"input_blocks.{len(skips)}"
            yield from _res(f"{here}.0", f"{there}.resnets.{i}", channels != mult * width)
            channels = mult * width
            if has_attention(unet, level):
                yield from _attention(unet, f"{here}.1", f"{there}.attentions.{i}", channels)
            skips.append(channels)
        if level < last:
            here = f"input_blocks.{len(skips)}.0"
            yield from _resample(unet, here, "op", f"{there}.downsamplers.0")
            skips.append(channels)

    yield from _res("middle_block.0", "mid_block.resnets.0", False)
    yield from _attention(unet, "middle_block.1", "mid_block.attentions.0", channels)
    yield from _res("middle_block.2", "mid_block.resnets.1", False)

    block = 0
    for level, mult in reversed(list(enumerate(unet.channel_mult))):
        there = f"up_blocks.{last - level}"
        for i in range(unet.num_res_blocks + 1):
            here = f"output_blocks.{block}"
            channels += skips.pop()
            yield from _res(f"{here}.0", f"{there}.resnets.{i}", channels != mult * width)
            channels = mult * width
            attention = has_attention(unet, level)
            if attention:
                yield from _attention(unet, f"{here}.1", f"{there}.attentions.{i}", channels)
            if level > 0 and i == unet.num_res_blocks:
                here = f"{here}.{2 if attention else 1}"
                yield from _resample(unet, here, "conv", f"{there}.upsamplers.0")
            block += 1
    yield from layer("out.0", "conv_norm_out")
    yield from layer("out.2", "conv_out")


def _res(ours: str, theirs: str, shortcut: bool) -> Iterator[Pair]:
    yield from layer(f"{ours}.in_layers.0", f"{theirs}.norm1")
    yield from layer(f"{ours}.in_layers.2", f"{theirs}.conv1")
    yield from layer(f"{ours}.emb_layers.1", f"{theirs}.time_emb_proj")
    yield from layer(f"{ours}.out_layers.0", f"{theirs}.norm2")
    yield from layer(f"{ours}.out_layers.3", f"{theirs}.conv2")
    if shortcut:
        yield from layer(f"{ours}.skip_connection", f"{theirs}.conv_shortcut")


def _resample(unet: UNet, ours: str, name: str, theirs: str) -> Iterator[Pair]:
    if unet.resblock_updown:
        yield from _res(ours, theirs, False)
    else:
        yield from layer(f"{ours}.{name}", f"{theirs}.conv")


def _attention(unet: UNet, ours: str, theirs: str, channels: int) -> Iterator[Pair]:
    if unet.transformer_depth == 0:
        names = (f"{theirs}.{name}" for name in ("to_q", "to_k", "to_v"))
        yield from layer(f"{ours}.norm", f"{theirs}.group_norm")
        keys = f"{ours}.qkv.weight", f"{ours}.qkv.bias"
        yield from fused(keys, names, heads_of(unet, channels), ones=1)
        yield from matrix(f"{ours}.proj_out", f"{theirs}.to_out.0", ones=1)
        return
    for name in ("norm", "proj_in", "proj_out"):
        yield from layer(f"{ours}.{name}", f"{theirs}.{name}")
    for i in range(unet.transformer_depth):
        for name, bias in TRANSFORMER_BLOCK.items():
            name = f"transformer_blocks.{i}.{name}"
            yield from layer(f"{ours}.{name}", f"{theirs}.{name}", bias)


def has_attention(unet: UNet, level: int) -> bool:
    """Whether there is attention after each block of a level."""
    return 2**level in unet.attention_resolutions


def heads_of(unet: UNet, channels: int) -> int:
    """How many attention heads there are where there are so many channels.

    Raises:
      UserError: they do not divide the channels.
    """
    divisor = unet.num_heads or unet.num_head_channels
    if not divisor or channels % divisor:
        which = "num_heads" if unet.num_heads else "num_head_channels"
        raise UserError(f"{channels} channels do not divide by unet.{which} = {divisor}")
    return unet.num_heads or channels // divisor


def attended(unet: UNet) -> list[bool]:
    """Whether there is attention at a level, of which the middle block is part of the last."""
    last = len(unet.channel_mult) - 1
    return [has_attention(unet, level) or level == last for level in range(last + 1)]
