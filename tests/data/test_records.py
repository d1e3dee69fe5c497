import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.data.records import ArrayRecord, Tfds, write_array_record
from latent_diffusion_jax.data.shapes import Shapes
from latent_diffusion_jax.data.transforms import read_rgb
from latent_diffusion_jax.errors import UserError


def test_array_record_round_trip(tmp_path):
    shapes = Shapes(split="train", size=7)
    write_array_record(tmp_path / "a/train-0.array_record", (shapes[i] for i in range(4)))
    write_array_record(tmp_path / "a/train-1.array_record", (shapes[i] for i in range(4, 7)))
    write_array_record(tmp_path / "a/validation-0.array_record", [{"image": shapes[0]["image"]}])
    path = str(tmp_path / "a/{split}-*.array_record")
    train = ArrayRecord(split="train", path=path, class_names=shapes.class_names)
    assert (len(train), train.num_classes) == (7, 12)
    for i in (6, 0, 3):
        expected = {key: shapes[i][key] for key in ("image", "label", "caption")}
        assert train[i].keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(train[i][key], value)
        assert train[i]["label"].dtype == np.int32
    held = ArrayRecord(split="validation", path=path)
    assert (len(held), held.num_classes, held.class_names) == (1, None, None)
    assert held[0].keys() == {"image"}


def test_array_record_faults(tmp_path):
    with pytest.raises(UserError, match="must hold {split}"):
        ArrayRecord(split="train", path="data/*.array_record")
    with pytest.raises(UserError, match="no file matches '.*train.array_record'"):
        ArrayRecord(split="train", path=tmp_path / "{split}.array_record")
    image = Shapes(split="train")[0]["image"]
    write_array_record(tmp_path / "train.array_record", [{"image": image, "label": 5}])
    source = ArrayRecord(split="train", path=tmp_path / "{split}.array_record", num_classes=5)
    with pytest.raises(UserError, match="record 0: label 5 of 5"):
        source[0]
    (tmp_path / "validation.array_record").write_bytes(b"not a record file")
    with pytest.raises(UserError, match="cannot read .* as array_record"):
        ArrayRecord(split="validation", path=tmp_path / "{split}.array_record")


def test_array_record_of_another_kind_is_named(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "train.array_record"), "group_size:1")
    writer.write(b"\x05\x00\x00\x00{}???")
    writer.close()
    source = ArrayRecord(split="train", path=tmp_path / "{split}.array_record")
    with pytest.raises(UserError, match="record 0 is broken"):
        source[0]


def prepare_tfds(data_dir: Path, number: int) -> list[bytes]:
    """A data set as `tfds build --file_format=array_record` leaves it, made without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    place = data_dir / "tiny/1.0.0"
    source = data_dir / "png"
    source.mkdir()
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
            "text": tfds.features.Text(),
        }
    )
    place.mkdir(parents=True)
    features.save_config(str(place))
    writer = ArrayRecordWriter(
        str(place / "tiny-train.array_record-00000-of-00001"), "group_size:1"
    )
    encoded = []
    for i in range(number):
        Image.fromarray(Shapes(split="train")[i]["image"]).save(source / f"{i}.png")
        encoded.append((source / f"{i}.png").read_bytes())
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(encoded[-1])
        example.features.feature["label"].int64_list.value.append(i % 3)
        example.features.feature["text"].bytes_list.value.append(f"number {i}".encode())
        writer.write(example.SerializeToString())
    writer.close()
    split = {
        "name": "train",
        "shardLengths": [str(number)],
        "numBytes": "1000",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (place / "dataset_info.json").write_text(json.dumps(info))
    return encoded


def test_tfds_reads_a_prepared_data_set(tmp_path):
    encoded = prepare_tfds(tmp_path, 10)
    options = {
        "dataset": "tiny",
        "data_dir": str(tmp_path),
        "train_split": "train[:80%]",
        "validation_split": "train[80%:]",
        "caption_key": "text",
    }
    train, held = Tfds(split="train", **options), Tfds(split="validation", **options)
    assert (len(train), len(held)) == (8, 2)
    assert (train.num_classes, train.class_names) == (3, ("a", "b", "c"))
    assert [int(train[i]["label"]) for i in range(4)] == [0, 1, 2, 0]
    assert held[1]["caption"] == "number 9"
    file = tmp_path / "nine.png"
    file.write_bytes(encoded[9])
    np.testing.assert_array_equal(held[1]["image"], read_rgb(str(file)))
    with pytest.raises(UserError, match="no split 'train2'; it has train"):
        Tfds(split="train", **options | {"train_split": "train2"})
    with pytest.raises(UserError, match="no feature 'img'; it has"):
        Tfds(split="train", **options | {"image_key": "img"})


@pytest.mark.parametrize("dataset", ["mnist", "nobodys_data_set"])
def test_tfds_says_what_to_run_where_nothing_is_prepared(tmp_path, dataset):
    command = f"tfds build {dataset} --file_format=array_record --data_dir={tmp_path}"
    with pytest.raises(UserError, match=command) as caught:
        Tfds(split="train", dataset=dataset, data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_importing_sources_is_light():
    code = (
        "import sys, latent_diffusion_jax.data.sources;"
        "print([m for m in ('tensorflow', 'torch', 'tensorflow_datasets', 'grain')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
