"""How the cost of a training step grows with the batch, the devices, the UNet's width, the image.

    python -m benchmarks.growth [--config=configs/diffusion/shapes64.py] [--repeats=5]
        [--grow=batch,devices,fsdp,width | size | steps] [--plot=FILE]

One row each, a process each (devices are fake ones of the CPU), latents drawn at random; prints the
table of docs/scaling.md. With `--grow=size` (pixels of a side) and `--grow=steps` (of DDIM, for a
batch with guidance) it prints those of docs/performance.md. Compile time is without the compilation
cache; step time the median; memory XLA's own account of the step, per device; host time what the
loader takes to make an example (one thread), images rendered.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from latent_diffusion_jax import xla

BASE = {"batch": 16, "devices": 1, "fsdp": 1, "width": 64, "size": 64}
VALUES = {
    "batch": (8, 16, 32, 64),
    "devices": (2, 4, 8),
    "fsdp": (2, 4, 8),
    "width": (32, 128, 256),
    "size": (32, 64, 128, 256),
    "steps": (10, 25, 50, 100),
}
TRAINING = ("batch", "devices", "fsdp", "width")  # by default
SAMPLING = {
    "steps": "steps",
    "batch": "batch",
    "compile": "compile, s",
    "sample": "a batch, s",
    "images": "images/s",
}
COLUMNS = {
    "batch": "batch",
    "devices": "devices",
    "fsdp": "fsdp",
    "width": "channels",
    "size": "pixels",
    "parameters": "M parameters",
    "compile": "compile, s",
    "step": "step, s",
    "images": "images/s",
    "state": "state, MB a device",
    "temporary": "temporary, MB a device",
    "host": "host, ms an image",
}


def rows(grow):
    """What is measured: one number at a time grows."""
    for name in grow:
        for value in VALUES[name]:
            devices = {"devices": value} if name == "fsdp" else {}
            yield {**BASE, **devices, name: value}


def compile_timed(lowered):
    """The program, and the seconds that its compilation took."""
    began = time.perf_counter()
    compiled = lowered.compile()
    return compiled, time.perf_counter() - began


def configure(spec: str, row: dict):
    """The config of a row."""
    from latent_diffusion_jax.config import load_config

    changes = {"train.batch_size": row["batch"], "unet.model_channels": row["width"]}
    changes |= {"data.image_size": row["size"], "data.source.image_size": row["size"]}
    return load_config(spec, [f"--config.{key}={value}" for key, value in changes.items()])


def measure_sampling(spec: str, row: dict, repeats: int) -> dict:
    """Sampling a batch of the row's batch in so many steps, in this process."""
    import jax
    import numpy as np

    from latent_diffusion_jax import build, sampling
    from latent_diffusion_jax.bench.measures import random_like
    from latent_diffusion_jax.train import sharding

    config = configure(spec, row)
    mesh, rows = sharding.make_mesh(), row["batch"]
    generate = sampling.make_generate(config, mesh, **{**config.sample, "steps": row["steps"]})
    params = sharding.init_sharded(build.init_params(config), jax.random.key(0), mesh)
    frozen = {**random_like(build.frozen_shapes(config)), "latent_scale": np.float32(1)}
    inputs, indices = random_like(build.inputs(config, rows)), np.arange(rows)

    def seconds():
        began = time.perf_counter()
        jax.block_until_ready(generate(params, frozen, inputs, jax.random.key(0), indices))
        return time.perf_counter() - began

    first = seconds()
    took = statistics.median(seconds() for _ in range(repeats))
    return row | {"compile": first - took, "sample": took, "images": rows / took}


def measure(spec: str, row: dict, repeats: int) -> dict:
    """One row, in this process."""
    import jax
    import numpy as np

    from latent_diffusion_jax import build, phases
    from latent_diffusion_jax.describe import count
    from latent_diffusion_jax.plan import step_shapes
    from latent_diffusion_jax.train import sharding

    config = configure(spec, row)
    mesh = sharding.make_mesh(fsdp=row["fsdp"])
    objective, key = build.objective(config, mesh), jax.random.key(0)
    state = sharding.init_sharded(objective.init, key, mesh)
    shapes = step_shapes(config, objective).batch
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    batch["moments"] += np.random.default_rng(0).normal(size=batch["moments"].shape)
    batch = sharding.put_batch(mesh, batch)
    stage = jax.jit(build.first_stage(config).init)(key)
    frozen = sharding.put_tree(mesh, {"first_stage": stage, "latent_scale": np.float32(1)})

    lowered = sharding.lower_step(objective.train_step, state, frozen, batch, key, mesh)
    step, compiled = compile_timed(lowered)
    seconds = []
    for _ in range(repeats + 1):  # the first is thrown away
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, frozen, batch, key))
        seconds.append(time.perf_counter() - began)
    took = statistics.median(seconds[1:])

    source, images = build.source(config, "train"), 64
    made = phases.in_order(config, source, images)
    began = time.perf_counter()
    next(made)
    host = time.perf_counter() - began
    return row | {
        "parameters": count(state.params) / 1e6,
        "compile": compiled,
        "step": took,
        "images": row["batch"] / took,
        "state": sum(
            sharding.bytes_per_device(x, mesh) for x in (state.params, state.opt_state, state.ema)
        )
        / 1e6,
        "temporary": step.memory_analysis().temp_size_in_bytes / 1e6,
        "host": host / images * 1e3,
    }


def in_a_process(args, row: dict) -> dict:
    """One row, measured by a process with as many fake devices."""
    flags = f"--xla_force_host_platform_device_count={row['devices']}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    command = [sys.executable, "-m", "benchmarks.growth", f"--row={json.dumps(row)}"]
    command += [f"--config={args.config}", f"--repeats={args.repeats}"]
    said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(said.stdout.splitlines()[-1])


def plot(found: list[dict], against: str, columns: dict[str, str], path: str) -> None:
    """Times, and memory where it is known, against what grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in ("compile", "step", "sample", "temporary") if name in found[0]]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.8))
    x = [row[against] for row in found]
    for axis, name in zip(axes, names):
        axis.plot(x, [row[name] for row in found], "o-")
        axis.set(xlabel=columns[against], ylabel=columns[name], ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Prints the table, or with --row one row as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/diffusion/shapes64.py")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--grow", type=lambda text: text.split(","), default=TRAINING)
    parser.add_argument("--plot", help="of what grows first")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    xla.tune()
    if args.row:
        kind = measure_sampling if "steps" in args.row else measure
        print(json.dumps(kind(args.config, args.row, args.repeats)))
        return
    columns = SAMPLING if "steps" in args.grow else COLUMNS
    print(f"| {' | '.join(columns.values())} |\n|{'---:|' * len(columns)}")
    found = []
    for row in rows(args.grow):
        found.append(in_a_process(args, row))
        cells = [found[-1][name] for name in columns]
        shown = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        print(f"| {' | '.join(shown)} |", flush=True)
    if args.plot:
        plot(found, args.grow[0], columns, args.plot)


if __name__ == "__main__":
    main()
