"""Layout tokens against the original's tables."""

import json

import numpy as np
import pytest

from latent_diffusion_jax.conditioning.layout import (
    WHOLE,
    Object,
    class_token,
    corner_token,
    layout,
    layout_tokens,
    token_corner,
)
from latent_diffusion_jax.errors import UserError
from tests.published import GOLDEN

TABLES = json.loads((GOLDEN / "layout_tokens.json").read_text())


def corners(xywh):
    x, y, w, h = xywh
    return x, y, x + w, y + h


def object_of(row, *, flags=True):
    names = ("is_group_of", "is_occluded", "is_depiction", "is_inside")
    kept = [row[name] and flags for name in names]
    return Object(row["category_no"], corners(row["bbox_xywh"]), *kept)


def test_corners():
    for row in TABLES["coordinates"]:
        token = corner_token(row["x"], row["y"], row["no_tokens"])
        assert token == row["token"]
        np.testing.assert_allclose(token_corner(token, row["no_tokens"]), row["back"])


def test_classes_and_boxes():
    for row in TABLES["boxes"]:
        thing = object_of(row)
        assert class_token(thing, 300) == row["object_representation"]
        options = dict(vocab_size=8192, max_objects=1, num_classes=300, encode_crop=False)
        assert layout_tokens([thing], **options).tolist() == row["tokens"]


@pytest.mark.parametrize("index", range(len(TABLES["sequences"])))
def test_sequences(index):
    row = TABLES["sequences"][index]
    crop = row["crop_coordinates_xywh"]
    tokens = layout_tokens(
        [object_of(o, flags=row["use_additional_parameters"]) for o in row["objects"]],
        vocab_size=row["no_tokens"],
        max_objects=row["no_max_objects"],
        num_classes=row["no_object_classes"],
        crop=corners(crop) if crop else WHOLE,
        encode_crop=row["encode_crop"],
        flip=row["horizontal_flip"],
    )
    assert len(tokens) == row["embedding_dim"]
    assert tokens.tolist() == row["tokens"]


def test_null_is_the_empty_layout():
    conditioner = layout(num_classes=3, dim=8, depth=1)
    tokens = conditioner.inputs(64, 64)["tokens"]
    assert tokens.shape == (92,)
    null = conditioner.null({}, {"tokens": np.zeros((2, 92), np.int32)})["tokens"]
    assert null.shape == (2, 92)
    assert null[1].tolist() == [8191] * 90 + [0, 8099]


@pytest.mark.parametrize(
    "thing,message",
    [
        (Object(3, WHOLE), "class 3 is not one of 0..2"),
        (Object(1, (0.5, 0.0, 0.4, 1.0)), r"\[0.5, 0.0, 0.4, 1.0\] is not x0 <= x1"),
    ],
)
def test_bad_layouts_are_one_clear_line(thing, message):
    with pytest.raises(UserError, match=message):
        layout_tokens([thing], vocab_size=8192, max_objects=30, num_classes=3)
