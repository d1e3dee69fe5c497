import json

import numpy as np
import pytest

from latent_diffusion_jax.data.latents import Latents, write_latents
from latent_diffusion_jax.data.loader import make_loader
from latent_diffusion_jax.errors import UserError

MOMENTS = np.random.default_rng(0).standard_normal((10, 2, 2, 6)).astype(np.float32)
LABELS = np.arange(10, dtype=np.int32)
FINGERPRINT = {"data": {"name": "shapes", "shapes": (1, 1)}, "checkpoint": 7}


def batches(*sizes: int):
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        yield {"moments": MOMENTS[rows], "label": LABELS[rows]}
        start += size


def write(directory, *sizes: int, **options):
    defaults = {"count": 10, "fingerprint": FINGERPRINT, "latent_scale": 0.5, "num_classes": 10}
    write_latents(directory, batches(*sizes), **defaults | options)


@pytest.fixture
def cache(tmp_path):
    write(tmp_path / "latents", 4, 4, 2)
    return tmp_path / "latents"


def test_round_trip(cache):
    latents = Latents(directory=cache, fingerprint=FINGERPRINT)
    latents.verify()
    assert (len(latents), latents.latent_scale, latents.num_classes) == (10, 0.5, 10)
    assert latents.class_names is None
    np.testing.assert_array_equal(latents[9]["moments"], MOMENTS[9])
    indices = np.array([7, 0, 7])
    fetched = latents.fetch(indices)
    np.testing.assert_array_equal(fetched["moments"], MOMENTS[indices])
    np.testing.assert_array_equal(fetched["label"], indices)
    assert type(fetched["moments"]) is np.ndarray
    assert fetched["moments"].dtype == np.float32
    for index in (-1, 10):
        with pytest.raises(IndexError):
            latents[index]


def test_names_of_classes_are_carried(tmp_path):
    write(tmp_path / "latents", 10, num_classes=2, class_names=("cat", "dog"))
    assert Latents(directory=tmp_path / "latents").class_names == ("cat", "dog")


def test_loads_by_batch(cache):
    options = {"batch_size": 5, "image_size": 8, "seed": 0, "keys": ("moments", "label")}
    loader = make_loader(Latents(directory=cache), train=True, **options)
    first, second = next(loader), next(loader)
    for batch in (first, second):
        np.testing.assert_array_equal(batch["moments"], MOMENTS[batch["label"]])
    assert sorted([*first["label"], *second["label"]]) == list(range(10))


@pytest.mark.parametrize("sizes, count", [((4, 4), 10), ((4, 4, 2), 9)])
def test_a_wrong_number_of_rows_leaves_nothing_behind(tmp_path, sizes, count):
    with pytest.raises(ValueError, match=f"{count}$"):
        write(tmp_path / "latents", *sizes, count=count)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_on_the_way_keeps_the_older_cache(cache):
    def broken():
        yield from batches(4)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_latents(cache, broken(), count=10, fingerprint={}, latent_scale=1.0)
    Latents(directory=cache, fingerprint=FINGERPRINT).verify()
    assert [path.name for path in cache.parent.iterdir()] == ["latents"]


def test_what_a_killed_run_left_is_swept_away(tmp_path):
    partial = tmp_path / ".latents.partial"
    partial.mkdir()
    (partial / "moments.npy").write_bytes(b"half")
    with pytest.raises(UserError, match="no cached latents"):
        Latents(directory=tmp_path / "latents")
    write(tmp_path / "latents", 10)
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_a_new_cache_replaces_the_old_but_nothing_else(cache, tmp_path):
    write(cache, 10, latent_scale=2.0)
    assert Latents(directory=cache).latent_scale == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.png").write_bytes(b"dear")
    with pytest.raises(UserError, match="photos' is not a cache of latents"):
        write(tmp_path / "photos", 10)
    assert (tmp_path / "photos/me.png").read_bytes() == b"dear"


def test_another_fingerprint_is_refused_with_the_difference(cache):
    other = {"data": {"name": "folder", "shapes": [1, 1]}, "checkpoint": 7, "extra": 1}
    message = 'data.name: "folder" here, "shapes" in the cache; extra: 1 here, absent in the cache'
    with pytest.raises(UserError, match=message) as caught:
        Latents(directory=cache, fingerprint=other)
    assert "checkpoint" not in str(caught.value)
    assert "data.shapes" not in str(caught.value)  # a tuple and its list are the same


def test_damage_is_noticed(cache):
    file = cache / "moments.npy"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(UserError, match="moments.npy' is damaged"):
        Latents(directory=cache).verify()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"has {len(whole) - 1} bytes instead of {len(whole)}"):
        Latents(directory=cache)
    file.unlink()
    with pytest.raises(UserError, match="has 0 bytes"):
        Latents(directory=cache)
    index = cache / "index.json"
    index.write_text(index.read_text()[:40])
    with pytest.raises(UserError, match="index.json' is broken"):
        Latents(directory=cache)


def test_index_is_readable(cache):
    index = json.loads((cache / "index.json").read_text())
    assert index["files"]["moments"]["shape"] == [10, 2, 2, 6]
    assert index["files"]["label"]["dtype"] == "int32"
    assert index["fingerprint"]["checkpoint"] == 7
