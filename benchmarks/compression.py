"""Cost against the downsampling factor f: the argument of the paper's figures 6 and 7.

    python -m benchmarks.compression [--factors=1,2,4,8,16,32] [--measure] [--turns=3] [--plot=FILE]

UNets of equal size on latents of 256-pixel images (`configs/diffusion/imagenet_sweep.py`): FLOPs of
a step of training on cached latents and of sampling (100 steps without guidance, as the paper's
comparison, and decoding), per image. With --measure also images/s on this machine, of a version
with about a sixth of the channels, in batches of 4. Prints a table in Markdown; `--plot` draws it.
"""

import argparse

import numpy as np

from latent_diffusion_jax import build, xla
from latent_diffusion_jax.bench import measures, turns
from latent_diffusion_jax.bench.report import digits
from latent_diffusion_jax.config import load_config, to_json
from latent_diffusion_jax.describe import count

FACTORS = ("1", "2", "4", "8", "16", "32")
STEPS, BATCH = 100, 4
SMALL = {192: 32, 256: 44}  # channels, so that UNets are of one size again
COLUMNS = {
    "f": "f",
    "latent": "latent",
    "parameters": "UNet, M",
    "train": "training, GFLOP an image",
    "sample": "sampling, GFLOP an image",
    "small": "small UNet, M",
    "trained": "trained, images/s",
    "sampled": "sampled, images/s",
}
MEASURED = ("small", "trained", "sampled")


def counted(f: str) -> dict:
    """What the published sizes cost, from shapes."""
    config = load_config(f"configs/diffusion/imagenet_sweep.py:{f}")
    forward = measures.unet_flops(config)
    return {
        "f": int(f),
        "latent": " x ".join(map(str, build.latent_shape(config))),
        "parameters": parameters(config) / 1e6,
        "train": 3 * forward / 1e9,  # backward is twice forward
        "sample": (STEPS * forward + measures.decode_flops(config)) / 1e9,
    }


def parameters(config) -> int:
    """Of the UNet."""
    return count(build.param_shapes(config)["unet"])


def small(f: str):
    """The config with about a sixth of the channels."""
    config = load_config(f"configs/diffusion/imagenet_sweep.py:{f}")
    config.unet.model_channels = SMALL[config.unet.model_channels]
    config.unet.num_groups = 4
    if config.first_stage.kind != "identity":
        config.first_stage.channels = 32
    return config


def timed(f: str, number: int) -> dict:
    """Images a second of the small version; of sampling, from its calls one by one."""
    config = small(f)
    text = to_json(config)

    def seconds(what: str) -> float:
        (found,) = turns.measure(turns.Row(f, what, "float32", BATCH, text), number)
        if "error" in found:
            raise SystemExit(f"{what}, f = {f}: {found['error']}")
        return found["seconds"]

    decode = 0.0 if config.first_stage.kind == "identity" else seconds("decode")
    return {
        "small": parameters(config) / 1e6,
        "trained": BATCH / seconds("train_cached"),
        "sampled": BATCH / (STEPS * seconds("forward") + decode),
    }


def plot(found: list[dict], path: str) -> None:
    """Both kinds of cost against f, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = "trained" in found[0]
    figure, axes = plt.subplots(1, 1 + measured, figsize=(4.5 * (1 + measured), 3.2), squeeze=False)
    panels = [(("train", "sample"), "GFLOP an image, published size")]
    panels += [(("trained", "sampled"), "images/s, small version")] if measured else []
    for axis, (names, label) in zip(axes[0], panels):
        for name in names:
            values = np.array([row[name] for row in found])
            axis.loglog(
                [row["f"] for row in found], values, "o-", label=COLUMNS[name].split(",")[0]
            )
        axis.set(xlabel="downsampling factor f", ylabel=label)
        axis.set_xticks([row["f"] for row in found], [row["f"] for row in found])
        axis.minorticks_off()
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Prints the table, and draws it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factors", type=lambda text: text.split(","), default=FACTORS)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--plot")
    args = parser.parse_args()
    xla.tune()
    columns = [name for name in COLUMNS if args.measure or name not in MEASURED]
    print(f"| {' | '.join(COLUMNS[name] for name in columns)} |\n|{'---:|' * len(columns)}")
    found = []
    for f in args.factors:
        row = counted(f) | (timed(f, args.turns) if args.measure else {})
        cells = [row[name] for name in columns]
        shown = [digits(cell) if isinstance(cell, float) else str(cell) for cell in cells]
        print(f"| {' | '.join(shown)} |", flush=True)
        found.append(row)
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
