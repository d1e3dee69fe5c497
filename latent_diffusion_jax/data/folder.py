"""A folder of images, in class folders or beside a `metadata.jsonl`.

Splits: `PATH/train` and `PATH/validation` (or `val`, or `test`) where they exist; otherwise one
folder is split by a hash of each image's relative name, so that an image never changes sides when
others are added. What is known of an image comes from `metadata.jsonl`, whose lines list the data
set:

    {"file_name": "a.jpg", "label": "dog", "text": "a dog", "segmentation": "maps/a.png",
     "embeddings": "near/a.npy", "objects": [{"class": "dog", "box": [0.1, 0.2, 0.7, 0.9]}]}

(all but `file_name` optional; boxes are x0, y0, x1, y1 in 0..1, maps hold a class number per
pixel). Without it the first sub-folder is the class. Classes of images and of objects are numbered
together: names are sorted, and taken from the training folder for both splits.
"""

import hashlib
import json
import os
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from latent_diffusion_jax.data.transforms import read_box, read_classes, read_rgb
from latent_diffusion_jax.errors import UserError, choose

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
HELD_OUT = ("validation", "val", "test")
METADATA = "metadata.jsonl"


class Item(NamedTuple):
    """One image file and what is known about it."""

    name: str  # relative to the folder, with forward slashes
    label: str | int | None
    caption: str | None
    objects: tuple[tuple[str | int, tuple[float, ...]], ...] | None = None  # class and box
    segmentation: str | None = None  # files, relative to the folder
    embeddings: str | None = None

    @property
    def classes(self) -> set[str | int]:
        """Of the image and of its objects."""
        of_image = set() if self.label is None else {self.label}
        return of_image | {category for category, _ in self.objects or ()}


class Folder:
    """Random access to the images under `path`, all of which are decoded once beforehand.

    Args:
      split: "train" or "validation".
      path: the folder.
      unreadable: what an image that does not decode does: stop with its name ("error"), or be
        left out and counted in one printed line ("skip").
      validation_fraction: of the images, where one folder is split by hash.

    Raises:
      UserError: anything missing, malformed or unreadable, by name.
    """

    def __init__(
        self,
        *,
        split: Literal["train", "validation"],
        path: str | os.PathLike,
        unreadable: Literal["error", "skip"] = "error",
        validation_fraction: float = 0.1,
    ):
        choose("unreadable", unreadable, {"error": 0, "skip": 0})
        if not str(path):
            raise UserError("no folder of images is named: --config.data.source.path=DIR")
        root = Path(path)
        if not root.is_dir():
            raise UserError(f"no folder {str(root)!r} of images")
        folders = split_folders(root)
        if folders:
            train = list_items(folders["train"])
            self.root = folders[split]
            items = train if split == "train" else list_items(self.root)
        else:
            self.root, train = root, list_items(root)
            items = [i for i in train if held_out(i, validation_fraction) == (split != "train")]
        if not items:
            raise UserError(
                f"the {split} split of {str(root)!r} is empty: {len(train)} images in all,"
                f" validation_fraction {validation_fraction}"
            )
        known = {category for item in train for category in item.classes}
        self.classes, self.class_names = number_classes(known)
        self.num_classes = max(self.classes.values()) + 1 if self.classes else None
        for item in items:
            for category in item.classes - known:
                where = f"{item.name!r} in {str(self.root)!r}"
                raise UserError(f"label {category!r} of {where} does not occur in training")
        self.items = check_images(self.root, items, unreadable)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        item = self.items[index]
        file = self.root / item.name
        try:
            example: dict[str, Any] = {"image": read_rgb(str(file))}
        except Exception as error:
            raise UserError(f"image {str(file)!r} can no longer be read: {error}") from error
        if item.label is not None:
            example["label"] = np.int32(self.classes[item.label])
        if item.caption is not None:
            example["caption"] = item.caption
        if item.objects is not None:
            example["boxes"] = np.array([box for _, box in item.objects], np.float32).reshape(-1, 4)
            example["box_labels"] = np.array([self.classes[c] for c, _ in item.objects], np.int32)
        if item.segmentation is not None:
            example["segmentation"] = self._map(item.segmentation, example["image"].shape[:2])
        if item.embeddings is not None:
            example["embeddings"] = np.load(self.root / item.embeddings).astype(np.float32)
        return example

    def _map(self, name: str, size: tuple[int, ...]) -> np.ndarray:
        file = str(self.root / name)
        classes = read_classes(file)
        if classes.shape != size:
            raise UserError(f"map {file!r} is {classes.shape} pixels, its image {size}")
        return classes


