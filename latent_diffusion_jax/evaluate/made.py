"""Sets of images that a model makes, or was trained on: made when they are asked for, kept nowhere.

Each is a `sets.Images`. Image i depends on what made it, on the seed and on i, so that what is
measured of a set can go on at any of them.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_diffusion_jax import build, pipeline, sampling
from latent_diffusion_jax.data.transforms import center_square, resize, to_float, to_uint8
from latent_diffusion_jax.evaluate.sets import Images
from latent_diffusion_jax.evaluate.tasks import make_example
from latent_diffusion_jax.train.checksum import digest
from latent_diffusion_jax.train.sharding import put_rows

AHEAD = 64  # images of a data set that are read at once

Inputs = Callable[[np.ndarray], Mapping[str, np.ndarray]]


def conditions(config: ConfigDict) -> tuple[str, Inputs]:
    """What samples are made of, in words for a protocol, and as indices -> inputs of the model.

    Classes in turn, so that each has as many; other conditions are those of the validation split,
    in its order, and again from the first.
    """
    keys = build.conditioner(config).keys
    if not keys:
        return "none", lambda indices: {}
    if set(keys) == {"label"}:
        return "classes in turn", lambda indices: sampling.example_inputs(config, indices)
    source, example = build.source(config, "validation"), make_example(config)

    def inputs(indices: np.ndarray) -> dict[str, np.ndarray]:
        examples = [example(source, int(i)) for i in indices]
        return {key: np.stack([example[key] for example in examples]) for key in keys}

    return "validation examples in turn", inputs


def samples(
    trained: pipeline.Trained, mesh: Mesh, *, number: int, batch: int, seed: int, **options: Any
) -> Images:
    """A model's samples; `options` are `sampling.make_generate`'s.

    Raises:
      UserError: conditions that come from a data set which is not there.
    """
    config = trained.config
    words, inputs = conditions(config)

    def read(start: int) -> Iterator[np.ndarray]:
        batches = sampling.generate(
            trained,
            mesh,
            inputs=inputs,
            number=number,
            batch=batch,
            seed=seed,
            start=start,
            **options,
        )
        for images in batches:
            yield from to_uint8(images)

    made_from = {
        "weights": digest([trained.params, trained.frozen]),
        "conditions": words,
        **({"data": config.data.to_dict()} if words.startswith("validation") else {}),
        "seed": seed,
        **options,
        "options": dict(options["options"]),
    }
    return Images(number, read, made_from)


def split(config: ConfigDict, name: str, number: int | None = None) -> Images:
    """The data that a config names, as a model sees it: a square cut centrally, and resized.

    Raises:
      UserError: no such data.
    """
    source, size = build.source(config, name), config.data.image_size
    total = len(source) if number is None else min(number, len(source))

    def one(i: int) -> np.ndarray:
        image = source[i]["image"]
        height, width = image.shape[:2]
        return resize(image, center_square(height, width, np.random.default_rng(0)), size)

    def read(start: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            for first in range(start, total, AHEAD):
                yield from pool.map(one, range(first, min(first + AHEAD, total)))

    return Images(total, read, {"data": config.data.to_dict(), "split": name})


def reconstructions(trained: pipeline.Trained, mesh: Mesh, images: Images, batch: int) -> Images:
    """A set of images behind a first stage, encoded and decoded by the mode."""
    config = trained.config
    params = trained.params.get("autoencoder", trained.frozen.get("first_stage"))
    rows = -(-batch // mesh.size) * mesh.size

    def read(start: int) -> Iterator[np.ndarray]:
        run = pipeline.make_reconstruct(config, mesh)
        originals = images.read(start)
        while chunk := list(itertools.islice(originals, rows)):
            padded = np.pad(to_float(np.stack(chunk)), [(0, rows - len(chunk))] + [(0, 0)] * 3)
            hat = run(params, put_rows(mesh, {"image": padded})["image"])
            yield from to_uint8(np.asarray(hat)[: len(chunk)])

    made_from = {**images.made_from, "first_stage": digest(params)}
    return Images(images.number, read, made_from)
