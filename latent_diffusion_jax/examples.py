"""What an example of a data set holds -> the inputs of a conditioner, on the host, for training.

The counterpart of `inputs`, which makes them of what a person gives. The options of each kind are
the keys of section `data` that are not the loader's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from latent_diffusion_jax.conditioning.layout import Object, layout_tokens
from latent_diffusion_jax.conditioning.text import make_tokenize
from latent_diffusion_jax.data.degrade import DEGRADATIONS
from latent_diffusion_jax.data.masks import draw_mask
from latent_diffusion_jax.data.transforms import to_float, to_uint8
from latent_diffusion_jax.errors import UserError, choose

Conditioning = Mapping[str, Any]  # of the conditioner
Prepare = Callable[[dict, np.random.Generator], dict[str, np.ndarray]]  # example, cut to size


def as_it_is(conditioning: Conditioning, *, key: str) -> Prepare:
    """What the data has under the conditioner's own name."""
    return lambda example, generator: {key: of(example, key)}


def nothing(conditioning: Conditioning) -> Prepare:
    """Without condition."""
    return lambda example, generator: {}


def label(conditioning: Conditioning) -> Prepare:
    """The class."""
    return as_it_is(conditioning, key="label")


def embeddings(conditioning: Conditioning) -> Prepare:
    """A sequence of embeddings that the data brings, such as CLIP's of an image's neighbours."""
    return as_it_is(conditioning, key="embeddings")


def caption(conditioning: Conditioning, *, tokenizer: str) -> Prepare:
    """The caption's tokens; `tokenizer` as `conditioning.text.make_tokenize` takes it."""
    kind, length = conditioning["kind"], conditioning["max_length"]
    tokenize = make_tokenize(kind, tokenizer, length, conditioning.get("pad"))
    return lambda example, generator: {"tokens": tokenize([of(example, "caption")])[0]}


def layout(conditioning: Conditioning) -> Prepare:
    """The boxes as tokens, in an order drawn anew each time, as published."""
    options = {name: conditioning[name] for name in ("vocab_size", "max_objects", "num_classes")}
    encode_crop = conditioning.get("encode_crop", True)

    def prepare(example, generator):
        boxes, labels = of(example, "boxes"), example["box_labels"]
        known = generator.permutation(np.flatnonzero(labels >= 0))
        objects = [Object(int(labels[i]), tuple(map(float, boxes[i]))) for i in known]  # type: ignore[arg-type]
        return {"tokens": layout_tokens(objects, encode_crop=encode_crop, **options)}

    return prepare


def segmentation(conditioning: Conditioning) -> Prepare:
    """The map of classes."""

    def prepare(example, generator):
        classes = of(example, "segmentation").astype(np.int32)
        if classes.max() >= conditioning["num_classes"]:
            raise UserError(
                f"a segmentation map of the data has class {classes.max()},"
                f" conditioning.num_classes is {conditioning['num_classes']}"
            )
        return {"segmentation": classes}

    return prepare


def lowres(conditioning: Conditioning, *, degradation: str) -> Prepare:
    """The image made small; `degradation` is one of DEGRADATIONS."""
    degrade = choose("degradation", degradation, DEGRADATIONS)

    def prepare(example, generator):
        small = degrade(to_uint8(example["image"]), conditioning["factor"], generator)
        return {"lowres": to_float(small)}

    return prepare


def inpainting(conditioning: Conditioning) -> Prepare:
    """The image and a mask of random strokes or boxes (1 = to be filled)."""

    def prepare(example, generator):
        image = example["image"]
        height, width, _ = image.shape
        return {"image_to_fill": image, "mask": draw_mask(height, width, generator)}

    return prepare


KINDS: dict[str, Callable[..., Prepare]] = {
    "none": nothing,
    "label": label,
    "text": caption,
    "clip": caption,
    "layout": layout,
    "segmentation": segmentation,
    "lowres": lowres,
    "inpainting": inpainting,
    "embeddings": embeddings,
}


def of(example: Mapping[str, Any], key: str) -> Any:
    """An entry of an example, or UserError."""
    if key not in example:
        raise UserError(f"the data has no {key}, which this model is trained on")
    return example[key]
