"""What `bench` prints, a table in Markdown, and writes."""

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from latent_diffusion_jax.bench.turns import Row, measure

Found = dict[str, Any]
NOTHING = "-"


def digits(value: float | None) -> str:
    """Three of them, or all of a large number's."""
    return NOTHING if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _scaled(key: str, unit: float) -> Callable[[Found], str]:
    return lambda found: digits(found[key] and found[key] / unit)


COLUMNS: dict[str, Callable[[Found], str]] = {
    "size": lambda found: found["size"],
    "what": lambda found: found["what"],
    "dtype": lambda found: found["dtype"],
    "batch": lambda found: str(found["batch"]),
    "by": lambda found: found["by"],
    "ms": _scaled("seconds", 1e-3),
    "CPU ms": _scaled("cpu_seconds", 1e-3),
    "images/s": _scaled("images_per_second", 1),
    "GFLOP/s": _scaled("flops_per_second", 1e9),
    "MFU": lambda found: NOTHING if found["mfu"] is None else f"{found['mfu']:.1%}",
    "peak, MB": _scaled("peak_bytes", 1e6),
    "time / ours": lambda found: digits(found.get("ratio")),
    "CPU time / ours": lambda found: digits(found.get("cpu_ratio")),
}
NAMES = 5  # columns that a row which failed has too


def head() -> str:
    """The first two lines."""
    ruler = [":---"] * NAMES + ["---:"] * (len(COLUMNS) - NAMES)
    return f"| {' | '.join(COLUMNS)} |\n|{'|'.join(ruler)}|"


def line(found: Found) -> str:
    """A row, or what went wrong with it."""
    columns = list(COLUMNS.values())
    if "error" in found:
        named = [column(found) for column in columns[:NAMES]]
        rest = [""] * (len(columns) - NAMES - 1)
        return f"| {' | '.join([*named, found['error'], *rest])} |"
    return f"| {' | '.join(column(found) for column in columns)} |"


def machine() -> dict[str, Any]:
    """What the figures are of: processor, cores, and versions of libraries."""
    versions = {}
    for name in ("jax", "jaxlib", "torch", "diffusers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def report(rows: Sequence[Row], turns: int, peers: Sequence[str], out: str | None) -> None:
    """Measures the rows one by one, and prints each when it is done; `out` is a file for JSON."""
    if out is not None:  # a name that cannot be written is told before hours of work
        Path(out).touch()
    here = machine()
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    print(f"{here['cores']} cores, {here['processor']}; {versions}; medians of {turns} turns\n")
    print(head(), flush=True)
    everything: list[Found] = []
    for number, row in enumerate(rows, 1):
        if sys.stderr.isatty():
            about = f"{row.size} {row.what} {row.dtype} {row.batch}"
            print(f"{number} of {len(rows)}: {about}", end="\r", file=sys.stderr)
        for found in measure(row, turns, peers):
            print(line(found), flush=True)
            everything.append(found)
            if out is not None:
                text = json.dumps({"machine": here, "rows": everything}, indent=1)
                Path(out).write_text(text)
    devices = sorted({found["device"] for found in everything if found.get("device")})
    print(f"\ndevices: {', '.join(devices)}" if devices else "")
