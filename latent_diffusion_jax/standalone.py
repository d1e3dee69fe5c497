"""Images from an exported program, its weights and `sampler.json`, which lie beside this file.

It needs no code of whoever trained the model, but: pip install jax flatbuffers safetensors pillow

  python sample.py --number=4 --seed=0 --scale=2 --inputs label=0,5 --out=samples

`--inputs NAME=VALUES`: numbers with commas or a .npy file of rows, which the images take in turn.
What a model takes, `sampler.json` says. From Python: `images = load()({"seed": ...})`.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from PIL import Image
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent


def load(folder: Path = HERE) -> Callable[[Mapping[str, Any]], np.ndarray]:
    """Gives generate(inputs) -> images [b, H, W, 3] in [-1, 1]; it compiles once for each b."""
    program = export.deserialize(bytearray((folder / "sampler.stablehlo").read_bytes()))
    weights = jax.device_put(load_file(folder / "weights.safetensors"))
    call = jax.jit(program.call)
    return lambda inputs: np.asarray(call(weights, dict(inputs)))


def read(text: str) -> tuple[str, np.ndarray]:
    """NAME=1,2 or NAME=FILE.npy."""
    name, _, value = text.partition("=")
    if value.endswith(".npy"):
        return name, np.load(value, allow_pickle=False)
    return name, np.array([float(number) for number in value.split(",")])


def main() -> None:
    """Writes images 0 to number - 1 of a seed as PNGs."""
    parser = argparse.ArgumentParser(description="Images from an exported sampler.")
    parser.add_argument("--number", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, help="of guidance")
    parser.add_argument("--inputs", nargs="*", type=read, default=[], metavar="NAME=VALUES")
    parser.add_argument("--out", type=Path, default=Path("samples"))
    args = parser.parse_args()
    given = {"seed": args.seed, "index": np.arange(args.number), **dict(args.inputs)}
    if args.scale is not None:
        given["scale"] = args.scale
    inputs = {}
    for name, about in json.loads((HERE / "sampler.json").read_text())["inputs"].items():
        if name not in given and "default" not in about:
            parser.error(f"--inputs {name}=... is needed: {about['about']}")
        value = np.asarray(given.pop(name, about.get("default"))).astype(about["dtype"])
        rows = np.arange(args.number) % len(value) if about["shape"] else ()
        inputs[name] = value[rows]
    if given:
        parser.error(f"this model takes no {', '.join(given)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(load()(inputs)):
        pixels = np.rint(np.clip((image + 1) * np.float32(127.5), 0, 255)).astype(np.uint8)
        Image.fromarray(pixels).save(args.out / f"{i:06d}.png")


if __name__ == "__main__":
    main()
