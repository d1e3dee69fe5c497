"""Kills a training at random, again and again, and compares its end with that of one left alone.

    python -m tests.soak --kills=20 --steps=3000

Phase 1 of the embedded shapes, small, through the command line; SIGKILL at random moments of the
whole process (start-up, compilation, steps, checkpoints). Prints a table for docs/reliability.md.
"""

import argparse
import contextlib
import hashlib
import random
import re
import signal
import tempfile
import time
from pathlib import Path

import numpy as np

from latent_diffusion_jax.train.metrics import read_jsonl
from tests.cli import FIRST_STAGE, SMALL, arrays, run, start


def digest(workdir: Path, steps: int) -> str:
    """Of all arrays of the last checkpoint: weights, averages, optimiser."""
    content = b"".join(np.asarray(x).tobytes() for x in arrays(workdir, steps))
    return hashlib.sha256(content).hexdigest()


def logged(workdir: Path) -> list[dict]:
    """What was logged, except how long it took."""
    timing = ("images_per_second", "flops_per_second", "seconds_")
    lines = read_jsonl(str(workdir / "metrics.jsonl"))
    return [{k: v for k, v in line.items() if not k.startswith(timing)} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command = ["train", FIRST_STAGE, *SMALL, f"--config.run.steps={args.steps}"]
    command += [f"--config.run.checkpoint_every={args.every}", "--config.run.log_every=10"]
    command += ["--config.run.eval_every=500", "--config.run.image_every=0"]
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        began = time.monotonic()
        run(*command, f"--workdir={alone}")
        whole = time.monotonic() - began
        print(f"left alone: {args.steps} steps in {whole:.0f} s", flush=True)
        print(
            "| kill | after | last line said | newest checkpoint |\n|---|---|---|---|", flush=True
        )
        for kill in range(1, args.kills + 1):
            process = start(*command, f"--workdir={killed}")
            seconds = chance.uniform(1, 2 * whole / args.kills + 12)
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
            said = re.findall(r"^step (\d+)/", process.communicate()[0], re.MULTILINE)
            saved = []
            with contextlib.suppress(FileNotFoundError):
                names = (path.name for path in (killed / "checkpoints").iterdir())
                saved = sorted(int(name) for name in names if name.isdigit())
            line = f"step {said[-1]}" if said else "none"
            newest = saved[-1] if saved else "none"
            print(f"| {kill} | {seconds:.1f} s | {line} | {newest} |", flush=True)
            if process.returncode != -signal.SIGKILL:
                raise SystemExit("it had ended before: more --steps")
        run(*command, f"--workdir={killed}")
        same = digest(alone, args.steps) == digest(killed, args.steps)
        lines = logged(alone) == logged(killed)
    print(f"\nfinal state bit-identical: {same}; log identical: {lines}")
    raise SystemExit(0 if same and lines else 1)


if __name__ == "__main__":
    main()