def split_folders(root: Path) -> dict[str, Path] | None:
    """The folders of the two splits, or None where one folder holds both."""
    names = {entry.name for entry in root.iterdir() if entry.is_dir()}
    held = [name for name in HELD_OUT if name in names]
    if "train" in names and held:
        if (root / METADATA).exists():
            raise UserError(f"{METADATA} of {str(root)!r} must lie in train/ and {held[0]}/")
        return {"train": root / "train", "validation": root / held[0]}
    if names == {"train"}:
        raise UserError(
            f"{str(root)!r} has train/ but none of {', '.join(HELD_OUT)}: add one, or give"
            f" {str(root / 'train')!r} as the path to split it by hash"
        )
    return None


def held_out(item: Item, fraction: float) -> bool:
    """Whether the hash of the name puts an image into the validation split."""
    digest = hashlib.sha256(item.name.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 < fraction


def list_items(root: Path) -> list[Item]:
    """The images of one folder with their labels and captions, in a fixed order."""
    metadata = root / METADATA
    if metadata.exists():
        items = read_metadata(metadata)
    else:
        files = sorted(
            file.relative_to(root)
            for file in root.rglob("*")
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        )
        items = [Item(f.as_posix(), f.parts[0] if len(f.parts) > 1 else None, None) for f in files]
    if not items:
        raise UserError(f"no images in {str(root)!r} ({', '.join(SUFFIXES)})")
    for key in Item._fields[1:]:
        without = [item.name for item in items if getattr(item, key) is None]
        if 0 < len(without) < len(items):
            raise UserError(
                f"{len(without)} of {len(items)} images in {str(root)!r} have no {key},"
                f" the first is {without[0]!r}: give it to all or to none"
            )
    return items


def read_metadata(metadata: Path) -> list[Item]:
    """The lines of a `metadata.jsonl`; every fault is named with its line."""
    try:
        lines = metadata.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(metadata)!r} is not UTF-8: {error}") from None
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{str(metadata)!r} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise UserError(f"{where} has no `file_name` string")
        name, label, caption = record["file_name"], record.get("label"), record.get("text")
        files = [record.get("segmentation"), record.get("embeddings")]
        for file in (name, *(file for file in files if file is not None)):
            if not isinstance(file, str) or not (metadata.parent / file).is_file():
                raise UserError(f"{where} names {file!r}, which is missing")
        if isinstance(label, bool) or not isinstance(label, str | int | None):
            raise UserError(f"{where}: label {label!r} must be a string or a whole number")
        if isinstance(label, int) and label < 0:
            raise UserError(f"{where}: label {label} must not be negative")
        if not isinstance(caption, str | None):
            raise UserError(f"{where}: text {caption!r} must be a string")
        items.append(Item(name, label, caption, read_objects(record.get("objects"), where), *files))
    return sorted(items, key=lambda item: item.name)


def read_objects(objects: Any, where: str) -> tuple | None:
    """Classes and boxes of one line."""
    if objects is None:
        return None
    try:
        found = tuple((each["class"], read_box(each["box"])) for each in objects)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: objects {objects!r}: {type(error).__name__} {error}") from None
    for category, _ in found:
        if isinstance(category, bool) or not isinstance(category, str | int):
            raise UserError(f"{where}: class {category!r} must be a string or a whole number")
    return found


def number_classes(
    labels: Set[str | int],
) -> tuple[dict[str | int, int], tuple[str, ...] | None]:
    """Label -> class, and the names of the classes; whole numbers are the class and have none."""
    numbers = {label for label in labels if isinstance(label, int)}
    names = sorted(label for label in labels if isinstance(label, str))
    if numbers and names:
        raise UserError(f"labels are strings ({names[0]!r}) and whole numbers ({min(numbers)})")
    classes: dict[str | int, int] = {number: number for number in numbers}
    classes |= {name: index for index, name in enumerate(names)}
    return classes, tuple(names) or None


def check_images(root: Path, items: Sequence[Item], unreadable: str) -> list[Item]:
    """Decodes every image, and stops at those that fail or leaves them out."""

    def fault(item: Item) -> str | None:
        try:
            read_rgb(str(root / item.name))
        except Exception as error:  # decoders raise anything on a broken file
            return f"{type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of the interpreter lock
        checked = pool.map(fault, items)
        bar = tqdm(checked, f"checking {root}", len(items), disable=None, leave=False)
        faults = dict(zip(items, bar))
    good = [item for item in items if faults[item] is None]
    bad = [item for item in items if faults[item] is not None]
    if bad:
        first = ", ".join(repr(str(root / item.name)) for item in bad[:3])
        message = f"{len(bad)} of {len(items)} images cannot be read: {first}"
        message += f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        if unreadable == "error":
            raise UserError(f"{message} ({faults[bad[0]]}); unreadable='skip' leaves them out")
        print(f"skipped: {message}")
        if not good:
            raise UserError(f"no readable image in {str(root)!r}")
    return good
