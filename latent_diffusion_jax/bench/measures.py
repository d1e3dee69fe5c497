"""What `bench` can measure: the package's own programs, on random weights and inputs.

    python -m latent_diffusion_jax.bench.measures SPEC

is a worker of the verb's. FLOPs are the model's, as `describe` counts them: what `remat` computes
again is not among them.
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from latent_diffusion_jax import build, phases, sampling
from latent_diffusion_jax.bench.turns import STARTS
from latent_diffusion_jax.bench.worker import Measured, serve
from latent_diffusion_jax.chips import chip_of
from latent_diffusion_jax.config import read_config, to_json
from latent_diffusion_jax.describe import count, flops
from latent_diffusion_jax.encode import make_encoder
from latent_diffusion_jax.plan import step_shapes
from latent_diffusion_jax.train import sharding
from latent_diffusion_jax.train.checkpoint import write_config, write_weights

STEPS = 50  # of DDIM
PICTURES, PIXELS = 64, 1.5  # that the loader is timed on: how many, of how many times the side
DRAINED = 10  # batches: more than the loader makes ahead
KEY = functools.partial(jax.random.key, 0)


def random_like(shapes: Any) -> Any:
    """Arrays of these shapes: small normal numbers; integers 0."""
    generator = np.random.default_rng(0)

    def make(x: Any) -> np.ndarray:
        if not np.issubdtype(x.dtype, np.floating):
            return np.zeros(x.shape, x.dtype)
        return (0.05 * generator.standard_normal(x.shape, np.float32)).astype(x.dtype)

    return jax.tree.map(make, shapes)


def forward(config: ConfigDict, mesh: Mesh) -> Measured:
    """The UNet, once."""
    rows = config.train.batch_size
    network = jax.jit(build.denoise_network(config))
    params = build.in_compute_dtype(config, _params(config, mesh))["unet"]
    shape = (rows, *build.latent_shape(config))
    z = np.random.default_rng(0).standard_normal(shape, np.float32)
    ports = jax.tree.map(
        lambda x: random_like(jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)),
        build.cond_shapes(config),
    )
    t = np.full((rows,), 500, np.int32)
    inputs = sharding.put_rows(mesh, {"z": z, "t": t})
    ports = jax.device_put(ports, sharding.batch_sharding(mesh))

    def run():
        return jax.block_until_ready(network(params, inputs["z"], inputs["t"], ports))

    return Measured(run, rows, rows * unet_flops(config), count(params))


def train(config: ConfigDict, mesh: Mesh) -> Measured:
    """A step of training, with the optimiser and the averages."""
    objective = build.objective(config, mesh)
    step = step_shapes(config, objective)
    state = sharding.init_sharded(objective.init, KEY(), mesh)
    frozen = sharding.put_tree(mesh, random_like(step.frozen))
    batch = sharding.put_rows(mesh, random_like(step.batch))
    lowered = sharding.lower_step(objective.train_step, state, frozen, batch, KEY(), mesh)
    compiled = lowered.compile()

    def run():
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, frozen, batch, KEY()))
        return metrics

    return Measured(run, config.train.batch_size, train_flops(config), count(step.state.params))


def train_cached(config: ConfigDict, mesh: Mesh) -> Measured:
    """A step of phase 2 on latents that `encode` stored."""
    return train(changed(config, {"latents.source": "cache"}), mesh)


def train_online(config: ConfigDict, mesh: Mesh) -> Measured:
    """A step of phase 2 that encodes its images."""
    return train(changed(config, {"latents.source": "online"}), mesh)


def train_first_stage(config: ConfigDict, mesh: Mesh) -> Measured:
    """A step of phase 1, with all of its loss."""
    if config.discriminator.kind != "none":
        config = changed(config, {"discriminator.start": 0})
    return train(config, mesh)


def encode(config: ConfigDict, mesh: Mesh) -> Measured:
    """Images to moments, as the verb `encode` does it: from the host and back."""
    rows = config.train.batch_size
    with config.unlocked():
        config.phase, config.conditioning = "diffusion", ConfigDict(dict(kind="none"))
    frozen = sharding.put_tree(mesh, random_like(build.frozen_shapes(config)))
    encoder = make_encoder(config, frozen, mesh, rows, rows)
    image = images(config, rows)
    one = jax.ShapeDtypeStruct((1, *image.shape[1:]), image.dtype)
    number = flops(build.first_stage(config).encode, frozen["first_stage"], one)
    return Measured(
        lambda: encoder({"image": image}), rows, rows * number, count(frozen["first_stage"])
    )


def decode(config: ConfigDict, mesh: Mesh) -> Measured:
    """Latents to images."""
    rows, stage = config.train.batch_size, build.first_stage(config)
    params = {"first_stage": random_like(jax.eval_shape(stage.init, KEY()))}
    params = build.in_compute_dtype(config, sharding.put_tree(mesh, params))["first_stage"]
    z = random_like(jax.ShapeDtypeStruct((rows, *latent_shape(config)), np.float32))
    z = sharding.put_rows(mesh, {"z": z})["z"]
    run = jax.jit(stage.decode)
    return Measured(
        lambda: jax.block_until_ready(run(params, z)),
        rows,
        rows * decode_flops(config),
        count(params),
    )


def sample(config: ConfigDict, mesh: Mesh) -> Measured:
    """Images by 50 steps of DDIM; with guidance, where there is a condition."""
    rows = config.train.batch_size
    options = sampling_options(config)
    generate = sampling.make_generate(config, mesh, **options)
    params = build.in_compute_dtype(config, _params(config, mesh))
    frozen = {**random_like(build.frozen_shapes(config)), "latent_scale": np.float32(1)}
    frozen = build.in_compute_dtype(config, sharding.put_tree(mesh, frozen))
    inputs = random_like(build.inputs(config, rows))
    indices = np.arange(rows)

    def run():
        return jax.block_until_ready(generate(params, frozen, inputs, KEY(), indices))

    calls = STEPS * (2 if options["scale"] != 1 else 1)
    number = rows * (calls * unet_flops(config) + decode_flops(config))
    return Measured(run, rows, number, count(params["unet"]) + count(frozen["first_stage"]))


def load(config: ConfigDict, mesh: Mesh) -> Measured:
    """A batch from the data that the config names, or from JPEG files, cut to size."""
    del mesh
    with config.unlocked():
        config.phase = "first_stage"  # the images alone
    folder = None
    if "path" in config.data.source and not config.data.source.path:
        folder = tempfile.TemporaryDirectory(prefix="bench-")
        _write_pictures(Path(folder.name), round(PIXELS * config.data.image_size))
        config.data.source.path = folder.name
    batches = phases.shuffled(config, build.source(config, "train"))

    def drain(kept=folder):  # what was made while others had their turn; files are kept till then
        del kept
        for _ in range(DRAINED):
            next(batches)

    return Measured(lambda: next(batches), config.train.batch_size, before=drain)


def cold_start(config: ConfigDict, mesh: Mesh) -> Measured:
    """A process that samples one image, to its end, with nothing compiled before."""
    return _start(config, mesh, cold=True)


def warm_start(config: ConfigDict, mesh: Mesh) -> Measured:
    """The same with all compiled before."""
    return _start(config, mesh, cold=False)


MEASURES: dict[str, Callable[[ConfigDict, Mesh], Measured]] = {
    measure.__name__: measure
    for measure in (
        *(forward, train_cached, train_online, sample, cold_start, warm_start),
        *(train_first_stage, encode, decode, load),
    )
}


# Pieces


def changed(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
    """A copy with some values changed, by dotted key."""
    config = read_config(to_json(config))
    config.update_from_flattened_dict(values)
    return config


def without_remat(config: ConfigDict) -> ConfigDict:
    """A copy whose networks compute nothing twice."""
    sections = [name for name in ("unet", "first_stage") if "remat" in config.get(name, {})]
    return changed(config, {f"{name}.remat": "none" for name in sections})


def sampling_options(config: ConfigDict) -> dict[str, Any]:
    """50 steps of DDIM, with guidance where there is a condition to guide with."""
    scale = config.sample.scale if config.sample.scale != 1 else 2.0
    guided = bool(build.conditioner(config).keys)
    return dict(
        sampler="ddim",
        options=dict(eta=0.0),
        steps=STEPS,
        timesteps="uniform",
        scale=scale if guided else 1.0,
    )


def latent_shape(config: ConfigDict) -> tuple[int, ...]:
    """(h, w, c) of a latent, in either phase."""
    stage, side = build.first_stage(config), config.data.image_size
    return side // stage.factor, side // stage.factor, stage.channels


def unet_flops(config: ConfigDict) -> float:
    """Of a call of the UNet on one latent."""
    params = build.param_shapes(config)["unet"]
    z = jax.ShapeDtypeStruct((1, *build.latent_shape(config)), np.float32)
    t = jax.ShapeDtypeStruct((1,), np.int32)
    return flops(build.denoise_network(config), params, z, t, build.cond_shapes(config))


def train_flops(config: ConfigDict) -> float:
    """Of a training step."""
    config = without_remat(config)
    objective = build.objective(config)
    return flops(objective.train_step, *step_shapes(config, objective))


def decode_flops(config: ConfigDict) -> float:
    """Of one image's decoding."""
    stage = build.first_stage(config)
    z = jax.ShapeDtypeStruct((1, *latent_shape(config)), np.float32)
    return flops(stage.decode, jax.eval_shape(stage.init, KEY()), z)


