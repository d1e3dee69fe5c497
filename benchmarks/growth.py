"""How the cost of a training step grows with the batch, the devices and the width of the UNet.

    python -m benchmarks.growth [--config=configs/diffusion/shapes64.py] [--repeats=5]

One row each, a process each (devices are fake ones of the CPU), latents drawn at random; prints the
table of docs/scaling.md. Compile time is of the training step, without the compilation cache; step
time the median; memory XLA's own account of the step, per device; host time what the loader takes
to make an example (one thread), images rendered.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

BATCHES, DEVICES, WIDTHS = (8, 16, 32, 64), (1, 2, 4, 8), (32, 64, 128, 256)
BASE = {"batch": 16, "devices": 1, "fsdp": 1, "width": 64}
COLUMNS = {
    "batch": "batch",
    "devices": "devices",
    "fsdp": "fsdp",
    "width": "channels",
    "parameters": "M parameters",
    "compile": "compile, s",
    "step": "step, s",
    "images": "images/s",
    "state": "state, MB a device",
    "temporary": "temporary, MB a device",
    "host": "host, ms an image",
}


def rows():
    """What is measured: one number at a time grows."""
    found = [BASE | {"batch": batch} for batch in BATCHES]
    found += [BASE | {"devices": devices} for devices in DEVICES[1:]]
    found += [BASE | {"devices": devices, "fsdp": devices} for devices in DEVICES[1:]]
    return found + [BASE | {"width": width} for width in WIDTHS if width != BASE["width"]]


def measure(spec: str, row: dict, repeats: int) -> dict:
    """One row, in this process."""
    import jax
    import numpy as np

    from latent_diffusion_jax import build, phases
    from latent_diffusion_jax.config import load_config
    from latent_diffusion_jax.describe import count
    from latent_diffusion_jax.train import sharding

    changes = {"train.batch_size": row["batch"], "unet.model_channels": row["width"]}
    config = load_config(spec, [f"--config.{key}={value}" for key, value in changes.items()])
    mesh = sharding.make_mesh(fsdp=row["fsdp"])
    objective, key = build.objective(config, mesh), jax.random.key(0)
    state = sharding.init_sharded(objective.init, key, mesh)
    h, w, c = build.latent_shape(config)
    batch = {"moments": np.random.default_rng(0).normal(size=(row["batch"], h, w, 2 * c))}
    batch = {name: value.astype(np.float32) for name, value in batch.items()}
    batch |= {k: np.zeros(s.shape, s.dtype) for k, s in build.inputs(config, row["batch"]).items()}
    batch = sharding.put_batch(mesh, batch)
    stage = jax.jit(build.first_stage(config).init)(key)
    frozen = sharding.put_tree(mesh, {"first_stage": stage, "latent_scale": np.float32(1)})

    lowered = sharding.lower_step(objective.train_step, state, frozen, batch, key, mesh)
    began = time.perf_counter()
    step = lowered.compile()
    compiled = time.perf_counter() - began
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


def main() -> None:
    """Prints the table, or with --row one row as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/diffusion/shapes64.py")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.config, args.row, args.repeats)))
        return
    print(f"| {' | '.join(COLUMNS.values())} |")
    print(f"|{'---:|' * len(COLUMNS)}")
    for row in rows():
        flags = f"--xla_force_host_platform_device_count={row['devices']}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        command = [sys.executable, "-m", "benchmarks.growth", f"--row={json.dumps(row)}"]
        command += [f"--config={args.config}", f"--repeats={args.repeats}"]
        said = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        found = json.loads(said.stdout.splitlines()[-1])
        cells = [f"{found[c]:.3g}" if isinstance(found[c], float) else found[c] for c in COLUMNS]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
