"""What a run leaves for people to look at: metrics.jsonl, TensorBoard, image grids, progress.

No part needs TensorFlow: scalars go through tensorboardX, clu is used for its averages alone.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average
from etils import epath
from PIL import Image
from tqdm import tqdm

from latent_diffusion_jax.errors import UserError

Values = dict[str, Any]  # float, or a list of them: one number per channel


def average(metrics: Iterable[Mapping[str, Any]]) -> Values:
    """The mean of each metric over batches, such as those of an objective's `eval_step`.

    Arrays [n] are averaged number by number.
    """

    def start(value: jax.Array) -> Average:
        return Average.from_model_output(values=value)

    total: dict[str, Average] = {}
    for batch in metrics:
        for name, value in batch.items():
            value = jnp.asarray(value)
            one = jax.vmap(start)(value) if value.ndim else start(value)
            total[name] = total[name].merge(one) if name in total else one
    return {name: np.asarray(value.compute()).tolist() for name, value in total.items()}


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Lays images out row by row with a 2-pixel margin.

    Args:
      images: [N, H, W, 1 or 3], uint8 or float in [-1, 1].
      columns: images in a row.

    Returns:
      uint8 [H', W', 3].
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        images = np.rint((np.clip(images.astype(np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)
    n, height, width, _ = images.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 2) + 2, (i % columns) * (width + 2) + 2
        canvas[top : top + height, left : left + width] = image
    return canvas


class Writer:
    """Writes a run's metrics and images into its workdir; only the first process does."""

    def __init__(self, workdir: str):
        self._workdir = epath.Path(workdir)
        self._jsonl = self._workdir / "metrics.jsonl"
        self._board: Any = None

    def start(self, step: int) -> None:
        """Goes on from `step`: what an interrupted run logged beyond it is dropped."""
        if jax.process_index() != 0:
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        if self._jsonl.exists():
            text = self._jsonl.read_text()
            kept = "".join(line for line in text.splitlines(True) if _is_up_to(step, line))
            if kept != text:
                temporary = self._jsonl.with_name("metrics.jsonl.tmp")
                temporary.write_text(kept)
                temporary.replace(self._jsonl)
        from tensorboardX import SummaryWriter  # imports torch, where it is installed

        board = str(self._workdir / "tensorboard")
        # Files are named by the second: the suffix keeps a quick restart off its predecessor's.
        self._board = SummaryWriter(board, purge_step=step + 1, filename_suffix=f".from{step}")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl, and to TensorBoard: of a list, each as NAME/i.

        Raises:
          UserError: it cannot be written.
        """
        if self._board is None:
            return
        with _writing(self._jsonl), self._jsonl.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if not isinstance(value, list):
                self._board.add_scalar(name, value, step)
                continue
            for i, number in enumerate(value):
                self._board.add_scalar(f"{name}/{i}", number, step)

    def images(self, step: int, images: Mapping[str, np.ndarray], columns: int = 8) -> None:
        """Writes `images/{name}_{step}.png`, a grid of [N, H, W, C], and to TensorBoard."""
        if self._board is None:
            return
        (self._workdir / "images").mkdir(exist_ok=True)
        for name, batch in images.items():
            picture = grid(batch, columns)
            with (self._workdir / "images" / f"{name}_{step:08d}.png").open("wb") as file:
                Image.fromarray(picture).save(file, format="PNG")
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes TensorBoard.

        Raises:
          UserError: it cannot be written.
        """
        board, self._board = self._board, None
        if board is not None:
            with _writing(self._workdir / "tensorboard"):
                board.close()


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    """Names the file, which the error of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def _is_up_to(step: int, line: str) -> bool:
    try:  # a line that a kill cut short is dropped too: its step is done again
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def read_jsonl(path: str) -> list[Values]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in epath.Path(path).read_text().splitlines()]


def plot_curves(jsonl: str, png: str, keys: Sequence[str]) -> None:
    """Plots `keys` of a metrics.jsonl over the step, one panel each."""
    from matplotlib.figure import Figure  # a second to import, and rarely wanted

    lines = read_jsonl(jsonl)
    figure = Figure(figsize=(4.5 * len(keys), 3.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if not points:
            axes.text(0.5, 0.5, "not logged", ha="center", transform=axes.transAxes)
            continue
        axes.plot(*zip(*points), linewidth=1)  # of a list, a line each
        axes.set(xlabel="step", title=key)
        if np.min([value for _, value in points]) > 0:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    with epath.Path(png).open("wb") as file:
        figure.savefig(file, format="png", dpi=110)


class Progress:
    """A bar with rate and time left on a terminal, plain lines elsewhere; the first process only.

    `update` moves the bar; `line` also says something: `step 100/2200 loss 0.123 00:12 left`.
    """

    def __init__(
        self, total: int, start: int = 0, unit: str = "step", stream: TextIO | None = None
    ):
        self._total, self._start, self._unit = total, start, unit
        self._stream = stream = sys.stdout if stream is None else stream
        self._began = time.perf_counter()
        self._silent = jax.process_index() != 0
        self._bar = None
        if stream.isatty() and not self._silent:
            self._bar = tqdm(total=total, initial=start, unit=unit, file=stream, dynamic_ncols=True)

    def update(self, done: int) -> None:
        """`done` of `total` are finished."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def line(self, done: int, text: str) -> None:
        """`done` of `total` are finished, with a few words on how it went."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self.update(done)
        elif not self._silent:
            elapsed = time.perf_counter() - self._began
            left = tqdm.format_interval(elapsed * (self._total - done) / max(done - self._start, 1))
            print(
                f"{self._unit} {done}/{self._total} {text} {left} left",
                file=self._stream,
                flush=True,
            )

    def note(self, text: str) -> None:
        """Says something on a line of its own, which stays above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif not self._silent:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()
