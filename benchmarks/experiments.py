"""The paper's experiments, in small, on trained workdirs of the embedded shapes.

    python -m benchmarks.experiments compression WORKDIR ... [--out=PATH] [--number=96]
    python -m benchmarks.experiments steps|guidance|lengths WORKDIR
    python -m benchmarks.experiments first_stages WORKDIR ...

`launch/experiments/` trains what they take. Each writes PATH.json, a row for each point as soon as
it is measured (a point that is there is not measured again), prints a table in Markdown and draws
PATH.png. Samples have the classes of the first `--number` validation images and are compared with
those images:

  class      share of samples that show the shape and the colour asked for, read from pixels
  precision, recall   of features that are the image averaged to 8 x 8 pixels (3 neighbours)
  spread     mean deviation of these features within a class, over that of the validation images
  images_per_second   of sampling and decoding, the first batch, which compiles, aside

With --inception=FILE also FID, and precision and recall of its features (`evaluate`).
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import numpy as np

from latent_diffusion_jax import build, pipeline, sampling, xla
from latent_diffusion_jax.bench import measures
from latent_diffusion_jax.bench.report import digits
from latent_diffusion_jax.convert.inception import load_inception
from latent_diffusion_jax.data.transforms import to_uint8
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate import tasks
from latent_diffusion_jax.evaluate.compare import NEIGHBOURS, compare
from latent_diffusion_jax.evaluate.distances import manifolds
from latent_diffusion_jax.train.metrics import read_jsonl
from latent_diffusion_jax.train.sharding import make_mesh

BATCH, SEED, SIDE = 24, 0, 8
CURVE = 4  # points of a training
ALONG, ENDS = 20, (5, 10, 50)  # steps of sampling there, and further ones of its end
LENGTH = 0.1  # of the averages that a training's points are measured with
SAMPLERS = {  # name -> sampler and its options
    "DDIM": ("ddim", {"eta": 0.0}),
    "DDIM, eta 1": ("ddim", {"eta": 1.0}),
    "DPM-Solver++ 2M": ("dpmpp_2m", {}),
}
STEPS = (5, 10, 20, 50, 100)
SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
LENGTHS = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)
Row = dict[str, Any]


class Model(NamedTuple):
    """A trained workdir, what it is asked for, and where what is found goes."""

    workdir: str
    trained: pipeline.Trained
    mesh: Any
    examples: list[dict]
    inception: str | None
    out: Path

    @property
    def about(self) -> Row:
        """What every row of it holds."""
        number, trained = len(self.examples), self.trained.step
        return {"workdir": self.workdir, "number": number, "trained": trained}


def open_model(args, workdir: str) -> Model:
    """The model of a workdir with the examples that its samples are compared with."""
    mesh = make_mesh()
    trained = pipeline.load(workdir, mesh)
    config = trained.config
    if config.phase != "diffusion" or config.data.source.name != "shapes":
        raise UserError(f"{workdir}: this takes phase 2 on the data 'shapes'")
    examples = tasks.validation_examples(config, args.number)
    if len(examples) <= BATCH:
        raise UserError(f"--number={args.number} must be above {BATCH}, a batch")
    return Model(workdir, trained, mesh, examples, args.inception, args.out)


def make_run(model: Model, **options: Any) -> Callable[..., Any]:
    """The sampler of a model, compiled once, with section `sample` changed by `options`."""
    config = model.trained.config
    given = dict(config=config, mesh=model.mesh)
    return build.unpack("sample", sampling.make_generate, {**config.sample, **options}, **given)


def measure(model: Model, run: Callable[..., Any], params: Any) -> Row:
    """Samples and what the module's docstring lists."""
    config, number = model.trained.config, len(model.examples)
    keys, seed = build.conditioner(config).keys, jax.random.key(SEED)
    inputs = {key: np.stack([e[key] for e in model.examples]) for key in keys}
    images, marks = [], []
    for start in range(0, number, BATCH):
        indices = np.arange(start, start + BATCH)
        rows = {name: x[np.minimum(indices, number - 1)] for name, x in inputs.items()}
        images.append(to_uint8(np.asarray(run(params, model.trained.frozen, rows, seed, indices))))
        marks.append(time.perf_counter())
    speed = BATCH * (len(marks) - 1) / (marks[-1] - marks[0])
    samples = np.concatenate(images)[:number]
    real = np.stack([example["image"] for example in model.examples])
    labels = np.array([example["label"] for example in model.examples])
    ours, theirs = small(samples), small(real)
    near = manifolds(theirs, ours, NEIGHBOURS)
    found = {
        **tasks.MEASURES[config.conditioning.kind](samples, model.examples),
        "precision": near.precision,
        "recall": near.recall,
        "spread": within(ours, labels) / within(theirs, labels),
        "images_per_second": speed,
    }
    return found if model.inception is None else found | by_inception(model, samples, real)


