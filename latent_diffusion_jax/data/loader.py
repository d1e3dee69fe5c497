"""Batches from a random-access source by grain: reshuffled per epoch, sharded, resumable.

One global stream of examples (shuffled anew each epoch, repeated, transformed with a generator
keyed by the place in the stream) is cut into batches, of which each host makes its own rows alone.
So the global batch n is the same, row by row, whatever the number of hosts, and the state of the
iterator is one number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from latent_diffusion_jax.data import transforms
from latent_diffusion_jax.errors import UserError, choose

if TYPE_CHECKING:
    import grain

CROPS = {
    "center": transforms.center_square,
    "random": transforms.random_square,
    "zoom": transforms.zoomed_square,
}


def make_loader(
    source: Any,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    train: bool,
    crop: Literal["center", "random", "zoom"] = "center",
    flip: bool = False,
    prepare: Callable[[dict, np.random.Generator], dict] | None = None,
    keys: Sequence[str] = ("image", "label"),
    variants: int = 1,
    part: range | None = None,
    shard: tuple[int, int] = (0, 1),
    threads: int = 2,
    buffer: int = 8,
) -> "grain.DatasetIterator":
    """An iterator over dicts of stacked arrays, `image` float32 [B, H, W, 3] in [-1, 1].

    For training it is endless. Otherwise it is one pass in order, centre-cropped and never flipped,
    whose last batch may be short; there, several hosts get full batches only, so that they can step
    together. With several `variants` of each example, that pass is cropped and flipped as training.

    `get_state()` is a small JSON-serialisable dict; `set_state` continues exactly, also on another
    number of hosts as long as the global batch is the same.

    Args:
      source: random access to dicts. One with `fetch(indices, turns) -> dict of arrays` (cached
        latents) is read a batch at a time and not transformed; `turns` are the epochs, from 0.
      batch_size: the rows of this host.
      image_size: the side of the square images to make.
      seed: of the order and of the transforms, 0 to 2**32 - 1.
      train: shuffle, repeat and augment.
      crop: which square is cut out in training: the largest, in the middle ("center") or anywhere
        along the longer side ("random"), or one of half to all of that side anywhere ("zoom").
      flip: mirror half of the images left to right, in training.
      prepare: (example, generator) -> entries to add, made after the image is cut.
      keys: the entries of an example to keep.
      variants: how often each example is cut; above 1 they come stacked, [B, variants, ...] each.
      part: the examples of one pass, all by default; transforms are as in the whole.
      shard: (index, count) of this host.
      threads: that make batches.
      buffer: batches made ahead.

    Raises:
      UserError: a number out of range, or a key that the source does not have.
    """
    import grain  # slow to import, and sampling needs none

    index, count = shard
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} per host must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"data seed {seed} must be 0 to 2**32 - 1")
    if len(source) < (1 if train or count == 1 else batch_size * count):
        raise UserError(
            f"{len(source)} examples are too few for {count} hosts of {batch_size} rows each"
        )
    by_batch = hasattr(source, "fetch")
    dataset = grain.MapDataset.range(len(source)) if by_batch else grain.MapDataset.source(source)
    dataset = dataset.seed(seed)
    if train:
        dataset = dataset.shuffle().repeat()
    if not by_batch:
        augment = train or variants > 1
        square = choose("crop", crop, CROPS) if augment else transforms.center_square

        def make(example: dict, generator: np.random.Generator) -> dict:
            made = [
                cut(example, generator, square, image_size, augment and flip, prepare)
                for _ in range(variants)
            ]
            check_keys(made[0], keys)
            if variants == 1:
                return {key: made[0][key] for key in keys}
            return {key: np.stack([each[key] for each in made]) for key in keys}

        make(source[0], np.random.default_rng(seed))  # what is wrong is told here, not in a thread
        dataset = dataset.random_map(make)
    else:
        check_keys(source[0], keys)
        dataset = dataset.map_with_index(lambda place, index: (index, place // len(source)))
    if part is not None:
        dataset = dataset[part.start : part.stop]
    dataset = dataset.batch(batch_size, drop_remainder=train or count > 1)
    dataset = dataset[index : len(dataset) // count * count : count]
    if by_batch:

        def gather(places: tuple[np.ndarray, np.ndarray]) -> dict:
            out = source.fetch(*places)
            return {key: out[key] for key in keys}

        dataset = dataset.map(gather)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    return iter(dataset.to_iter_dataset(options))


def cut(
    example: dict,
    generator: np.random.Generator,
    square: Callable[[int, int, np.random.Generator], transforms.Square],
    image_size: int,
    flip: bool,
    prepare: Callable[[dict, np.random.Generator], dict] | None,
) -> dict:
    """An example of a source, cut to size, perhaps mirrored, with what `prepare` makes of it."""
    height, width = example["image"].shape[:2]
    where = square(height, width, generator)
    mirror = flip and bool(generator.random() < 0.5)
    out = transforms.transform(example, where, image_size, mirror)
    return out if prepare is None else out | prepare(out, generator)


def check_keys(example: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raises UserError where an example lacks one of `keys`."""
    missing = [key for key in keys if key not in example]
    if missing:
        raise UserError(f"the data has no {', '.join(missing)}; it has {', '.join(example)}")
