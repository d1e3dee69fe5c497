"""The UNet's config.json: `UNet2DConditionModel` with spatial transformers, else `UNet2DModel`."""

from collections.abc import Mapping
from typing import Any

from latent_diffusion_jax.convert.diffusers.config import Config, check, listed, number, plain
from latent_diffusion_jax.convert.diffusers.unet import attended, has_attention, heads_of
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.nn.unet import UNet

CONDITIONAL, PLAIN = "UNet2DConditionModel", "UNet2DModel"

# What every UNet here is, in diffusers' words; its own defaults too.
SAME = dict(
    act_fn="silu",
    center_input_sample=False,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    mid_block_scale_factor=1,
    norm_eps=1e-5,
)
# What diffusers can do and no UNet here does.
OFF = dict(
    add_attention=True,
    addition_embed_type=None,
    attention_type="default",
    class_embed_type=None,
    conv_in_kernel=3,
    conv_out_kernel=3,
    cross_attention_norm=None,
    dual_cross_attention=False,
    encoder_hid_dim=None,
    num_class_embeds=None,
    only_cross_attention=False,
    resnet_out_scale_factor=1.0,
    resnet_skip_time_act=False,
    reverse_transformer_layers_per_block=None,
    time_cond_proj_dim=None,
    time_embedding_act_fn=None,
    time_embedding_dim=None,
    time_embedding_type="positional",
    timestep_post_act=None,
)
# What a config.json may leave out.
DEFAULTS: dict[str, dict[str, Any]] = {
    CONDITIONAL: dict(
        attention_head_dim=8,
        cross_attention_dim=1280,
        in_channels=4,
        layers_per_block=2,
        mid_block_type="UNetMidBlock2DCrossAttn",
        norm_num_groups=32,
        out_channels=4,
        resnet_time_scale_shift="default",
        sample_size=None,
        transformer_layers_per_block=1,
        use_linear_projection=False,
    ),
    PLAIN: dict(
        attention_head_dim=8,
        attn_norm_num_groups=None,
        downsample_type="conv",
        in_channels=3,
        layers_per_block=2,
        mid_block_type="UNetMidBlock2D",
        norm_num_groups=32,
        out_channels=3,
        resnet_time_scale_shift="default",
        sample_size=None,
        upsample_type="conv",
    ),
}
# What may be one value, or a list of one per level.
PER_LEVEL = {
    "attention_head_dim",
    "cross_attention_dim",
    "layers_per_block",
    "only_cross_attention",
    "transformer_layers_per_block",
}


def to_config(
    unet: UNet, in_channels: int, context_dim: int | None, sample_size: int | None
) -> Config:
    """The config.json of a UNet.

    Raises:
      UserError: diffusers has no such UNet.
    """
    widths = [mult * unet.model_channels for mult in unet.channel_mult]
    if unet.channel_mult[0] != 1:
        raise UserError(
            f"diffusers has no UNet with unet.channel_mult {list(unet.channel_mult)}: its first"
            " convolution has as many channels as its first level"
        )
    attention = [has_attention(unet, level) for level in range(len(widths))]
    config = dict(
        SAME,
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=unet.out_channels,
        block_out_channels=widths,
        layers_per_block=unet.num_res_blocks,
        norm_num_groups=unet.num_groups,
        resnet_time_scale_shift="scale_shift" if unet.use_scale_shift_norm else "default",
    )
    own = _conditional if unet.transformer_depth else _plain
    return {**config, **own(unet, widths, attention, context_dim)}


def _conditional(
    unet: UNet, widths: list[int], attention: list[bool], context_dim: int | None
) -> Config:
    if context_dim is None:
        raise UserError("diffusers has no UNet with spatial transformers and no context")
    if unet.resblock_updown:
        raise UserError(
            f"diffusers' {CONDITIONAL} has no residual blocks that change the resolution"
            " (unet.resblock_updown)"
        )
    heads = [
        heads_of(unet, width) if used else unet.num_heads or _rounded(unet, width)
        for width, used in zip(widths, attended(unet), strict=True)
    ]
    return dict(
        _class_name=CONDITIONAL,
        attention_head_dim=plain(heads),  # diffusers' name for how many there are
        cross_attention_dim=context_dim,
        down_block_types=[f"{'CrossAttn' * a}DownBlock2D" for a in attention],
        mid_block_type="UNetMidBlock2DCrossAttn",
        transformer_layers_per_block=unet.transformer_depth,
        up_block_types=[f"{'CrossAttn' * a}UpBlock2D" for a in reversed(attention)],
        use_linear_projection=unet.linear_projections,
    )


