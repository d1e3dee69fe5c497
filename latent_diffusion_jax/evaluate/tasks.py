"""How well a model does its task, on validation examples: `evaluate`.

On the `shapes` data samples are read back from their pixels (`oracle`). Super-resolution and
inpainting are measured on any images. No network is involved in either.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image, ImageDraw

from latent_diffusion_jax import build, pipeline, sampling
from latent_diffusion_jax.data.loader import cut
from latent_diffusion_jax.data.transforms import center_square, to_uint8
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate import oracle
from latent_diffusion_jax.evaluate.scene import read_scene

Examples = Sequence[Mapping[str, Any]]  # images uint8 and what else the data has, with the inputs
Measures = dict[str, float]
Measure = Callable[[np.ndarray, Examples], Measures]  # of samples uint8 [N, H, W, 3]
SHOWN = 8
ANY_IMAGES = ("lowres", "inpainting")
CAPTIONS = ("text", "clip")


def evaluate(
    trained: pipeline.Trained,
    mesh: Mesh,
    *,
    number: int,
    batch: int,
    seed: int,
    clip_score: Measure | None = None,
    **options: Any,
) -> tuple[Measures, np.ndarray, list[dict]]:
    """Samples with the conditions of the first `number` validation examples and measures them.

    `clip_score` is a further measure, of models of text.

    Returns:
      The measures; the samples uint8 [number, H, W, 3]; and the examples.

    Raises:
      UserError: a task that needs the shapes data, on other data; a CLIP score without captions.
    """
    config = trained.config
    kind = config.conditioning.kind
    if clip_score is not None and kind not in CAPTIONS:
        raise UserError(f"a CLIP score is of captions; this model has conditioning {kind!r}")
    readable = config.data.source.name == "shapes" or kind in ANY_IMAGES
    if not readable and clip_score is None:
        raise UserError(
            f"evaluate reads samples on the data 'shapes', of {config.data.source.name!r} only"
            f" those of conditioning {' and '.join(ANY_IMAGES)}, not {kind!r}: give"
            " --inception=FILE and --reference=train, to measure any samples by FID"
        )
    if kind not in MEASURES:
        raise UserError(f"evaluate has no measure for conditioning {kind!r}")
    measures: list[Measure] = [MEASURES[kind]] if readable else []
    if clip_score is not None:
        measures.append(clip_score)
    examples = validation_examples(config, number)
    keys = build.conditioner(config).keys
    inputs = {key: np.stack([example[key] for example in examples]) for key in keys}
    number = len(examples)
    batches = sampling.generate(
        trained, mesh, inputs=inputs, number=number, batch=batch, seed=seed, **options
    )
    images = np.concatenate([to_uint8(images) for images in batches])
    found: Measures = {}
    for measure in measures:
        found |= measure(images, examples)
    return found, images, examples


def validation_examples(config: Any, number: int) -> list[dict]:
    """The first of the validation split, cut to size, with the conditioner's inputs."""
    source, example = build.source(config, "validation"), make_example(config)
    return [example(source, i) for i in range(min(number, len(source)))]


def make_example(config: Any) -> Callable[[Sequence, int], dict]:
    """Gives example(source, i), cut to size, with the conditioner's inputs; in turn behind the end.

    What is drawn for it, such as a mask, depends on the config's seed and i.
    """
    prepare, size = build.prepare(config), config.data.image_size

    def example(source: Sequence, i: int) -> dict:
        generator = np.random.default_rng([config.seed, i])
        of = source[i % len(source)]
        found = cut(of, generator, center_square, size, flip=False, prepare=prepare)
        return {**found, "image": to_uint8(found["image"])}

    return example


def _scenes(images: np.ndarray, examples: Examples) -> Measures:
    """How many shapes are seen; an image with none, or of a doubtful one, is no scene."""
    seen = [read_scene(image) for image in images]
    return {
        "scenes": float(np.mean([0 < len(shapes) <= 3 for shapes in seen])),
        "shapes": float(np.mean([len(shapes) for shapes in seen])),
    }


def _classes(images: np.ndarray, examples: Examples) -> Measures:
    alone = all((example["box_labels"] >= 0).sum() == 1 for example in examples)

    def right(image, label):
        if alone:
            return oracle.class_right(image, label)
        seen = read_scene(image)
        return bool(seen) and seen[0].name == oracle.CLASS_NAMES[label]

    return {"class": float(np.mean([right(i, e["label"]) for i, e in zip(images, examples)]))}


def _captions(images: np.ndarray, examples: Examples) -> Measures:
    pairs = list(zip(images, (example["caption"] for example in examples), strict=True))
    parts = [oracle.caption_parts(image, caption) for image, caption in pairs]
    right = float(np.mean([oracle.caption_right(image, caption) for image, caption in pairs]))
    return {"caption": right} | {
        name: float(np.nanmean([part[name] for part in parts])) for name in parts[0]
    }