def small(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] as features [N, 8 * 8 * 3]."""
    n, side = images.shape[0], images.shape[1] // SIDE
    return images.reshape(n, SIDE, side, SIDE, side, 3).mean(axis=(2, 4)).reshape(n, -1) / 255


def within(features: np.ndarray, labels: np.ndarray) -> float:
    """The root of the mean squared distance to the mean of the own class."""
    apart = [features[labels == c] - features[labels == c].mean(axis=0) for c in np.unique(labels)]
    return float(np.sqrt(np.mean(np.concatenate(apart) ** 2)))


def by_inception(model: Model, samples: np.ndarray, real: np.ndarray) -> Row:
    """FID and the rest of `evaluate --images`, of Inception's features."""
    place = model.out.with_suffix(".inception")
    place.mkdir(parents=True, exist_ok=True)
    for name, images in (("samples", samples), ("reference", real)):
        np.savez(place / f"{name}.npz", images)
    found = compare(
        str(place / "samples.npz"),
        str(place / "reference.npz"),
        inception=load_inception(model.inception),
        preparation="torch-fidelity",
        out=place / "evaluation.json",
        batch=BATCH,
        mesh=model.mesh,
    )
    return {f"inception_{name}": found["measures"][name] for name in ("fid", "precision", "recall")}


class Rows:
    """What was measured, on disk after each point."""

    def __init__(self, out: Path):
        self.found: list[Row] = []
        self._path = out.with_suffix(".json")
        self._all = json.loads(self._path.read_text()) if self._path.exists() else []

    def add(self, settings: Row, measured: Callable[[], Row]) -> None:
        """The row of these settings; measured unless it is there."""
        row = next((r for r in self._all if settings.items() <= r.items()), None)
        if row is None:
            row = {**settings, **measured()}
            self._all.append(row)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._all, indent=1))
            partial.replace(self._path)
        self.found.append(row)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(" ".join(f"{k}={v}" for k, v in shown.items()), file=sys.stderr, flush=True)


def compression(args, rows: Rows) -> None:
    """Along each training, and of its end by numbers of sampling steps."""
    for workdir in args.workdirs:
        model = open_model(args, workdir)
        f = build.first_stage(model.trained.config).factor
        config = model.trained.config
        cost = {n: sampling_flops(config, n) for n in (*ENDS, ALONG)}
        about = {**model.about, "f": f}
        run = functools.cache(lambda steps, model=model: make_run(model, steps=steps))
        for part in range(1, CURVE + 1):
            at = model.trained.step * part // CURVE

            def on_the_way(at=at, model=model, run=run):
                there = nearest(model.workdir, at)
                params = pipeline.load(model.workdir, model.mesh, LENGTH, there).params
                spent = training_flops(model.workdir, model.trained.config, there)
                return {"at": there, "training_tflop": spent, **measure(model, run(ALONG), params)}

            rows.add(
                {
                    **about,
                    "part": f"{part}/{CURVE}",
                    "steps": ALONG,
                    "sampling_gflop": cost[ALONG],
                },
                on_the_way,
            )
        params = functools.cache(
            lambda model=model: pipeline.load(model.workdir, model.mesh, LENGTH).params
        )
        for steps in ENDS:
            rows.add(
                {**about, "part": "end", "steps": steps, "sampling_gflop": cost[steps]},
                lambda m=model, run=run, params=params, n=steps: measure(m, run(n), params()),
            )


