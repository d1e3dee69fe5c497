import itertools
import json
import mmap

import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.data import latents
from latent_diffusion_jax.data.latents import Latents
from latent_diffusion_jax.data.loader import make_loader
from latent_diffusion_jax.data.shards import (
    begin,
    finish,
    partial_of,
    shard_rows,
    unfinished,
    write_null,
    write_shard,
)
from latent_diffusion_jax.errors import UserError

MOMENTS = np.random.default_rng(0).standard_normal((10, 2, 2, 6)).astype(np.float32)
LABELS = np.arange(10, dtype=np.int32)
FINGERPRINT = {"data": {"name": "shapes", "shapes": (1, 1)}, "checkpoint": 7}


def batches(part, size=2):
    for start in range(part.start, part.stop, size):
        rows = slice(start, min(start + size, part.stop))
        yield {"moments": MOMENTS[rows], "label": LABELS[rows]}


def gather(directory, plan=FINGERPRINT, rows=4):
    """Begins a cache and writes the shards that are not there; returns their numbers."""
    partial = begin(directory, plan, 10, rows)
    numbers = unfinished(partial, 10, rows)
    for number in numbers:
        part = shard_rows(number, 10, rows)
        write_shard(partial, number, batches(part), len(part))
    return numbers


def write(directory, rows=4, **options):
    gather(directory, rows=rows)
    finish(
        directory, **{"fingerprint": FINGERPRINT, "latent_scale": 0.5, "num_classes": 10} | options
    )


@pytest.fixture
def cache(tmp_path):
    write(tmp_path / "latents")
    return tmp_path / "latents"


def test_round_trip(cache):
    there = Latents(directory=cache, fingerprint=FINGERPRINT)
    there.verify()
    assert (len(there), there.latent_scale, there.num_classes) == (10, 0.5, 10)
    assert there.class_names is None
    np.testing.assert_array_equal(there[9]["moments"], MOMENTS[9])
    indices = np.array([7, 0, 9, 7, 4])
    fetched = there.fetch(indices)
    np.testing.assert_array_equal(fetched["moments"], MOMENTS[indices])
    np.testing.assert_array_equal(fetched["label"], indices)
    assert type(fetched["moments"]) is np.ndarray
    assert fetched["moments"].dtype == np.float32
    for index in (-1, 10):
        with pytest.raises(IndexError):
            there[index]


def test_names_of_classes_are_carried(tmp_path):
    write(tmp_path / "latents", num_classes=2, class_names=("cat", "dog"))
    assert Latents(directory=tmp_path / "latents").class_names == ("cat", "dog")


def test_loads_by_batch(cache):
    options = {"batch_size": 5, "image_size": 8, "seed": 0, "keys": ("moments", "label")}
    loader = make_loader(Latents(directory=cache), train=True, **options)
    first, second = next(loader), next(loader)
    for batch in (first, second):
        np.testing.assert_array_equal(batch["moments"], MOMENTS[batch["label"]])
    assert sorted([*first["label"], *second["label"]]) == list(range(10))


@pytest.mark.parametrize("count", [3, 5])
def test_a_wrong_number_of_rows_is_no_shard(tmp_path, count):
    partial = begin(tmp_path / "latents", FINGERPRINT, 10, 4)
    with pytest.raises(ValueError, match=f"{count}$"):
        write_shard(partial, 0, batches(range(4), size=4), count)
    assert unfinished(partial, 10, 4) == [0, 1, 2]


def test_a_failure_on_the_way_keeps_the_older_cache(cache):
    def broken():
        yield from batches(range(2))
        raise RuntimeError("out of memory")

    partial = begin(cache, {"other": 1}, 10, 4)
    with pytest.raises(RuntimeError, match="out of memory"):
        write_shard(partial, 0, broken(), 4)
    Latents(directory=cache, fingerprint=FINGERPRINT).verify()


