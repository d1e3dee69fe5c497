"""What `evaluate` does: measures something, writes the result with its protocol, and says it.

The protocol is all that a number depends on beside the model: results are comparable where theirs
are the same (`results`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from latent_diffusion_jax import pipeline
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate import made, neighbours, results, sets, tasks
from latent_diffusion_jax.evaluate.compare import Compared, compare
from latent_diffusion_jax.evaluate.reconstruction import measure_reconstructions
from latent_diffusion_jax.train.sharding import make_mesh, put_tree

EXAMPLES = 200  # of a model, unless a number is given
SPLITS = ("train", "validation")


class Asked(NamedTuple):
    """The options of `evaluate` that are of images and their features; inception: parameters."""

    number: int | None
    batch: int
    reference: str | None
    inception: Any
    preparation: str
    save_statistics: str | None
    neighbours: int | None
    out: Path


def images(path: str, asked: Asked) -> str:
    """Images that are there already."""
    if asked.inception is None or not (asked.reference or asked.save_statistics):
        raise UserError(
            "--images takes --inception=FILE, and --reference=PATH or --save_statistics=FILE"
        )
    # both are opened before minutes are spent on one
    shown = sets.open_images(path)
    reference = sets.open_reference(asked.reference) if asked.reference else None
    found = _compare(shown, reference, asked, make_mesh())
    protocol = {"reference": asked.reference, "resize": "none before Inception's"}
    return _written(found, {"of": path}, protocol, asked)


def samples(
    trained: pipeline.Trained, mesh: Mesh, about: dict, asked: Asked, options: Mapping[str, Any]
) -> str:
    """A model's samples, of which none is kept; `options` are the sampler's and the seed."""
    if asked.reference is None and asked.save_statistics is None:
        raise UserError(
            "--inception takes --reference=PATH (train and validation: the model's own data), or"
            " --save_statistics=FILE"
        )
    number = asked.number or EXAMPLES
    reference: sets.Images | sets.Statistics | None = None
    if asked.reference in SPLITS:
        reference = made.split(trained.config, asked.reference)
    elif asked.reference is not None:
        reference = sets.open_reference(asked.reference)
    shown = made.samples(trained, mesh, number=number, batch=asked.batch, **options)
    found = _compare(shown, reference, asked, mesh)
    side = trained.config.data.image_size
    protocol = {
        "reference": asked.reference,
        "conditions": shown.made_from["conditions"],
        **options,
        "options": dict(options["options"]),
        "weights": about["weights"],
        "resize": f"references of the model's data to {side}, none before Inception's otherwise",
        "rounding": "to the nearest of 256 levels",
    }
    return _written(found, about, protocol, asked)


def first_stage(
    trained: pipeline.Trained,
    mesh: Mesh,
    about: dict,
    asked: Asked,
    workdir: str | None,
    lpips: Any,
) -> str:
    """A first stage's reconstructions of its validation split.

    `lpips` are parameters; None for the workdir's own copy, if it has one.
    """
    if asked.reference or asked.save_statistics or asked.neighbours:
        raise UserError(
            "a first stage is measured on its own validation split:"
            " --reference, --save_statistics and --neighbours are of samples"
        )
    originals = made.split(trained.config, "validation", asked.number)
    if lpips is not None:
        lpips = put_tree(mesh, lpips)
    elif workdir and (epath.Path(workdir) / "lpips" / "checkpoints").exists():
        lpips = pipeline.load_frozen(trained.config, workdir, mesh, training=True)["lpips"]
    measures = measure_reconstructions(trained, mesh, originals, batch=asked.batch, lpips=lpips)
    protocol = {
        "split": "validation",
        "number": originals.number,
        "data": trained.config.data.to_dict(),
        "latent": "the most probable",
        "psnr_ssim": "of each image, RGB in [0, 1], not rounded; Gaussian window of 11",
    }
    if asked.inception is not None:
        hats = made.reconstructions(trained, mesh, originals, asked.batch)
        found = _compare(hats, originals, asked, mesh)
        if found is not None:
            measures["rfid"] = found.measures["fid"]
            protocol |= {k: found.protocol[k] for k in ("preparation", "inception")}
            protocol["rounding"] = "for rfid, to the nearest of 256 levels"
    return _written(Compared(measures, protocol, None, None), about, {}, asked)


def task(
    trained: pipeline.Trained,
    mesh: Mesh,
    about: dict,
    out: Path,
    number: int,
    batch: int,
    options: Mapping[str, Any],
    clip_score: tasks.Measure | None,
    clip: str | None,
) -> str:
    """What the model was asked for on validation examples, as `tasks` measures it.

    `clip` says where the weights of `clip_score` are from.
    """
    measures, shown, examples = tasks.evaluate(
        trained, mesh, number=number, batch=batch, clip_score=clip_score, **options
    )
    if jax.process_index():
        return ""
    picture = out.with_suffix(".png")
    tasks.write_picture(picture, trained.config.conditioning.kind, shown, examples)
    protocol = {
        "split": "validation",
        "number": len(shown),
        **options,
        "options": dict(options["options"]),
        "weights": about["weights"],
        **({} if clip is None else {"clip": clip}),
    }
    results.write(out, about, protocol, measures)
    return f"{results.lines(measures)}\n{len(shown)} validation examples, {out}, {picture}"


def _compare(shown, reference, asked: Asked, mesh: Mesh) -> Compared | None:
    return compare(
        shown,
        reference,
        inception=asked.inception,
        preparation=asked.preparation,
        out=asked.out,
        batch=asked.batch,
        mesh=mesh,
        save=asked.save_statistics,
        neighbours=asked.neighbours or 0,
    )


def _written(found: Compared | None, about: dict, protocol: dict, asked: Asked) -> str:
    """The table, once the result is in its file; in the first process alone."""
    if found is None or jax.process_index():
        return ""
    measures, more, files = dict(found.measures), {}, str(asked.out)
    if "conditions" in protocol and found.pace is not None:
        measures["samples_per_second"] = found.pace
    if found.neighbours is not None:
        picture = asked.out.with_suffix(".neighbours.png")
        neighbours.write_picture(picture, found.neighbours)
        more["nearest"], files = found.neighbours.as_json(), f"{files}, {picture}"
    results.write(asked.out, about, {**protocol, **found.protocol}, measures, **more)
    return f"{results.lines(measures)}\n{found.protocol['number']} images, {files}"
