"""Small models of every kind: a config's sections, parameters by formula, and CompVis tensors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.conditioning.cond import Cond
from latent_diffusion_jax.convert import compvis
from latent_diffusion_jax.first_stage.autoencoder import Autoencoder
from latent_diffusion_jax.nn.transformer import ClipText, TextTransformer
from latent_diffusion_jax.nn.unet import UNet
from tests.published import value, weights

STAGE = dict(
    channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    z_channels=4,
    embed_dim=4,
    attention_levels=(),
    mid_attention=True,
    image_channels=3,
    num_groups=8,
)
KL = dict(kind="kl", **STAGE)
VQ = dict(kind="vq", codebook_size=32, **{**STAGE, "z_channels": 3, "embed_dim": 3})
UNET = dict(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_head_channels=16,
    transformer_depth=0,
    use_scale_shift_norm=False,
    resblock_updown=False,
    linear_projections=False,
    num_groups=16,
)
CONDITIONAL = {**UNET, "attention_resolutions": (1, 2), "transformer_depth": 1}
TEXT = dict(kind="text", vocab_size=60, max_length=77, dim=24, depth=2, num_heads=2, head_dim=8)
CLIP = dict(
    kind="clip",
    vocab_size=60,
    max_length=9,
    dim=24,
    depth=2,
    num_heads=3,
    activation="quick_gelu",
    pad=49407,
)
CLIP_SIZES = dict(vocab_size=49_408, max_length=77)  # what a config may leave out
OPEN_CLIP = {**CLIP, "activation": "gelu", "pad": 0}
INPAINTING = dict(kind="inpainting", mask="stable_diffusion")


def sections(first_stage, unet, conditioning, scale=1.0, **changes):
    """What a diffusers folder tells of a model."""
    factor = 2 ** (len(first_stage.get("channel_mult", (1,))) - 1)
    return (
        dict(
            phase="diffusion",
            first_stage=first_stage,
            unet=unet,
            conditioning=conditioning,
            diffusion=dict(
                schedule=dict(
                    name="linear", timesteps=1000, linear_start=0.0015, linear_end=0.0195
                ),
                prediction="eps",
            ),
            latents=dict(scale=scale),
            sample=dict(timesteps="uniform"),
            data=dict(image_size=8 * factor),
        )
        | changes
    )


SD2 = dict(
    schedule=dict(name="linear", timesteps=1000, linear_start=0.00085, linear_end=0.012),
    prediction="v",
)
LOWRES = dict(kind="lowres", factor=2)
MODELS = {  # name -> (sections, pipeline)
    "unconditional_vq": (sections(VQ, UNET, dict(kind="none")), "LDMPipeline"),
    "unconditional_kl": (sections(KL, UNET, dict(kind="none"), 0.5), "LDMPipeline"),
    "levels": (
        sections(
            {**VQ, "attention_levels": (1,), "mid_attention": False, "embed_dim": 2},
            {**UNET, "channel_mult": (1, 2, 3), "attention_resolutions": (2, 4)},
            dict(kind="none"),
        ),
        "LDMPipeline",
    ),
    "pixels": (
        sections(dict(kind="identity", image_channels=3), UNET, dict(kind="none")),
        "DDIMPipeline",
    ),
    "resampling_blocks": (
        sections(
            KL,
            {**UNET, "resblock_updown": True, "use_scale_shift_norm": True, "num_res_blocks": 2},
            dict(kind="none"),
        ),
        "LDMPipeline",
    ),
    "text": (sections(KL, CONDITIONAL, TEXT, 0.18215), "LDMTextToImagePipeline"),
    "super_resolution": (sections(VQ, UNET, LOWRES), "LDMSuperResolutionPipeline"),
    "stable_diffusion_1": (
        sections(
            KL,
            {
                **{k: v for k, v in CONDITIONAL.items() if k != "num_head_channels"},
                "attention_resolutions": (1,),
                "num_heads": 4,
            },
            CLIP,
            0.18215,
        ),
        "StableDiffusionPipeline",
    ),
    "stable_diffusion_2": (
        sections(
            {**KL, "attention_levels": (0,)},
            {**CONDITIONAL, "linear_projections": True, "transformer_depth": 2},
            OPEN_CLIP,
            0.18215,
            diffusion=SD2,
            sample=dict(timesteps="trailing"),
        ),
        "StableDiffusionPipeline",
    ),
    "stable_diffusion_inpainting": (
        sections(KL, CONDITIONAL, dict(kind="several", text=CLIP, inpainting=INPAINTING), 0.18215),
        "StableDiffusionInpaintPipeline",
    ),
    "classes": (
        sections(VQ, CONDITIONAL, dict(kind="label", num_classes=5, dim=24, null_class=True)),
        None,
    ),
    "segmentation": (
        sections(VQ, UNET, dict(kind="segmentation", num_classes=7, channels=3, halvings=1)),
        None,
    ),
    "ldm_inpainting": (sections(VQ, UNET, dict(kind="inpainting", mask="ldm")), None),
}


class Model(NamedTuple):
    """The networks of a config, their parameters, and all of them as CompVis tensors."""

    config: dict
    networks: dict
    params: dict
    tensors: dict


def parts(config):
    """Kind -> section of the condition."""
    conditioning = config["conditioning"]
    if conditioning["kind"] != "several":
        return {conditioning["kind"]: conditioning}
    return {p["kind"]: p for name, p in conditioning.items() if name != "kind"}


def network(section, module, **more):
    names = module.__dataclass_fields__
    return module(**{k: v for k, v in section.items() if k in names}, **more)


def shapes(module, *inputs):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def concatenated(config):
    """Channels that the UNet takes beside the latent."""
    kinds, stage = parts(config), config["first_stage"]
    if "inpainting" in kinds:
        return stage["embed_dim"] + 1
    return 3 if {"lowres", "segmentation"} & set(kinds) else 0


def make_model(config, fill=weights):
    """`fill` makes parameters of shapes; `lambda shapes, prefix: shapes` keeps those."""
    networks, trees, tensors = {}, {}, {}
    stage = config["first_stage"]
    prefix = "" if config["phase"] == "first_stage" else compvis.FIRST_STAGE
    if stage["kind"] != "identity":
        net = network(stage, Autoencoder)
        networks["first_stage"] = net, prefix, shapes(net, jnp.zeros((1, 64, 64, 3)))
    if config["phase"] == "diffusion":
        kinds = parts(config)
        latent = stage.get("embed_dim", 3)
        dim = next((p["dim"] for p in kinds.values() if "dim" in p), None)
        extra = concatenated(config)
        cond = Cond(
            concat=jnp.zeros((1, 64, 64, extra)) if extra else None,
            context=jnp.zeros((1, 1, dim)) if dim else None,
        )
        net = network(config["unet"], UNet, out_channels=latent)
        tree = shapes(net, jnp.zeros((1, 64, 64, latent)), jnp.zeros((1,), jnp.int32), cond)
        networks["unet"] = net, compvis.UNET, tree
        for kind, module in (("clip", ClipText), ("text", TextTransformer)):
            if kind in kinds:
                net = network({**CLIP_SIZES, **kinds[kind]}, module)
                tree = shapes(net, jnp.zeros((1, 2), jnp.int32))
                networks["text"] = net, f"{compvis.CONDITIONING}transformer.", tree
        tensors |= condition_tensors(kinds)
    linear = config.get("unet", {}).get("linear_projections", False)
    for name, (_, prefix, tree) in networks.items():
        trees[name] = fill(tree, prefix)
        tensors |= {name: (tree, prefix)} if fill is not weights else {}
        if fill is weights:
            made = compvis.write_tree(trees[name], prefix, linear)
            tensors |= {key: make() for key, make in made.items()}
    return Model(config, {k: net for k, (net, _, _) in networks.items()}, trees, tensors)


def condition_tensors(kinds):
    """The weights of conditions that diffusers has no network for."""
    found = {}
    if "label" in kinds:
        found["embedding.weight"] = kinds["label"]["num_classes"] + 1, kinds["label"]["dim"]
    if "segmentation" in kinds:
        section = kinds["segmentation"]
        found["channel_mapper.weight"] = section["channels"], section["num_classes"], 1, 1
    named = {compvis.CONDITIONING + key: shape for key, shape in found.items()}
    return {key: value(key, shape) for key, shape in named.items()}


def apply(model, name, *inputs, **more):
    """A network's result."""
    return np.asarray(
        jax.jit(lambda p, *x: model.networks[name].apply({"params": p}, *x, **more))(
            model.params[name], *inputs
        )
    )
