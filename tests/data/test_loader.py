import itertools
import json

import numpy as np
import pytest

from latent_diffusion_jax.data.loader import make_loader
from latent_diffusion_jax.data.shapes import Shapes
from latent_diffusion_jax.errors import UserError


class Numbered:
    """Images of unequal size whose first pixel and label say which they are."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        image = np.zeros((8, 8 + index % 3, 3), np.uint8)
        image[..., 0] = np.arange(image.shape[1])
        return {"image": image, "label": np.int32(index), "caption": "a" * (index + 1)}


class Fetched(Numbered):
    """A source that is read a batch at a time."""

    def fetch(self, indices: np.ndarray, turns: np.ndarray | int = 0) -> dict:
        assert isinstance(indices, np.ndarray)
        return {"moments": indices.astype(np.float32), "label": indices.astype(np.int32)}

    def __getitem__(self, index: int) -> dict:
        return {key: value[0] for key, value in self.fetch(np.array([index])).items()}


def loader(source=None, **options):
    defaults = {"batch_size": 4, "image_size": 8, "seed": 0, "train": True}
    return make_loader(Numbered(10) if source is None else source, **defaults | options)


def take(iterator, count: int) -> list[dict]:
    return list(itertools.islice(iterator, count))


def labels(batches) -> list[int]:
    return np.concatenate([batch["label"] for batch in batches]).tolist()


def assert_same(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b) > 0
    for one, other in zip(a, b):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_batches_are_stacked_float_images():
    (batch,) = take(loader(keys=("image", "label", "caption")), 1)
    assert batch["image"].shape == (4, 8, 8, 3)
    assert batch["image"].dtype == np.float32
    assert batch["image"].min() == -1
    assert batch["label"].dtype == np.int32
    assert [len(text) - 1 for text in batch["caption"]] == batch["label"].tolist()


def test_every_epoch_is_another_permutation():
    stream = labels(take(loader(batch_size=5), 8))
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_and_transforms_depend_on_the_seed_alone():
    options = {"crop": "random", "flip": True}
    first = take(loader(**options), 6)
    assert_same(first, take(loader(**options, threads=1, buffer=1), 6))
    assert labels(first) != labels(take(loader(seed=1, **options), 6))


def test_augmentation_is_drawn_anew_for_every_example_and_epoch():
    images = [b["image"] for b in take(loader(crop="random", flip=True), 50)]
    rows = np.concatenate(images)[:, 0, :, 0]  # a ramp: its start is the crop, its slope the flip
    assert {bool(row[0] < row[-1]) for row in rows} == {True, False}
    starts = {round(float(min(row[0], row[-1]) + 1) * 127.5) for row in rows}
    assert starts == {0, 1, 2}
    flips = np.mean([row[0] > row[-1] for row in rows])
    assert 0.35 < flips < 0.65  # 200 draws: 0.5 within 4 standard deviations


def test_resumes_exactly_from_json():
    options = {"crop": "random", "flip": True}
    whole = take(loader(**options), 12)
    stopped = loader(**options)
    take(stopped, 5)
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = loader(**options)
    resumed.set_state(state)
    assert_same(whole[5:], take(resumed, 7))
    take(stopped, 2)
    stopped.set_state(state)  # an iterator in use can go back as well
    assert_same(whole[5:], take(stopped, 7))


@pytest.mark.parametrize("source", [Numbered(10), Fetched(10)])
@pytest.mark.parametrize("hosts", [2, 4])
def test_the_global_batch_is_the_same_on_any_number_of_hosts(source, hosts):
    keys = ("moments", "label") if isinstance(source, Fetched) else ("image", "label")
    options = {"keys": keys, "crop": "random", "flip": True}
    alone = take(loader(source, batch_size=8, **options), 7)
    shards = [
        take(loader(source, batch_size=8 // hosts, shard=(host, hosts), **options), 7)
        for host in range(hosts)
    ]
    for step, batch in enumerate(alone):
        for key in keys:
            rows = np.concatenate([shard[step][key] for shard in shards])
            np.testing.assert_array_equal(rows, batch[key])


def test_resumes_on_another_number_of_hosts():
    alone = loader(batch_size=4)
    take(alone, 3)
    rest = take(alone, 4)
    hosts = [loader(batch_size=2, shard=(host, 2)) for host in range(2)]
    for host in hosts:
        host.set_state({"next_index": 3})
    shards = [take(host, 4) for host in hosts]
    for step, batch in enumerate(rest):
        rows = np.concatenate([shard[step]["label"] for shard in shards])
        np.testing.assert_array_equal(rows, batch["label"])


def test_a_batch_may_be_larger_than_the_data():
    (batch,) = take(loader(Numbered(3), batch_size=7), 1)
    assert sorted(np.bincount(batch["label"]).tolist()) == [2, 2, 3]


def test_evaluation_is_one_pass_in_order_without_augmentation():
    batches = list(loader(train=False, crop="random", flip=True))
    assert [len(batch["label"]) for batch in batches] == [4, 4, 2]
    assert labels(batches) == list(range(10))
    starts = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    expected = [(i % 3) // 2 for i in range(10)]  # the middle of 8, 9 or 10 columns
    np.testing.assert_array_equal(np.rint((starts + 1) * 127.5), expected)


def test_variants_are_cut_each_in_its_own_way():
    """The condition is of the same cut; more of them, or a part of the examples: the same again."""

    def prepare(example, generator):
        return {"corner": example["image"][0, 0, 0]}

    options = {"train": False, "crop": "random", "flip": True, "batch_size": 10}
    options |= {"prepare": prepare, "keys": ("image", "label", "corner")}
    (six,) = loader(variants=6, **options)
    assert six["image"].shape == (10, 6, 8, 8, 3)
    np.testing.assert_array_equal(six["label"], np.arange(10)[:, None].repeat(6, axis=1))
    np.testing.assert_array_equal(six["corner"], six["image"][:, :, 0, 0, 0])
    assert len(np.unique(six["image"][2], axis=0)) > 2
    (three,) = loader(variants=3, part=range(4, 7), **options)
    np.testing.assert_array_equal(three["image"], six["image"][4:7, :3])


def test_evaluation_gives_hosts_equally_many():
    options = {"batch_size": 2, "train": False}
    shards = [list(loader(Numbered(11), shard=(host, 2), **options)) for host in range(2)]
    assert labels(shards[0]) == [0, 1, 4, 5]
    assert labels(shards[1]) == [2, 3, 6, 7]


def test_fetched_sources_are_gathered_by_batch():
    stream = labels(take(loader(Fetched(10), keys=("moments", "label")), 5))
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    (last,) = list(loader(Fetched(3), keys=("moments",), train=False))
    np.testing.assert_array_equal(last["moments"], [0, 1, 2])


def test_every_entry_of_the_shapes_can_be_batched():
    keys = ("image", "label", "caption", "boxes", "box_labels", "segmentation")
    source = Shapes(split="train", shapes=(1, 3))
    (batch,) = take(loader(source, image_size=32, keys=keys), 1)
    assert batch["boxes"].shape == (4, 3, 4)
    assert batch["segmentation"].shape == (4, 32, 32)
    assert batch["caption"].shape == (4,)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"seed": -1}, "seed -1"),
        ({"keys": ("image", "depth")}, "no depth; it has image, label, caption"),
        ({"crop": "middle"}, "unknown crop 'middle'"),
        ({"train": False, "shard": (0, 11)}, "10 examples are too few for 11 hosts of 4 rows"),
        ({"source": Numbered(0)}, "0 examples"),
    ],
)
def test_faults(options, message):
    with pytest.raises(UserError, match=message):
        loader(**options)


def test_a_fault_of_the_source_arrives_as_it_is():
    class Broken(Numbered):
        def __getitem__(self, index):
            if index == 5:
                raise UserError("image 5 can no longer be read")
            return super().__getitem__(index)

    with pytest.raises(UserError, match="image 5 can no longer be read"):
        take(loader(Broken(10)), 5)
