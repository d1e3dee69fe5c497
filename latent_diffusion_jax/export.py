"""A trained sampler as a folder that needs none of this package: a program and its weights.

The program is StableHLO as `jax.export` writes it, for several kinds of device and any batch. Its
weights are arguments of it, from a file beside it: as constants they would be in it as text.
"""

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion_jax import build, standalone
from latent_diffusion_jax.conditioning import text
from latent_diffusion_jax.convert.safetensors_file import write_safetensors
from latent_diffusion_jax.errors import UserError, choose
from latent_diffusion_jax.nn.products import traced_for
from latent_diffusion_jax.pipeline import Trained
from latent_diffusion_jax.sampling import PLAIN, Extras, make_programs, with_known_pixels
from latent_diffusion_jax.train.sharding import plan_mesh

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
TOKENIZER = (  # files of one, as `save_pretrained` writes them
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    "special_tokens_map.json",
)
TOKENS = {
    "text": f"BERT's word pieces (lower case) between {text.BERT_EMPTY[0]} and"
    f" {text.BERT_EMPTY[1]}, then zeros",
    "clip": f"CLIP's byte pairs between {text.CLIP_EMPTY[0]} and {text.CLIP_EMPTY[1]}, then pads",
    "layout": "an object's class and two corners, as in conditioning/layout.py",
}
ABOUT = {
    "label": "class of each image",
    "segmentation": "class of each pixel",
    "lowres": "image to upscale, in [-1, 1]",
    "image_to_fill": "in [-1, 1]",
    "mask": "1 where the image is to be filled",
    "embeddings": "such as CLIP's of retrieved images",
}


def export(
    trained: Trained,
    target: Path,
    *,
    platforms: Sequence[str],
    sampler: str,
    options: Mapping[str, float],
    steps: int,
    timesteps: str,
    scale: float,
    size: tuple[int, int] | None = None,
    extras: Extras = PLAIN,
) -> None:
    """Writes `sampler.stablehlo`, `weights.safetensors`, `sampler.json` and `sample.py`.

    Args:
      trained: of phase 2.
      target: a new folder.
      platforms: of PLATFORMS.
      sampler, options, steps, timesteps, size, extras: as `sampling.make_generate` takes them.
      scale: the default of the argument; 1 leaves guidance out of the program.

    Raises:
      UserError: the folder is there already, or a platform that JAX does not know.
    """
    for platform in platforms:
        choose("platform", platform, dict.fromkeys(PLATFORMS))
    if target.exists():
        raise UserError(f"{str(target)!r} is there already: choose another --to")
    config = trained.config
    guided = scale != 1 and bool(build.conditioner(config).keys)
    latent, decode = make_programs(
        config,
        plan_mesh(1),
        sampler=sampler,
        options=options,
        steps=steps,
        timesteps=timesteps,
        guided=guided,
        size=size,
        extras=extras,
    )

    def generate(weights, inputs):
        params, frozen = weights["params"], weights["frozen"]
        inputs = dict(inputs)
        key = jax.random.key(inputs.pop("seed"), impl="threefry2x32")
        scales = inputs.pop("scale", jnp.float32(1)), jnp.float32(extras.guide_scale)
        z = latent(params, frozen, inputs, key, inputs.pop("index"), scales)
        return with_known_pixels(decode(frozen, z), inputs, jnp.where)

    weights = {"params": trained.params, "frozen": trained.frozen}
    make = functools.partial(inputs, config, size, guided)
    # one program for all of them: a TPU's runs anywhere
    with traced_for("cpu" if list(platforms) == ["cpu"] else "tpu"):
        exported, kept = _export(generate, weights, make, platforms)
    described = _describe(trained, make(), exported)
    if guided:
        described["inputs"]["scale"]["default"] = scale
    how = {"name": sampler, "options": dict(options), "steps": steps, "timesteps": timesteps}
    described["sampler"] = how
    place = target.with_name(f"{target.name}.partial")  # whole or absent
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    tokenizer = config.data.get("tokenizer")
    if tokenizer and "tokens" in described["inputs"]:
        described["tokenizer"] = copy_tokenizer(tokenizer, place)
    (place / "sampler.stablehlo").write_bytes(exported.serialize())
    with (place / "weights.safetensors").open("wb") as file:
        arrays = {name: functools.partial(np.asarray, x) for name, x in kept.items()}
        write_safetensors(file, arrays, None)
    shutil.copyfile(standalone.__file__, place / "sample.py")
    (place / "sampler.json").write_text(json.dumps(described, indent=1))
    place.rename(target)


