"""Tiny models with random weights, for what training would not change; nothing is compiled."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax import build, pipeline
from latent_diffusion_jax.config import load_config, to_json
from latent_diffusion_jax.train.checkpoint import write_config, write_weights
from latent_diffusion_jax.train.state import init_ema
from tests.cli import ROOT


@functools.cache
def trained(spec: str, *overrides: str) -> pipeline.Trained:
    """A model of phase 2, as `pipeline.load` gives it, of `diffusion/shapes64.py:text,tiny`."""
    config = load_config(f"{ROOT}/configs/{spec}", overrides)
    params = weights(jax.eval_shape(build.init_params(config), jax.random.key(0)))
    stage = weights(build.frozen_shapes(config)["first_stage"])
    frozen = {"first_stage": stage, "latent_scale": jnp.float32(1)}
    return pipeline.Trained(config, params, frozen, None, 0)


def write_workdir(place: Path, spec: str, *overrides: str) -> str:
    """The same as a workdir at step 0."""
    model = trained(spec, *overrides)
    stage = {"autoencoder": model.frozen["first_stage"]}
    ema = init_ema(model.params, model.config.train.ema_networks)
    write_weights(str(place / "first_stage"), stage, {}, {})
    write_weights(str(place), model.params, ema, {"latent_scale": 1.0, "class_names": None})
    write_config(str(place), to_json(model.config))
    return str(place)


def weights(shapes):
    """Kernels of variance 1 / fan_in, also those that start at zero and would hide the network."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.full(x.shape, {"scale": 1.0, "bias": 0.02}[name], x.dtype)
        fan_in = math.prod(x.shape[:-1]) if name == "kernel" else 1
        return jnp.asarray(rng.normal(0, fan_in**-0.5, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def write_clip_tokenizer(folder):
    """Letters and "dog", with CLIP's own numbers of the start and the end; returns the numbers."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{c}</w>" for c in letters), "do", "dog</w>"]
    vocab = {word: i for i, word in enumerate(words)}
    vocab |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    return vocab