def sampling_flops(config: Any, steps: int) -> float:
    """GFLOP of an image: the network, twice where there is guidance, and decoding."""
    passes = steps * (1 if config.sample.scale == 1 else 2)
    return (passes * measures.unet_flops(config) + measures.decode_flops(config)) / 1e9


def nearest(workdir: str, step: int) -> int:
    """The step closest to `step` of which averages are stored."""
    place = Path(workdir) / "averages" / "checkpoints"
    steps = [int(path.name) for path in place.iterdir() if path.name.isdigit()]
    return min(steps, key=lambda s: abs(s - step))


def training_flops(workdir: str, config: Any, step: int) -> float:
    """TFLOP of the training up to a step, as XLA counts them."""
    logged = [x for x in read_jsonl(f"{workdir}/metrics.jsonl") if "flops_per_second" in x]
    per_image = logged[-1]["flops_per_second"] / logged[-1]["images_per_second"]
    return per_image * config.train.batch_size * step / 1e12


def steps(args, rows: Rows) -> None:
    """Samplers by numbers of steps."""
    model = open_model(args, args.workdirs[0])
    for name, (sampler, options) in SAMPLERS.items():
        for count in args.steps or STEPS:
            run = functools.partial(make_run, model, sampler=sampler, options=options, steps=count)
            rows.add(
                {**model.about, "sampler": name, "steps": count},
                lambda run=run: measure(model, run(), model.trained.params),
            )


def guidance(args, rows: Rows) -> None:
    """Scales of guidance; 0 ignores the condition, 1 is the condition alone."""
    model = open_model(args, args.workdirs[0])
    for scale in SCALES:
        rows.add(
            {**model.about, "scale": scale},
            lambda scale=scale: measure(
                model, make_run(model, scale=scale, steps=20), model.trained.params
            ),
        )


def lengths(args, rows: Rows) -> None:
    """Lengths of the averages, made of those that the training stored."""
    model = open_model(args, args.workdirs[0])
    run = make_run(model, steps=20)
    for length in LENGTHS:
        rows.add(
            {**model.about, "ema_length": length},
            lambda length=length: measure(
                model, run, pipeline.load(model.workdir, model.mesh, length).params
            ),
        )


def first_stages(args, rows: Rows) -> None:
    """How well first stages reconstruct validation images."""
    mesh = make_mesh()
    for workdir in args.workdirs:
        trained = pipeline.load(workdir, mesh)
        config = trained.config
        if config.phase != "first_stage":
            raise UserError(f"{workdir}: this takes phase 1")
        stage = build.first_stage(config)
        picture = args.out.with_name(f"{args.out.name}_{Path(workdir).name}.png")
        about = {
            "workdir": workdir,
            "kind": config.first_stage.kind,
            "f": stage.factor,
            "latent": "x".join(map(str, build.latent_shape(config))),
            "trained": trained.step,
            "number": args.number,
        }

        def measured(trained=trained, picture=picture):
            found = pipeline.write_reconstructions(trained, mesh, picture, args.number, BATCH, None)
            return {name: float(value) for name, value in found.items()}

        rows.add(about, measured)


# Tables and figures