def inputs(
    config: ConfigDict, size: tuple[int, int] | None, guided: bool, b: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the program takes beside its weights, of b images; default: of any number."""
    many: Any = jax.export.symbolic_shape("b")[0] if b is None else b
    scalars = {"seed": jnp.uint32, **({"scale": jnp.float32} if guided else {})}
    height, width = size or (config.data.image_size,) * 2
    rows = build.conditioner(config).inputs(height, width)
    return {
        **{name: jax.ShapeDtypeStruct((), dtype) for name, dtype in scalars.items()},
        "index": jax.ShapeDtypeStruct((many,), jnp.int32),
        **{name: jax.ShapeDtypeStruct((many, *x.shape), x.dtype) for name, x in rows.items()},
    }


def _export(
    generate: Callable[[Any, Any], jax.Array],
    weights: Any,
    make_inputs: Callable[..., dict[str, jax.ShapeDtypeStruct]],
    platforms: Sequence[str],
) -> tuple[jax.export.Exported, dict[str, jax.Array]]:
    """The program of the weights that it reads, and those by name: a decoder needs no encoder."""
    leaves, structure = jax.tree.flatten(weights)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
    names = ["/".join(key.key for key in path) for path in paths]

    def flat(named, inputs):
        whole = [named[n] if n in named else jnp.zeros(x.shape, x.dtype) for n, x in every.items()]
        return generate(jax.tree.unflatten(structure, whole), inputs)

    every = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in zip(names, leaves, strict=True)}
    run = functools.partial(jax.export.export, jax.jit(flat))
    # of any number of images, JAX keeps what is not read
    used = run(platforms=platforms[:1])(every, make_inputs(b=1)).module_kept_var_idx
    kept = {name: x for i, (name, x) in enumerate(sorted(every.items())) if i in used}
    exported = run(platforms=platforms)(kept, make_inputs())
    return exported, {n: x for n, x in zip(names, leaves, strict=True) if n in kept}


def _describe(
    trained: Trained, taken: Mapping[str, jax.ShapeDtypeStruct], exported: jax.export.Exported
) -> dict[str, Any]:
    """`sampler.json`: what to give, what comes out, and what it was made with."""
    config, names = trained.config, trained.class_names
    about = dict(ABOUT, seed="of all images", index="number of each image of the seed")
    about["scale"] = "of guidance; 1 is none"
    for part in build.conditions(config):
        if part.kind in TOKENS:
            about["tokens"] = TOKENS[part.kind]

    def shape(x):
        return [n if isinstance(n, int) else str(n) for n in x.shape]

    described: dict[str, Any] = {
        "inputs": {
            name: {"shape": shape(x), "dtype": x.dtype.name, "about": about[name]}
            for name, x in taken.items()
        },
        "images": {"shape": shape(exported.out_avals[0]), "dtype": "float32", "range": [-1, 1]},
        "platforms": exported.platforms,
        "step": trained.step,
        "made_with": {
            "jax": jax.__version__,
            "calling_convention_version": exported.calling_convention_version,
        },
    }
    for part in build.conditions(config):
        if part.kind == "label":
            described["inputs"]["label"]["default"] = list(range(part.num_classes))
            described["class_names"] = names and list(names)
    return described


def copy_tokenizer(tokenizer: str, target: Path) -> str:
    """Copies a tokeniser's files; returns where they are, or the name that others know."""
    path, place = Path(tokenizer), target / "tokenizer"
    if tokenizer == text.BASIC:
        path = Path(text.__file__).with_name("vocabulary.txt")
    if not path.exists():
        return tokenizer
    files = {n: path / n for n in TOKENIZER} if path.is_dir() else {TOKENIZER[0]: path}
    place.mkdir()
    for name, file in files.items():
        if file.is_file():
            shutil.copyfile(file, place / name)
    return place.name
