"""Name -> random-access source of images with their labels and captions.

Every source has `__len__`, `__getitem__(index) -> dict` with `image` uint8 [H, W, 3] at its own
size and, where known, `label` int32 and `caption` str, and the attributes `num_classes` (int or
None) and `class_names` (tuple of str or None).
"""

import inspect
from typing import Any

from latent_diffusion_jax.data.folder import Folder
from latent_diffusion_jax.data.records import ArrayRecord, Tfds
from latent_diffusion_jax.data.shapes import Shapes
from latent_diffusion_jax.errors import UserError, choose

SOURCES = {"shapes": Shapes, "folder": Folder, "tfds": Tfds, "array_record": ArrayRecord}


def make_source(*, name: str, split: str, **options: Any) -> Any:
    """The source called `name` for split "train" or "validation"; options as its class has them.

    Raises:
      UserError: an unknown name, split or option, or what the source raises.
    """
    source = choose("data source", name, SOURCES)
    choose("split", split, {"train": 0, "validation": 1})
    try:
        inspect.signature(source).bind(split=split, **options)
    except TypeError as error:
        known = ", ".join(key for key in inspect.signature(source).parameters if key != "split")
        raise UserError(f"data source {name!r}: {error}; its options: {known}") from None
    return source(split=split, **options)
