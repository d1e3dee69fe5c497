"""Layout tokens against the original's tables."""

import json

import jax
import numpy as np
import pytest

from latent_diffusion_jax.conditioning.layout import (
    WHOLE,
    Boxes,
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


def boxes_of(*layouts, encode_crop=True, crop=WHOLE):
    """The context that `Boxes` makes of layouts of 3 objects at most; weights are always alike."""
    options = dict(vocab_size=1024, max_objects=3, num_classes=12)
    tokens = np.stack(
        [layout_tokens(each, **options, encode_crop=encode_crop, crop=crop) for each in layouts]
    )
    network = Boxes(1024, 12, 8)
    return np.asarray(network.apply(network.init(jax.random.key(0), tokens), tokens))


def test_a_box_is_a_token_of_its_own():
    a, b = Object(3, (0.1, 0.2, 0.4, 0.7)), Object(5, (0.5, 0.5, 0.9, 0.8), occluded=True)
    ab, ba, alone = boxes_of([a, b], [b, a], [a])
    assert ab.shape == (4, 8)  # three objects and the crop
    np.testing.assert_allclose(ab[[1, 0, 2, 3]], ba, atol=1e-6)
    np.testing.assert_allclose(alone[[0, 2, 3]], ab[[0, 2, 3]], atol=1e-6)
    np.testing.assert_allclose(alone[1], alone[2], atol=1e-6)  # absent
    assert boxes_of([a], encode_crop=False).shape == (1, 3, 8)


def test_all_of_a_box_is_in_its_token():
    thing = Object(3, (0.1, 0.2, 0.4, 0.7))
    others = [
        thing._replace(category=4),
        thing._replace(inside=True),
        thing._replace(box=(0.2, 0.2, 0.4, 0.7)),
        thing._replace(box=(0.1, 0.3, 0.4, 0.7)),
        thing._replace(box=(0.1, 0.2, 0.5, 0.7)),
        thing._replace(box=(0.1, 0.2, 0.4, 0.8)),
    ]
    first, *changed = boxes_of([thing], *([other] for other in others))
    for each in changed:
        assert np.abs(each[0] - first[0]).max() > 0.01
        np.testing.assert_allclose(each[1:], first[1:], atol=1e-6)
    cropped = boxes_of([thing], crop=(0.0, 0.0, 0.5, 1.0))[0]
    assert np.abs(cropped[3] - first[3]).max() > 0.01


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(encoder="box"), "unknown conditioning.encoder 'box'; did you mean 'boxes'"),
        (dict(encoder="boxes", depth=2), "depth 2: the encoder 'transformer' has at least 1"),
        (dict(), "depth 0: the encoder 'transformer' has at least 1, 'boxes' 0"),
    ],
)
def test_encoders_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        layout(num_classes=3, dim=8, **options)
