"""Which diffusers pipeline a model is, and what it calls its parts.

A model for which diffusers has no pipeline (classes, layouts, segmentation, LDM's inpainting) is
a folder of components, which load one by one, without a `model_index.json`; its condition is then
told in `conditioning/`: our section as config.json, and its weights under the published names.

`LDMTextToImagePipeline` takes every first stage's f for 8: with another, ask it for a height and
width of 8 times the latent's.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

SUPER_RESOLUTION = "LDMSuperResolutionPipeline"
CONTEXT = {"clip", "embeddings", "label", "layout", "text"}  # kinds that the UNet attends to
WEIGHTLESS = {"embeddings", "inpainting", "lowres", "none"}


class Layout(NamedTuple):
    """A pipeline's name (None: components only); folders of first stage and text encoder."""

    pipeline: str | None
    first_stage: str = "vqvae"
    text: str | None = None


COMPONENTS = Layout(None, "vae")
LAYOUTS = {
    frozenset({"none"}): Layout("LDMPipeline"),
    frozenset({"text"}): Layout("LDMTextToImagePipeline", text="bert"),
    frozenset({"clip"}): Layout("StableDiffusionPipeline", "vae", "text_encoder"),
    frozenset({"clip", "inpainting"}): Layout(
        "StableDiffusionInpaintPipeline", "vae", "text_encoder"
    ),
    frozenset({"lowres"}): Layout(SUPER_RESOLUTION),
}
# Pipelines take these, and can do without them.
OPTIONAL = ("feature_extractor", "image_encoder", "safety_checker")


def conditions(conditioning: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Kind -> section, of one condition or of several."""
    if conditioning["kind"] != "several":
        return {conditioning["kind"]: conditioning}
    parts = (section for name, section in conditioning.items() if name != "kind")
    return {section["kind"]: section for section in parts}


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The layout of the model that a config describes."""
    kinds = conditions(config["conditioning"])
    stage = config["first_stage"]
    layout = LAYOUTS.get(frozenset(kinds), COMPONENTS)
    if stage["kind"] == "identity":
        return Layout("DDIMPipeline") if set(kinds) == {"none"} else COMPONENTS
    vae_only = layout.first_stage == "vae" and stage["kind"] != "kl"
    ldm_mask = "inpainting" in kinds and kinds["inpainting"].get("mask") != "stable_diffusion"
    # that pipeline knows no latent scale, and gives the latent as many channels as the image
    unlike = "lowres" in kinds and (config["latents"]["scale"] != 1 or stage["embed_dim"] != 3)
    return COMPONENTS if vae_only or ldm_mask or unlike else layout


def model_index(
    layout: Layout, parts: Mapping[str, tuple[str | None, str | None]]
) -> dict[str, Any]:
    """model_index.json: name of each part -> its library and class."""
    index: dict[str, Any] = {"_class_name": layout.pipeline}
    index |= {name: list(where) for name, where in parts.items()}
    if layout.pipeline and layout.pipeline.startswith("StableDiffusion"):
        index |= {name: [None, None] for name in OPTIONAL}
        index["requires_safety_checker"] = False
    return index