def _mean(name: str, score: Callable[[np.ndarray, Mapping], float]) -> Measure:
    """The mean of a score of each image, given its example."""

    def measure(images, examples):
        return {name: float(np.mean([score(*pair) for pair in zip(images, examples, strict=True)]))}

    return measure


def _upscaled(images: np.ndarray, examples: Examples) -> Measures:
    """PSNR, and that of bicubic interpolation."""

    def mean(candidates):
        values = [oracle.psnr(c, e["image"]) for c, e in zip(candidates, examples, strict=True)]
        return float(np.mean(values))

    ours, bicubic = mean(images), mean([_enlarged(example) for example in examples])
    return {"psnr": ours, "psnr_bicubic": bicubic, "gain": ours - bicubic}


def _filled(images: np.ndarray, examples: Examples) -> Measures:
    """PSNR in holes, and with the mean of what is known, as means over images; outside.

    `gain_pooled` is of all holes' pixels at once: there the few holes count most of which nobody
    can know what was in them. `outside` is the largest change of a known pixel.
    """
    errors: dict[str, list[np.ndarray]] = {"ours": [], "mean": []}
    outside = 0.0
    for image, example in zip(images, examples, strict=True):
        hole, truth = example["mask"][..., 0] >= 0.5, example["image"].astype(np.float64)
        errors["ours"].append((image[hole] - truth[hole]) ** 2)
        errors["mean"].append((truth[~hole].mean(axis=0) - truth[hole]) ** 2)
        outside = max(outside, oracle.inside_outside(image, example["image"], hole)[1])

    def decibels(squares):  # an image that is exact counts as one rounded to levels
        return oracle.decibels(max(squares.mean(), 1 / 12))

    ours, mean = (float(np.mean([*map(decibels, each)])) for each in errors.values())
    ours_pooled, mean_pooled = (decibels(np.concatenate(each)) for each in errors.values())
    return {
        "psnr": ours,
        "psnr_mean_fill": mean,
        "gain": ours - mean,
        "gain_pooled": ours_pooled - mean_pooled,
        "outside": outside,
    }


MEASURES: dict[str, Measure] = {
    "none": _scenes,
    "label": _classes,
    "text": _captions,
    "clip": _captions,
    "layout": _mean("box_iou", lambda i, e: oracle.box_iou(i, e["boxes"], e["box_labels"])),
    "segmentation": _mean(
        "segmentation_iou", lambda i, e: oracle.segmentation_iou(i, e["segmentation"])
    ),
    "lowres": _upscaled,
    "inpainting": _filled,
}


def write_picture(path: Path, kind: str, images: np.ndarray, examples: Examples) -> None:
    """The first few as columns: the condition, where it is an image, the sample and the truth."""
    from matplotlib.figure import Figure  # a second to import, and rarely wanted

    columns = min(SHOWN, len(images))
    view = VIEWS.get(kind)
    rows = [("sample", list(images)), ("validation", [e["image"] for e in examples])]
    if view is not None:
        rows.insert(0, ("condition", [view(example) for example in examples[:columns]]))
    figure = Figure(figsize=(1.5 * columns, 1.6 * len(rows) + 0.5))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures) in zip(axes, rows, strict=True):
        for axis, picture in zip(line, pictures[:columns]):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name)
    if kind in CAPTIONS:
        for axis, example in zip(axes[0], examples):
            axis.set_title("\n".join(textwrap.wrap(example["caption"], 22)), fontsize=7)
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _map(example: Mapping[str, Any]) -> np.ndarray:
    palette = np.random.default_rng(1).integers(40, 256, (256, 3), dtype=np.uint8)
    palette[0] = 0
    return palette[example["segmentation"]]


def _drawn_boxes(example: Mapping[str, Any]) -> np.ndarray:
    side = example["image"].shape[0] * 4
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    for box, label in zip(example["boxes"], example["box_labels"]):
        if label >= 0:
            draw.rectangle([float(x) * side for x in box], outline="black", width=3)
            name = oracle.CLASS_NAMES[label].replace(" ", "\n")
            draw.text(
                (box[0] * side + 6, box[1] * side + 6), name, fill="black", font_size=side / 16
            )
    return np.asarray(picture)


def _enlarged(example: Mapping[str, Any]) -> np.ndarray:
    size = example["image"].shape[1::-1]
    small = Image.fromarray(to_uint8(example["lowres"]))
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC))


VIEWS: dict[str, Callable[[Mapping[str, Any]], np.ndarray]] = {  # conditions as pictures
    "layout": _drawn_boxes,
    "segmentation": _map,
    "lowres": lambda example: to_uint8(example["lowres"]),
    "inpainting": lambda e: np.where(e["mask"] >= 0.5, np.uint8(128), e["image"]),
}
