import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.data.folder import Folder
from latent_diffusion_jax.errors import UserError


def paint(path: Path, shade: int = 0, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 3), shade).save(path)


def describe(folder: Path, *records: dict | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def described(tmp_path) -> Path:
    for split, names in (("train", "abc"), ("test", "d")):
        for shade, name in enumerate(names):
            paint(tmp_path / split / f"{name}.png", shade)
        describe(
            tmp_path / split,
            *(
                {"file_name": f"{n}.png", "text": f"a {n}", "label": "xyx"["abcd".index(n) % 3]}
                for n in names
            ),
        )
    return tmp_path


def test_metadata_gives_labels_and_captions(described):
    train = Folder(split="train", path=described)
    assert (len(train), train.num_classes, train.class_names) == (3, 2, ("x", "y"))
    examples = [train[i] for i in range(3)]
    assert [int(e["label"]) for e in examples] == [0, 1, 0]
    assert examples[0]["label"].dtype == np.int32
    assert [e["caption"] for e in examples] == ["a a", "a b", "a c"]
    np.testing.assert_array_equal(examples[2]["image"], np.full((3, 4, 3), 2, np.uint8))


def test_both_splits_number_classes_as_training_does(described):
    describe(described / "test", {"file_name": "d.png", "text": "a d", "label": "y"})
    held = Folder(split="validation", path=described)
    assert (len(held), held.class_names, int(held[0]["label"])) == (1, ("x", "y"), 1)


def test_class_folders_in_splits(tmp_path):
    for name in ("train/dog/1.png", "train/cat/deep/1.JPG", "train/cat/2.png", "val/dog/3.webp"):
        paint(tmp_path / name)
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    (tmp_path / "train/cat/._2.png").write_text("a resource fork")
    train, held = (Folder(split=split, path=tmp_path) for split in ("train", "validation"))
    assert train.class_names == held.class_names == ("cat", "dog")
    assert [int(train[i]["label"]) for i in range(len(train))] == [0, 0, 1]
    assert int(held[0]["label"]) == 1
    assert "caption" not in held[0]


def test_whole_numbers_are_the_class(tmp_path):
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png")
    describe(tmp_path, {"file_name": "a.png", "label": 4}, {"file_name": "b.png", "label": 2})
    train = Folder(split="train", path=tmp_path, validation_fraction=0)
    assert (train.num_classes, train.class_names) == (5, None)
    assert [int(train[i]["label"]) for i in range(2)] == [4, 2]


def test_plain_folder_has_neither_labels_nor_captions(tmp_path):
    paint(tmp_path / "a.png")
    train = Folder(split="train", path=tmp_path, validation_fraction=0)
    assert (train.num_classes, train.class_names) == (None, None)
    assert train[0].keys() == {"image"}


def test_one_folder_is_split_by_hash_and_stays_split(tmp_path):
    for i in range(200):
        paint(tmp_path / f"{i:03}.png")
    options = {"path": tmp_path, "validation_fraction": 0.25}
    train, held = (Folder(split=split, **options) for split in ("train", "validation"))
    before = {item.name for item in held.items}
    assert len(train) + len(held) == 200
    assert before.isdisjoint(item.name for item in train.items)
    assert 30 <= len(held) <= 70  # 50 expected, 3.2 standard deviations
    for i in range(200, 220):
        paint(tmp_path / f"{i}.png")
    after = {item.name for item in Folder(split="validation", **options).items}
    assert before == {name for name in after if int(name[:-4]) < 200}


def test_unreadable_images_stop_by_name_or_are_counted(tmp_path, capsys):
    for i in range(6):
        paint(tmp_path / f"{i}.png", mode="RGB")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "5.jpg").write_text("this is text")
    options = {"split": "train", "path": tmp_path, "validation_fraction": 0}
    with pytest.raises(UserError, match="3 of 7 images cannot be read: .*1.png.*3.png.*5.jpg"):
        Folder(**options)
    train = Folder(**options, unreadable="skip")
    assert [item.name for item in train.items] == ["0.png", "2.png", "4.png", "5.png"]
    assert capsys.readouterr().out.count("skipped: 3 of 7 images") == 1
    for i in (0, 2, 4, 5):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="no readable image"):
        Folder(**options, unreadable="skip")


