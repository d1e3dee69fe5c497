"""Files with the keys, shapes and types of every published checkpoint: recognised, in and out."""

import json
import lzma
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.convert import compvis
from latent_diffusion_jax.convert.files import Tensor, open_tensors, write_tensors
from latent_diffusion_jax.convert.recognise import recognise
from latent_diffusion_jax.convert.workdir import export, import_workdir, open_source
from tests.published import GOLDEN, value

KEYS = json.loads(lzma.decompress((GOLDEN / "keys.json.xz").read_bytes()))
CONFIGS = {  # the first of those whose networks are the same, where the file does not tell
    "kl-f4": "kl_f4",
    "kl-f8": "kl_f8",
    "kl-f16": "kl_f16",
    "kl-f32": "kl_f32",
    "vq-f4": "vq_f4",
    "vq-f4-noattn": "vq_f4_noattn",
    "vq-f8": "vq_f8",
    "vq-f8-n256": "vq_f8_n256",
    "vq-f16": "vq_f16",
    "celeba256": "celebahq256",
    "lsun_churches256": "lsun_churches256",
    "cin256": "imagenet256_f8",
    "configs-cin256-v2": "imagenet256",
    "text2img256": "text2img256",
    "configs-txt2img-1p4B-eval": "text256",
    "layout2img-openimages256": "layout256",
    "semantic_synthesis256": "semantic256",
    "bsr_sr": "superres_bsr",
    "inpainting_big": "inpainting_big",
    "configs-768x768": "retrieval768",
}
QUICK = ("kl-f16", "vq-f4-noattn", "vq-f8-n256", "lsun_churches256", "bsr_sr")


def tensor(key, shape, dtype, config):
    """Weights by the formula, the config's schedule, and something for everything else."""
    if config.phase == "diffusion" and key in compvis.BUFFERS:
        return compvis.buffers(config)[key]
    if key == "scale_factor":
        return np.float32(0.25)
    if dtype != "float32":
        return np.full(shape, 3, dtype)
    return np.asarray(value(key, tuple(shape)), np.float32)


def config_of(name):
    folder = "diffusion" if "betas" in {key for key, _, _ in KEYS[name]} else "first_stage"
    return f"configs/{folder}/{CONFIGS[name]}.py"


def opened(name):
    config = load_config(config_of(name))
    return {
        key: Tensor(tuple(s), np.dtype(d), lambda k=key, s=s, d=d: tensor(k, s, d, config))
        for key, s, d in KEYS[name]
    }


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_recognised_from_its_keys(name):
    assert recognise(opened(name))[0].endswith(f"/{config_of(name).partition('/')[2]}")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_in_and_out_bit_for_bit(name, tmp_path):
    path, work, out = (str(tmp_path / part) for part in ("in.ckpt", "work", "out.ckpt"))
    theirs = opened(name)
    write_tensors(path, {key: t.read for key, t in theirs.items()})
    more = [] if "scale_factor" in theirs else ["--config.latents.scale=1.0"]
    if config_of(name).startswith("configs/first_stage"):
        more = []
    # one of the fake devices: each would hold a copy
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=jax.devices()[:1])
    import_workdir(open_source(path, config_of(name), more), work, mesh)
    export(work, out, mesh)
    before, after = open_tensors(path), open_tensors(out)
    assert list(before) == list(after)
    for key, t in before.items():
        assert (after[key].shape, after[key].dtype) == (t.shape, t.dtype), key
        assert after[key].read().tobytes() == t.read().tobytes(), key


MEASURE = """
import resource, sys
import jax
from latent_diffusion_jax.convert import compvis
from latent_diffusion_jax.convert.workdir import open_source
from latent_diffusion_jax.train.sharding import make_mesh
source = open_source(sys.argv[1], sys.argv[2], [])
compvis.shapes(source.config)
mesh = make_mesh()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights = compvis.load(source.tensors, source.config, mesh)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
leaves = jax.tree.leaves((weights.params, weights.frozen))
print(sum(x.nbytes for x in leaves), (peak - before) * 1024)
"""


@pytest.mark.slow
def test_memory_is_the_parameters_and_the_largest_tensor(tmp_path):
    """On the 1.45 B model, whose largest tensor is its table of tokens."""
    name = "configs-txt2img-1p4B-eval"
    path = str(tmp_path / "in.safetensors")
    theirs = opened(name)
    write_tensors(path, {key: t.read for key, t in theirs.items()})
    command = [sys.executable, "-c", MEASURE, path, config_of(name)]
    env = {**os.environ, "XLA_FLAGS": ""}  # one device: fake ones hold a copy each
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    parameters, peak = map(int, done.stdout.split()[-2:])
    largest = max(4 * np.prod(t.shape) for t in theirs.values())
    print(f"parameters {parameters}, peak {peak}, largest tensor {largest}")
    assert parameters == 4 * 1_537_948_389
    assert peak < parameters + 4 * largest