def test_what_was_killed_goes_on_behind_the_last_whole_shard(tmp_path):
    place = tmp_path / "latents"
    partial = begin(place, FINGERPRINT, 10, 4)
    write_shard(partial, 0, batches(range(4)), 4)
    write_shard(partial, 2, batches(range(8, 10)), 2)  # another host's
    (partial / ".00001").mkdir()
    (partial / ".00001" / "moments.npy").write_bytes(b"half")
    with pytest.raises(UserError, match="no cached latents"):
        Latents(directory=place)
    assert gather(place) == [1]
    damaged = partial / "00002" / "moments.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    assert gather(place) == [2]
    finish(place, fingerprint=FINGERPRINT, latent_scale=1.0)
    there = Latents(directory=place)
    there.verify()
    np.testing.assert_array_equal(there.fetch(np.arange(10))["moments"], MOMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


@pytest.mark.parametrize("change", [{"plan": {"checkpoint": 8}}, {"rows": 5}])
def test_shards_of_another_plan_are_made_anew(tmp_path, change):
    gather(tmp_path / "latents")
    assert gather(tmp_path / "latents", **change) == list(range(2 + ("plan" in change)))
    assert partial_of(tmp_path / "latents").is_dir()


def test_a_new_cache_replaces_the_old_but_nothing_else(cache, tmp_path):
    write(cache, latent_scale=2.0)
    assert Latents(directory=cache).latent_scale == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.png").write_bytes(b"dear")
    with pytest.raises(UserError, match="photos' is not a cache of latents"):
        write(tmp_path / "photos")
    assert (tmp_path / "photos/me.png").read_bytes() == b"dear"


def test_another_fingerprint_is_refused_with_the_difference(cache):
    other = {"data": {"name": "folder", "shapes": [1, 1]}, "checkpoint": 7, "extra": 1}
    message = 'data.name: "folder" here, "shapes" in the cache; extra: 1 here, absent in the cache'
    with pytest.raises(UserError, match=message) as caught:
        Latents(directory=cache, fingerprint=other)
    assert "checkpoint" not in str(caught.value)
    assert "data.shapes" not in str(caught.value)  # a tuple and its list are the same


def test_damage_is_noticed(cache):
    file = cache / "00001" / "moments.npy"
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
    assert [shard["moments"]["shape"] for shard in index["shards"]] == [
        [4, 2, 2, 6],
        [4, 2, 2, 6],
        [2, 2, 2, 6],
    ]
    assert index["shards"][2]["label"]["dtype"] == "int32"
    assert index["fingerprint"]["checkpoint"] == 7
    assert sorted(path.name for path in cache.iterdir()) == [
        "00000",
        "00001",
        "00002",
        "index.json",
    ]


@pytest.fixture
def varied(tmp_path):
    """Three variants of seven examples, which say what they are, and a text of each example."""
    examples, variants = np.arange(7)[:, None], np.arange(3)
    moments = (10 * examples + variants).astype(np.float32)[..., None, None, None]
    text = np.asarray(examples[..., None] / 4, jnp.bfloat16)
    partial = begin(tmp_path, FINGERPRINT, 7, 2)
    for number in unfinished(partial, 7, 2):
        rows = np.asarray(shard_rows(number, 7, 2))
        write_shard(partial, number, [{"moments": moments[rows], "text": text[rows]}], len(rows))
    write_null(partial, {"text": np.full((1, 1, 1), -1.5, jnp.bfloat16)})
    finish(tmp_path, fingerprint={}, latent_scale=1.0, variants=3, once=("text",))
    return Latents(directory=tmp_path)


def test_variants_lie_together_and_what_is_the_same_is_kept_once(varied):
    varied.verify()
    assert (len(varied), len(varied.files)) == (7, 5)
    assert varied.files["00000"]["moments"]["shape"] == [2, 3, 1, 1, 1]
    assert varied.files["00000"]["text"]["dtype"] == "bfloat16"
    out = varied.fetch(np.array([6, 0, 3, 0]), np.array([0, 1, 5, 6]))
    assert out["moments"].ravel().tolist() == [60, 1, 32, 0]
    assert out["text"].dtype == jnp.bfloat16
    assert out["text"].ravel().tolist() == [1.5, 0, 0.75, 0]
    assert varied[3]["moments"].item() == 30
    assert varied.null["text"].tolist() == [[-1.5]]
    text = varied.directory / "null" / "text.npy"
    text.write_bytes(text.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"null/text.npy' is damaged"):
        varied.verify()


def test_each_epoch_has_one_variant_and_all_get_used(varied):

    def loader(**more):
        return make_loader(varied, image_size=8, seed=0, train=True, keys=("moments",), **more)

    def rows(loader, count=6):
        return np.stack([batch["moments"].ravel() for batch in itertools.islice(loader, count)])

    alone = rows(loader(batch_size=14)).reshape(12, 7)  # an epoch each
    for epoch in alone:
        assert sorted(epoch // 10) == list(range(7))
    for three in alone.reshape(4, 21):
        assert len(set(three)) == 21
    hosts = [rows(loader(batch_size=7, shard=(host, 2))) for host in range(2)]
    np.testing.assert_array_equal(np.concatenate(hosts, axis=1).reshape(12, 7), alone)
    stopped, resumed = loader(batch_size=14), loader(batch_size=14)
    rows(stopped, 2)
    resumed.set_state(json.loads(json.dumps(stopped.get_state())))
    np.testing.assert_array_equal(rows(resumed, 4).ravel(), alone[4:].ravel())


def test_a_batch_reads_its_own_pages_alone(tmp_path, monkeypatch):
    """Those that are asked for ahead cover every row, and no more than a page around it."""
    moments = np.arange(6 * 3000, dtype=np.float32).reshape(6, 3000, 1, 1)
    partial = begin(tmp_path, FINGERPRINT, 6, 4)
    for number in range(2):
        rows = shard_rows(number, 6, 4)
        batch = {"moments": moments[rows.start : rows.stop]}
        write_shard(partial, number, [batch], len(rows))
    finish(tmp_path, fingerprint={}, latent_scale=1.0)
    asked = []

    class Pages:
        def madvise(self, advice, start, length):
            asked.append((advice, start, length))

    monkeypatch.setattr(latents, "cast", lambda kind, value: Pages())
    out = Latents(directory=tmp_path).fetch(np.array([5, 2]))
    np.testing.assert_array_equal(out["moments"], moments[[5, 2]])
    ends = [(128 + row * 12_000, 128 + (row + 1) * 12_000) for row in (2, 1)]
    for (first, last), (advice, start, length) in zip(ends, asked, strict=True):
        assert advice == mmap.MADV_WILLNEED
        assert start % mmap.PAGESIZE == 0
        assert first - mmap.PAGESIZE < start <= first
        assert start + length == last


def test_a_cache_of_an_older_form_is_made_again(cache):
    index = json.loads((cache / "index.json").read_text())
    del index["shards"]
    (cache / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="of an older form: run `encode`"):
        Latents(directory=cache)
