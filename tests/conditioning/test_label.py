import jax
import numpy as np
import pytest

from latent_diffusion_jax.conditioning.label import label, parse_labels
from latent_diffusion_jax.errors import UserError

NAMES = ("red circle", "blue square", "7")


@pytest.fixture(scope="module")
def classes():
    conditioner = label(num_classes=5, dim=8)
    return conditioner, conditioner.init(jax.random.key(0))


def test_a_label_is_one_token_of_its_own(classes):
    conditioner, params = classes
    cond = conditioner.apply(params, {"label": np.arange(5, dtype=np.int32)})
    assert cond.context.shape == (5, 1, 8)
    assert cond.concat is None
    assert cond.embedding is None
    assert len(np.unique(np.asarray(cond.context), axis=0)) == 5
    again = conditioner.apply(params, {"label": np.int32([3, 3])}).context
    np.testing.assert_array_equal(again, np.asarray(cond.context)[[3, 3]])


def test_null_is_a_row_after_the_classes(classes):
    conditioner, params = classes
    table = params["embedding"]["embedding"]
    null = conditioner.null({}, {"label": np.int32([0, 4])})
    assert table.shape == (6, 8)
    assert null["label"].dtype == np.int32
    context = conditioner.apply(params, null).context
    np.testing.assert_array_equal(context, np.stack([table[5:], table[5:]]))


def test_learns_the_rows_it_sees(classes):
    conditioner, params = classes

    def total(params):
        return conditioner.apply(params, {"label": np.int32([1, 1, 5])}).context.sum()

    gradient = jax.grad(total)(params)["embedding"]["embedding"]
    np.testing.assert_array_equal(gradient[:, 0], [0, 2, 0, 0, 0, 1])


@pytest.mark.parametrize(
    "text,names,expected",
    [
        ("0,2,11", None, [0, 2, 11]),
        (" blue square , 0,red circle", NAMES, [1, 0, 0]),
        ("7", NAMES, [2]),  # a name before a number
        ("8", NAMES, [8]),
    ],
)
def test_labels_by_name_and_number(text, names, expected):
    assert parse_labels(text, 12, names) == expected


@pytest.mark.parametrize(
    "text,names,message",
    [
        ("12", None, "class 12 is not one of 0..11"),
        ("3,-1", NAMES, "class -1 is not one of 0..11"),
        ("red circel", NAMES, "unknown class 'red circel'; did you mean 'red circle'.*blue square"),
        ("circle", None, "unknown class 'circle'; one of 0..11"),
        ("1,,2", None, "unknown class ''"),
        ("²", None, "unknown class '²'"),
    ],
)
def test_bad_labels_are_one_clear_line(text, names, message):
    with pytest.raises(UserError, match=message):
        parse_labels(text, 12, names)