def images(config: ConfigDict, rows: int) -> np.ndarray:
    """A batch of noise, of the config's size."""
    side = config.data.image_size
    return random_like(jax.ShapeDtypeStruct((rows, side, side, 3), np.float32))


def _params(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    return sharding.init_sharded(build.init_params(config), KEY(), mesh)


def _write_pictures(folder: Path, side: int) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (PICTURES, 16, 16, 3), np.uint8)
    for i, pixels in enumerate(coarse):
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(
            folder / f"{i}.jpg", quality=90
        )


def _start(config: ConfigDict, mesh: Mesh, cold: bool) -> Measured:
    folder = tempfile.TemporaryDirectory(prefix="bench-")
    workdir, caches = f"{folder.name}/workdir", Path(folder.name) / "compiled"
    _write_workdir(config, workdir, mesh)
    command = [sys.executable, "-m", "latent_diffusion_jax", "sample", f"--workdir={workdir}"]
    command += ["--number=1", "--batch=1", f"--steps={STEPS}", f"--scale={config.sample.scale}"]
    if config.conditioning.kind == "text":
        command += ["--prompt=a red circle", "--config.data.tokenizer=basic"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(caches)}

    def run(kept=folder):
        del kept
        if cold:
            shutil.rmtree(caches, ignore_errors=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])

    if not cold:
        run()
    return Measured(run, 1, peak=lambda: None, warm_up=0)


