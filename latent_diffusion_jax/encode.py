"""What `encode` does: both splits through the frozen networks, into the cache of latents.

What is stored is all that training would compute again and again: the first stage's moments, and
what a frozen encoder makes of captions, in place of their tokens.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.cluster import everywhere
from latent_diffusion_jax.data import shards
from latent_diffusion_jax.data.latents import Latents
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.phases import (
    SPLITS,
    cache_fingerprint,
    check_classes,
    latent_scale,
    latents_path,
    loader,
    prepare_frozen,
)
from latent_diffusion_jax.train.metrics import Progress
from latent_diffusion_jax.train.sharding import (
    batch_sharding,
    gather,
    own_rows,
    put_batch,
    replicated,
)

SHARD = 8192  # latents in a file


def encode(config: ConfigDict, workdir: str, mesh: Mesh) -> float:
    """Writes the latents of both splits to `<workdir>/latents`; returns their scale.

    With them what a frozen network makes of the conditions. What is there already, of the same data
    and networks, is kept, shard by shard. Each process encodes shards of its own.
    """
    sources = {split: build.source(config, split) for split in SPLITS}
    check_classes(config, sources["train"].num_classes)
    _say_what_is_cut(config)
    frozen = prepare_frozen(config, workdir, mesh)
    scale = latent_scale(config, workdir, frozen["first_stage"], mesh)
    for split, source in sources.items():
        place = latents_path(workdir, split)
        made_from = cache_fingerprint(config, workdir, split, frozen["first_stage"])
        if everywhere(_is_encoded(place, made_from, len(source))):
            print(f"{split}: encoded before; to do it again, remove {place}", flush=True)
            continue
        _encode_split(config, source, place, made_from, frozen, scale, mesh)
    return scale


def _say_what_is_cut(config: ConfigDict) -> None:
    crop, flip = config.data.crop, config.data.flip
    if build.variants(config, "train") == 1 and (crop != "center" or flip):
        print(
            f"train: each image once, cut centrally and not mirrored: data.crop={crop} and"
            f" data.flip={flip} act from --config.latents.variants=2 on",
            flush=True,
        )


def _is_encoded(place: str, made_from: Mapping[str, Any], count: int) -> bool:
    try:
        there = Latents(directory=place, fingerprint=made_from)
        there.verify()
    except UserError:
        return False
    return len(there) == count


def _encode_split(
    config: ConfigDict,
    source: Any,
    place: str,
    made_from: Mapping[str, Any],
    frozen: Mapping[str, Any],
    scale: float,
    mesh: Mesh,
) -> None:
    """Writes the cache of a split, of which shards may be there already."""
    if jax.process_index() == 0:
        shards.begin(place, made_from, len(source), _shard(made_from["variants"]))
    everywhere(True)
    partial = shards.partial_of(Path(place))
    _encode_shards(config, source, partial, frozen, mesh, made_from)
    once = _encoded_keys(config)
    null = _encoded_null(config, frozen, mesh) if once else {}
    everywhere(True)
    if jax.process_index() == 0:
        shards.write_null(partial, null)
        shards.finish(
            place,
            fingerprint=made_from,
            latent_scale=scale,
            num_classes=source.num_classes,
            class_names=source.class_names,
            variants=made_from["variants"],
            once=once,
        )
    everywhere(True)


def _shard(variants: int) -> int:
    """Examples of a shard: all of one's variants lie in the same."""
    return max(SHARD // variants, 1)


def _encoded_keys(config: ConfigDict) -> tuple[str, ...]:
    """The entries that a frozen network makes of the conditions, the same for all variants."""
    c = build.conditioner(config)
    return tuple(key for key in c.encoded.keys if key not in c.keys) if c.encoded else ()


def _encoded_null(config: ConfigDict, frozen: Any, mesh: Mesh) -> dict[str, np.ndarray]:
    """What a frozen network makes of the null condition, [1, ...] each."""
    c = build.conditioner(config)
    nothing = {n: jnp.zeros(s.shape, s.dtype) for n, s in build.inputs(config, 1).items()}

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def make(params):
        params = gather(mesh, params)
        return c.encode(params, c.null(params, nothing))

    return jax.device_get(make(frozen["conditioning"]))


def make_encoder(
    config: ConfigDict, frozen: Any, mesh: Mesh, examples: int, images: int
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Builds run(batch of this process) -> the entries to store; up to `examples`, `images` rows.

    The entries are [b, ...], or [b, variants, ...]. All processes must run it together.
    """
    stage, c = build.first_stage(config), build.conditioner(config)
    read = [key for key in c.keys if key not in c.encoded.keys] if c.encoded else []
    devices = mesh.size // jax.process_count()
    filled = -(-examples // devices) * devices

    @functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
    def encoder(frozen, image, inputs):
        frozen = gather(mesh, frozen)
        moments = stage.encode(frozen["first_stage"], image)
        return {"moments": moments, **c.encode(frozen.get("conditioning"), inputs)}

    def put(values, rows):
        padded = {n: _padded(value, rows) for n, value in values.items()}
        return put_batch(mesh, padded)

    def run(batch):
        image = batch["image"]
        rest = {n: value for n, value in batch.items() if n != "image" and n not in read}
        *lead, _, _, _ = image.shape
        captions = {n: batch[n][:, 0] if len(lead) == 2 else batch[n] for n in read}
        flat = image.reshape(-1, *image.shape[-3:])
        made = encoder(frozen, put({"image": flat}, images)["image"], put(captions, filled))
        made = {name: own_rows(value) for name, value in made.items()}
        moments = made.pop("moments")[: len(flat)]
        once = {name: value[: lead[0]] for name, value in made.items()}
        return {"moments": moments.reshape(*lead, *moments.shape[1:]), **rest, **once}

    return run


def _padded(value: np.ndarray, rows: int) -> np.ndarray:
    """With zeros, to a number of rows."""
    return np.pad(value, [(0, rows - len(value))] + [(0, 0)] * (value.ndim - 1))


def _encode_shards(
    config: ConfigDict,
    source: Any,
    partial: Path,
    frozen: Any,
    mesh: Mesh,
    made_from: Mapping[str, Any],
) -> None:
    """Writes this process's share of the shards that are not there yet."""
    index, processes = jax.process_index(), jax.process_count()
    variants, count = made_from["variants"], len(source)
    rows = config.train.batch_size // processes
    examples = max(rows // variants, 1)
    run = make_encoder(config, frozen, mesh, examples, -(-examples * variants // rows) * rows)
    parts = {
        number: shards.shard_rows(number, count, _shard(variants))
        for number in shards.unfinished(partial, count, _shard(variants))
    }
    everywhere(True)  # all have looked, before one of them writes
    shares = [list(parts)[i::processes] for i in range(processes)]
    steps = [sum(-(-len(parts[number]) // examples) for number in share) for share in shares]
    mine = sum(len(parts[number]) for number in shares[index])
    progress = Progress(mine, unit=f"{made_from['split']} image")
    done, tenths = 0, 0

    def encoded(part):
        nonlocal done, tenths
        options = dict(train=False, shard=(0, 1), part=part, variants=variants)
        for batch in loader(config, source, examples, **options):
            yield run(batch)
            done += len(batch["image"])
            progress.update(done)
            if done * 10 // mine > tenths:
                tenths = done * 10 // mine
                progress.line(done, "encoded")

    for number in shares[index]:
        shards.write_shard(partial, number, encoded(parts[number]), len(parts[number]))
    side = config.data.image_size
    blank = {"image": np.zeros((examples, side, side, 3), np.float32)}
    blank |= {n: np.zeros(s.shape, s.dtype) for n, s in build.inputs(config, examples).items()}
    for _ in range(max(steps) - steps[index]):  # devices work together, or not at all
        run(blank)
    progress.close()