def _rounded(unet: UNet, width: int) -> int:
    """The number of heads where there are none: diffusers wants one for each level."""
    return max(width // (unet.num_head_channels or width), 1)


def _plain(unet: UNet, widths: list[int], attention: list[bool], context_dim: int | None) -> Config:
    if context_dim is not None:
        raise UserError(
            "a UNet without spatial transformers (unet.transformer_depth 0) reads no context"
        )
    used = (width for width, used in zip(widths, attended(unet), strict=True) if used)
    head_widths = sorted({width // heads_of(unet, width) for width in used})
    if len(head_widths) > 1 and unet.num_heads != 1:
        raise UserError(
            f"diffusers' {PLAIN} has attention heads of one width, but {unet.num_heads} heads"
            f" (unet.num_heads) are {', '.join(map(str, head_widths))} channels wide"
        )
    kind = "resnet" if unet.resblock_updown else "conv"
    rest = {"resnet": ("ResnetDownsample", "ResnetUpsample"), "conv": ("Down", "Up")}[kind]
    return dict(
        _class_name=PLAIN,
        attention_head_dim=None if unet.num_heads == 1 else head_widths[0],
        attn_norm_num_groups=unet.num_groups if unet.use_scale_shift_norm else None,
        down_block_types=[f"{'AttnDown' if a else rest[0]}Block2D" for a in attention],
        downsample_type=kind,
        mid_block_type="UNetMidBlock2D",
        up_block_types=[f"{'AttnUp' if a else rest[1]}Block2D" for a in reversed(attention)],
        upsample_type=kind,
    )


def from_config(config: Mapping[str, Any], place: str) -> tuple[Config, UNet]:
    """The section `unet` of a config.json, and the network.

    Raises:
      UserError: a UNet that this package does not have, or a config.json that lacks something.
    """
    name = config["_class_name"]
    config = _normal({**SAME, **OFF, **DEFAULTS[name], **config})
    widths = listed(config, "block_out_channels", int, place)
    types = listed(config, "down_block_types", str, place)
    attention = ["Attn" in kind for kind in types]
    section: Config = dict(
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=number(config, "layers_per_block", place),
        attention_resolutions=tuple(2**level for level, a in enumerate(attention) if a),
        transformer_depth=0,
        use_scale_shift_norm=config["resnet_time_scale_shift"] == "scale_shift",
        resblock_updown=config.get("downsample_type") == "resnet",
        linear_projections=bool(config.get("use_linear_projection")),
        num_groups=number(config, "norm_num_groups", place),
    )
    if name == CONDITIONAL:
        section["transformer_depth"] = number(config, "transformer_layers_per_block", place)
        number(config, "cross_attention_dim", place)
    number(config, "in_channels", place)
    section |= _heads(config, widths, [*attention[:-1], True], place)
    unet = UNet(**section, out_channels=number(config, "out_channels", place))
    try:
        context = config.get("cross_attention_dim")
        ours = to_config(unet, config["in_channels"], context, config["sample_size"])
    except UserError as error:
        raise UserError(f"{place!r}: {error}") from error
    del ours["attention_head_dim"]  # read above; where nothing attends, its entry says nothing
    check(config, {**OFF, **_normal(ours)}, place)
    return section, unet


def _heads(config: Config, widths: list[int], used: list[bool], place: str) -> dict[str, int]:
    """How the heads are told: by their number or by their width."""
    value = config["attention_head_dim"]
    if config["_class_name"] == PLAIN and value is None:
        return dict(num_heads=1)
    if not isinstance(value, list):
        head = number(config, "attention_head_dim", place)
        return (
            dict(num_head_channels=head) if config["_class_name"] == PLAIN else dict(num_heads=head)
        )
    heads = listed(config, "attention_head_dim", int, place)
    per_head = {width / n for width, n, u in zip(widths, heads, used) if u}
    if len(per_head) > 1 or not min(per_head).is_integer():
        raise UserError(
            f"{place!r}: attention_head_dim {value} is neither one number of heads nor one width"
        )
    return dict(num_head_channels=int(min(per_head)))


def _normal(config: Mapping[str, Any]) -> Config:
    """What means the same, written the same."""
    config = dict(config)
    for name in ("down_block_types", "up_block_types"):  # the very first releases' names
        if isinstance(config.get(name), list):
            config[name] = [str(kind).removeprefix("UNetRes") for kind in config[name]]
    for name in PER_LEVEL & config.keys():
        config[name] = plain(config[name])
    added = config["resnet_time_scale_shift"] == "default"
    if added and config.get("attn_norm_num_groups") == config["norm_num_groups"]:
        config["attn_norm_num_groups"] = None
    return config
