"""The page's controls for what a model is given, and what they hold as `Settings` take it."""

import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from latent_diffusion_jax import build
from latent_diffusion_jax.data.transforms import read_rgb
from latent_diffusion_jax.demo.settings import check_pixels
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.inputs import READERS
from latent_diffusion_jax.pipeline import Trained

EDITOR = 512  # pixels: smaller images are shown larger, to be painted on
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")
HEADERS = ("class", "x0", "y0", "x1", "y1")

File = tuple[str, bytes]  # name and content


class Control(NamedTuple):
    """Components, and read(their values) -> what is given: text or a file by option."""

    components: list[Any]
    read: Callable[..., Mapping[str, str | File]]


def class_control(trained: Trained, section: ConfigDict) -> Control:
    """Classes in turn; none chosen are all."""
    names = trained.class_names or [str(i) for i in range(section.num_classes)]
    choices = [(name, str(i)) for i, name in enumerate(names)]
    box = gr.Dropdown(choices, label="Class (several: in turn; none: all)", multiselect=True)
    return Control([box], lambda chosen: {"class": ",".join(chosen)} if chosen else {})


def prompt_control(trained: Trained, section: ConfigDict) -> Control:
    """A caption."""
    box = gr.Textbox(label="Prompt", lines=2)
    return Control([box], lambda text: {"prompt": text})


def layout_control(trained: Trained, section: ConfigDict) -> Control:
    """A table of boxes, which are drawn beside it."""
    first = trained.class_names[0] if trained.class_names else "0"
    about = "Boxes: class, left, top, right and bottom in 0..1"
    rows = [[first, 0.2, 0.2, 0.8, 0.8]]
    table = gr.Dataframe(
        rows, headers=list(HEADERS), label=about, type="array", interactive=True, datatype="str"
    )
    if trained.class_names:
        gr.Markdown(f"Classes: {', '.join(trained.class_names[:100])}")
    drawing = gr.HTML(draw_boxes(rows), label="Layout", elem_id="layout")
    table.change(draw_boxes, table, drawing, queue=False)
    return Control([table], lambda rows: {"layout": ("layout.json", layout_json(rows))})


def layout_json(rows: Sequence[Sequence[Any]]) -> bytes:
    """A table as `sample --layout` reads it; empty rows are left out."""
    things = [
        {"class": str(name).strip(), "box": [_number(x) for x in box]}
        for name, *box in rows
        if str(name).strip()
    ]
    return json.dumps(things).encode()


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        raise UserError(f"layout: {text!r} is not a number in 0..1") from None


def draw_boxes(rows: Sequence[Sequence[Any]]) -> str:
    """A drawing (SVG) of a table of boxes, or what is wrong with it."""
    try:
        things = json.loads(layout_json(rows))
    except UserError as error:
        return f"<p>{html.escape(str(error))}</p>"
    parts = []
    for i, thing in enumerate(things):
        x0, y0, x1, y1 = (100 * x for x in thing["box"])
        colour = COLOURS[i % len(COLOURS)]
        parts.append(
            f'<rect x="{x0}" y="{y0}" width="{max(x1 - x0, 0)}" height="{max(y1 - y0, 0)}"'
            f' fill="{colour}" fill-opacity="0.2" stroke="{colour}"/>'
            f'<text x="{x0 + 1}" y="{y0 + 5}" font-size="5" fill="{colour}">'
            f"{html.escape(thing['class'])}</text>"
        )
    frame = '<rect width="100" height="100" fill="white" stroke="grey"/>'
    return f'<svg viewBox="-1 -1 102 102" width="260">{frame}{"".join(parts)}</svg>'


def file_control(option: str, label: str) -> Callable[[Trained, ConfigDict], Control]:
    """A file as it is: a map of class numbers would not survive an image component."""

    def make(trained, section):
        return Control([gr.File(label=label)], lambda path: _file(option, path))

    return make


def image_control(trained: Trained, section: ConfigDict) -> Control:
    """An image alone."""
    upload = gr.File(label="Image to upscale", elem_id="image")
    shown = gr.Image(label="It", interactive=False, height=200)
    upload.change(_show, upload, shown, queue=False)
    return Control([upload], lambda path: _file("image", path))


def paint_control(trained: Trained, section: ConfigDict | None) -> Control:
    """An image and what of it is to be filled, painted or given as a file."""
    upload = gr.File(label="Image", elem_id="image")
    editor = gr.ImageEditor(
        label="Paint what is to be filled",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=40, colors=["#ffffff"], color_mode="fixed"),
        format="png",
        type="pil",
        elem_id="paint",
    )
    mask = gr.File(label="or a mask of its size, white where it is to be filled", elem_id="mask")
    upload.change(_show, upload, editor, queue=False)

    def read(path, painted, mask_path):
        files = {**_file("image", path), **_file("mask", mask_path)}
        if path and not mask_path and (hole := painted_hole(painted, path)):
            files["mask"] = ("mask.png", hole)
        return files

    return Control([upload, editor, mask], read)


def painted_hole(painted: Mapping[str, Any] | None, path: str) -> bytes | None:
    """What was painted on an image, as a mask of its size (PNG); None where nothing was."""
    layers = [np.asarray(layer)[..., 3] > 0 for layer in (painted or {}).get("layers", [])]
    if not any(layer.any() for layer in layers):
        return None
    check_pixels(Path(path))
    height, width = _rgb(path).shape[:2]
    hole = Image.fromarray(np.any(layers, axis=0).astype(np.uint8) * 255)
    out = io.BytesIO()
    hole.resize((width, height), Image.Resampling.BOX).save(out, "png")
    return out.getvalue()


def _file(option: str, path: str | None) -> dict[str, File]:
    return {option: (Path(path).name, Path(path).read_bytes())} if path else {}


def _show(path: str | None) -> Image.Image | None:
    """An upload, small ones enlarged; a bad one is told at once, and again when it is used."""
    if path is None:
        return None
    try:
        check_pixels(Path(path))
        image = Image.fromarray(_rgb(path))
    except UserError as error:
        gr.Warning(html.escape(str(error)))
        return None
    times = max(EDITOR // max(image.size), 1)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _rgb(path: str) -> np.ndarray:
    try:
        return read_rgb(path)
    except OSError as error:
        line = f"{Path(path).name!r} cannot be read as an image"
        raise UserError(line) from error


MAKERS: dict[tuple[str, ...], Callable[[Trained, ConfigDict], Control]] = {  # by `inputs.Reader`
    ("class",): class_control,
    ("prompt",): prompt_control,
    ("layout",): layout_control,
    ("image",): image_control,
    ("image", "mask"): paint_control,
    ("segmentation",): file_control("segmentation", "Map: an image of class numbers"),
    ("embeddings",): file_control("embeddings", "Embeddings (.npy)"),
}


def make_controls(trained: Trained) -> tuple[list[Control], bool]:
    """What this model's conditions take; and whether it takes images to be changed beside it."""
    sections = [part for part in build.conditions(trained.config) if part.kind in READERS]
    controls = [MAKERS[READERS[part.kind].options](trained, part) for part in sections]
    edits = not any("image" in READERS[part.kind].options for part in sections)
    return controls, edits