def _write_workdir(config: ConfigDict, workdir: str, mesh: Mesh) -> None:
    """A workdir of random weights, as training leaves one."""
    params = _params(config, mesh)
    averages = {name: params[name] for name in config.train.ema_networks}
    write_config(workdir, to_json(config))
    write_weights(workdir, params, averages, {"latent_scale": 1.0, "class_names": None})
    for name, shapes in build.frozen_shapes(config).items():
        if shapes:
            params = sharding.put_tree(mesh, random_like(shapes))
            network = {"first_stage": "autoencoder"}.get(name, name)
            write_weights(f"{workdir}/{name}", {network: params}, {}, {})


# The worker


def prepare(spec: dict[str, Any]) -> Measured:
    """What a row of `bench` asks for."""
    config = read_config(spec["config"])
    values = {"dtype": spec["dtype"], "train.batch_size": spec["batch"], "train.accumulate": 1}
    if spec["what"] in STARTS:  # an accelerator may take one process alone, and it is another's
        jax.config.update("jax_platforms", "cpu")
    if spec["alone"]:
        values |= {"mesh.data": 1, "mesh.fsdp": 1}
    config = changed(config, values)
    mesh = build.unpack("mesh", sharding.make_mesh, config.mesh)
    build.check_batch(config, mesh.size)
    measured = MEASURES[spec["what"]](config, mesh)
    device = mesh.devices.flat[0]
    if device.platform != "cpu" and measured.peak is None:
        measured = measured._replace(peak=lambda: device.memory_stats()["peak_bytes_in_use"])
    chip = chip_of(device)
    return measured._replace(
        device=f"{mesh.size} x {device.device_kind}",
        best=None if chip is None else mesh.size * chip.peak(spec["dtype"]),
    )


if __name__ == "__main__":
    serve(prepare)