def test_many_unreadable_images_are_not_all_listed(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(b"?")
    with pytest.raises(UserError, match=r"9 of 9 .*2.png' and 6 more"):
        Folder(split="train", path=tmp_path, validation_fraction=0)


def test_an_image_that_vanishes_is_named(tmp_path):
    paint(tmp_path / "a.png")
    train = Folder(split="train", path=tmp_path, validation_fraction=0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="a.png' can no longer be read"):
        train[0]


@pytest.mark.parametrize(
    "record, message",
    [
        ('{"file_name": "a.png"', "line 2 is not JSON"),
        ({"text": "no name"}, "line 2 has no `file_name`"),
        ('["a.png"]', "line 2 has no `file_name`"),
        ({"file_name": "gone.png", "label": "x", "text": ""}, "line 2 names 'gone.png', which is"),
        ({"file_name": "b.png", "label": 1.5}, r"line 2: label 1.5 must be"),
        ({"file_name": "b.png", "label": True}, r"line 2: label True must be"),
        ({"file_name": "b.png", "label": ["x"]}, r"line 2: label \['x'\] must be"),
        ({"file_name": "b.png", "label": -1}, "line 2: label -1 must not be negative"),
        ({"file_name": "b.png", "label": "x", "text": 3}, "line 2: text 3 must be a string"),
        ({"file_name": "b.png", "text": "b"}, "1 of 2 .* have no label, the first is 'b.png'"),
        ({"file_name": "b.png", "label": "x"}, "1 of 2 .* have no caption, the first is 'b.png'"),
        (
            {"file_name": "b.png", "label": 3, "text": ""},
            r"strings \('x'\) and whole numbers \(3\)",
        ),
    ],
)
def test_faults_of_metadata_are_named_with_their_line(tmp_path, record, message):
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png")
    describe(tmp_path, {"file_name": "a.png", "label": "x", "text": "a"}, record)
    with pytest.raises(UserError, match=message) as caught:
        Folder(split="train", path=tmp_path)
    assert "\n" not in str(caught.value)


def test_metadata_may_hold_any_unicode_and_must_be_utf8(tmp_path):
    paint(tmp_path / "é.png")
    line = json.dumps({"file_name": "é.png", "text": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n")
    train = Folder(split="train", path=tmp_path, validation_fraction=0)
    assert train[0]["caption"] == "a\u2028b"
    (tmp_path / "metadata.jsonl").write_bytes(line.encode("utf-16"))
    with pytest.raises(UserError, match="metadata.jsonl' is not UTF-8"):
        Folder(split="train", path=tmp_path)


def test_faults_of_the_layout(tmp_path, described):
    with pytest.raises(UserError, match="no folder '.*nowhere'"):
        Folder(split="train", path=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in '.*empty'"):
        Folder(split="train", path=tmp_path / "empty")
    with pytest.raises(UserError, match="unknown unreadable 'ignore'"):
        Folder(split="train", path=described, unreadable="ignore")
    describe(described / "test", {"file_name": "d.png", "text": "", "label": "new"})
    with pytest.raises(UserError, match="label 'new' of 'd.png' .* does not occur in training"):
        Folder(split="validation", path=described)
    describe(described, {"file_name": "train/a.png"})
    with pytest.raises(UserError, match="must lie in train/ and test/"):
        Folder(split="train", path=described)
    paint(tmp_path / "half/train/a/1.png")
    with pytest.raises(UserError, match="has train/ but none of validation, val, test"):
        Folder(split="train", path=tmp_path / "half")
    paint(tmp_path / "mixed/a/1.png")
    paint(tmp_path / "mixed/2.png")
    with pytest.raises(UserError, match="have no label, the first is '2.png'"):
        Folder(split="train", path=tmp_path / "mixed")
    paint(tmp_path / "one/1.png")
    with pytest.raises(UserError, match="validation split of .*one' is empty: 1 images"):
        Folder(split="validation", path=tmp_path / "one", validation_fraction=0)
