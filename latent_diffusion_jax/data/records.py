"""Sources in ArrayRecord files: tensorflow-datasets, and a plain format of our own.

Neither needs TensorFlow to read. A record of the plain format is a length (4 bytes, little endian),
a JSON header of that length (any of `label`, `caption`), and an encoded image (PNG, JPEG, ...).
"""

import glob
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from latent_diffusion_jax.data.transforms import read_rgb
from latent_diffusion_jax.errors import UserError


class Tfds:
    """Random access to a data set that tensorflow-datasets has prepared as array_record.

    Args:
      split: "train" or "validation", which stand for `train_split` and `validation_split`.
      dataset: its name, such as "oxford_flowers102" or "my_dataset/config:1.0.0".
      data_dir: where it was prepared; None is tfds's default.
      train_split: a tfds split, slices included, such as "train[5%:]".
      validation_split: likewise.
      image_key: the feature that is the image.
      label_key: the feature that is the class, None for none.
      caption_key: the feature that is the caption, None for none.

    Raises:
      UserError: not prepared, or no such split or feature.
    """

    def __init__(
        self,
        *,
        split: Literal["train", "validation"],
        dataset: str,
        data_dir: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        image_key: str = "image",
        label_key: str | None = "label",
        caption_key: str | None = None,
    ):
        import tensorflow_datasets as tfds  # slow to import

        wanted = train_split if split == "train" else validation_split
        self.image_key, self.label_key, self.caption_key = image_key, label_key, caption_key
        builder = prepared(tfds, dataset, data_dir)
        features = builder.info.features
        for key in filter(None, (image_key, label_key, caption_key)):
            if key not in features:
                raise UserError(f"tfds {dataset!r} has no feature {key!r}; it has {list(features)}")
        try:
            decoders = {image_key: tfds.decode.SkipDecoding()}  # tfds would decode by OpenCV
            self.source = builder.as_data_source(split=wanted, decoders=decoders)
        except (KeyError, ValueError) as error:
            splits = ", ".join(builder.info.splits)
            raise UserError(f"tfds {dataset!r} has no split {wanted!r}; it has {splits}") from error
        label = features[label_key] if label_key else None
        self.num_classes = getattr(label, "num_classes", None)
        names = getattr(label, "names", None)
        self.class_names = tuple(names) if names else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        record = self.source[index]
        example: dict[str, Any] = {"image": read_rgb(io.BytesIO(record[self.image_key]))}
        if self.label_key:
            example["label"] = np.int32(record[self.label_key])
        if self.caption_key:
            example["caption"] = bytes(record[self.caption_key]).decode()
        return example


def prepared(tfds: Any, dataset: str, data_dir: str | None) -> Any:
    """The tfds builder of a data set on disk; says what to run where there is none."""
    try:
        builder = tfds.builder(dataset, data_dir=data_dir)
        file_format = builder.info.file_format.value if builder.info.splits else "nothing"
    except (ValueError, AssertionError):  # an unknown name; an unknown version
        file_format = "nothing"
    if file_format != "array_record":  # tfds itself would complain about tfrecord in all cases
        place = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"tfds {dataset!r} is not prepared as array_record ({file_format} found); where you"
            f" have TensorFlow, run `tfds build {dataset} --file_format=array_record{place}`"
        )
    return builder


class ArrayRecord:
    """Random access to files that `write_array_record` (or anything like it) wrote.

    Args:
      split: "train" or "validation".
      path: a pattern in which {split} stands for the split: "data/{split}-*.array_record".
      num_classes: where the records have labels.
      class_names: instead of `num_classes`.

    Raises:
      UserError: no file, a broken file, or a label out of range.
    """

    def __init__(
        self,
        *,
        split: Literal["train", "validation"],
        path: str | os.PathLike,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ):
        from grain.sources import ArrayRecordDataSource  # slow to import

        pattern = str(path)
        if "{split}" not in pattern:
            raise UserError(f"array_record path {pattern!r} must hold {{split}}")
        self.class_names = tuple(class_names) if class_names else None
        self.num_classes = len(self.class_names) if self.class_names else num_classes
        files = sorted(glob.glob(pattern.replace("{split}", split)))
        if not files:
            raise UserError(f"no file matches {pattern.replace('{split}', split)!r}")
        try:
            self.source = ArrayRecordDataSource(files)
            self.size = len(self.source)
        except Exception as error:
            raise UserError(f"cannot read {pattern!r} as array_record: {error}") from error

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        record = bytes(self.source[index])
        end = 4 + int.from_bytes(record[:4], "little")
        try:
            header = json.loads(record[4:end])
            example: dict[str, Any] = {"image": read_rgb(io.BytesIO(record[end:]))}
        except (ValueError, OSError) as error:
            raise UserError(f"record {index} is broken: {error}") from error
        if "label" in header:
            if self.num_classes and not 0 <= header["label"] < self.num_classes:
                raise UserError(f"record {index}: label {header['label']} of {self.num_classes}")
            example["label"] = np.int32(header["label"])
        if "caption" in header:
            example["caption"] = header["caption"]
        return example


def write_array_record(path: str | os.PathLike, examples: Iterable[dict]) -> None:
    """Writes examples: `image` uint8 [H, W, 3], optional `label` and `caption`."""
    from array_record.python.array_record_module import ArrayRecordWriter

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")  # one record a chunk: random access
    for example in examples:
        types = {"label": int, "caption": str}
        header = {key: cast(example[key]) for key, cast in types.items() if key in example}
        encoded = json.dumps(header).encode()
        image = io.BytesIO()
        Image.fromarray(example["image"]).save(image, "png")
        writer.write(len(encoded).to_bytes(4, "little") + encoded + image.getvalue())
    writer.close()