def table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """In Markdown."""
    lines = [f"| {' | '.join(names)} |", f"|{'---:|' * len(names)}"]
    for row in rows:
        cells = (row.get(name, "–") for name in names)
        shown = [digits(cell) if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def line(axis: Any, rows: Sequence[Row], x: str, y: str, **style: Any) -> None:
    """A curve of some rows, in order of x."""
    points = sorted((row[x], row[y]) for row in rows)
    axis.plot(*zip(*points, strict=True), "o-", **style)


def groups(rows: Sequence[Row], name: str) -> Mapping[Any, list[Row]]:
    """Rows by a value, in the order of the first of each."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found


def ticks(axis: Any, rows: Sequence[Row], name: str) -> None:
    """A logarithmic axis that shows the values that there are."""
    values = sorted({row[name] for row in rows})
    axis.set(xscale="log", xlabel=name)
    axis.set_xticks(values, values)
    axis.minorticks_off()


def draw_compression(axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """Figures 6 and 7 in small."""
    from matplotlib.ticker import LogLocator

    for f, own in groups(rows, "f").items():
        line(axes[0], [r for r in own if "at" in r], "training_tflop", "class", label=f"f = {f}")
        ends = [r for r in own if r["part"] in ("end", f"{CURVE}/{CURVE}")]
        line(axes[1], ends, "sampling_gflop", "class", label=f"f = {f}")
    axes[0].set(xscale="log", ylim=(0, 1), xlabel="training, TFLOP", ylabel="class right")
    axes[1].set(xscale="log", ylim=(0, 1), xlabel="sampling, GFLOP an image")
    for axis in axes:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()


def draw_steps(axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """Quality by sampler."""
    for axis, name in zip(axes, ("class", "recall"), strict=True):
        for sampler, own in groups(rows, "sampler").items():
            line(axis, own, "steps", name, label=sampler)
        axis.set(ylabel=name)
        ticks(axis, rows, "steps")


def draw_against(name: str, axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """Quality and diversity against a setting, and against each other."""
    for measured in ("class", "precision", "recall", "spread"):
        line(axes[0], rows, name, measured, label=measured)
    axes[0].set(xlabel=name)
    axes[1].plot(*np.transpose([(r["spread"], r["class"]) for r in rows]), "o-", label=name)
    for row in rows:
        place = (row["spread"], row["class"])
        axes[1].annotate(f"{row[name]:g}", place, xytext=(4, 4), textcoords="offset points")
    axes[1].set(xlabel="spread", ylabel="class right")


def draw_first_stages(axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """Quality of reconstructions against f."""
    for axis, name in zip(axes, ("psnr", "ssim"), strict=True):
        for kind, own in groups(rows, "kind").items():
            line(axis, own, "f", name, label=kind)
        axis.set(ylabel=name)
        ticks(axis, rows, "f")


COMMON = ("class", "precision", "recall", "spread", "images_per_second", "inception_fid")
EXPERIMENTS: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {
    "compression": (
        compression,
        draw_compression,
        ("f", "part", "at", "steps", "training_tflop", "sampling_gflop", *COMMON),
    ),
    "steps": (steps, draw_steps, ("sampler", "steps", *COMMON)),
    "guidance": (guidance, functools.partial(draw_against, "scale"), ("scale", *COMMON)),
    "lengths": (
        lengths,
        functools.partial(draw_against, "ema_length"),
        ("ema_length", *COMMON),
    ),
    "first_stages": (
        first_stages,
        draw_first_stages,
        ("kind", "f", "latent", "trained", "psnr", "ssim", "l1"),
    ),
}


def main() -> None:
    """Measures what is missing, prints the table and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--out", type=Path, help="of PATH.json and PATH.png (runs/EXPERIMENT)")
    parser.add_argument("--number", type=int, default=96, help="of images (%(default)s)")
    parser.add_argument("--steps", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--inception", metavar="FILE", help="FID's weights")
    args = parser.parse_args()
    xla.tune()
    args.out = args.out or Path("runs") / args.experiment
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax warns of what was asked for
    measured, draw, columns = EXPERIMENTS[args.experiment]
    rows = Rows(args.out)
    try:
        measured(args, rows)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    shown = [name for name in columns if any(name in row for row in rows.found)]
    print(table(rows.found, shown))

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4))
    axes = figure.subplots(1, 2)
    draw(axes, rows.found)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out.with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main()
