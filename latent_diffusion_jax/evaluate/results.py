"""Result files of `evaluate`: measures, the protocol they follow, and what they are of.

Measures of different protocols are not comparable; `table` puts results side by side and says so.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from latent_diffusion_jax.errors import UserError

SECTIONS = ("about", "protocol", "measures")


def write(
    out: Path,
    about: Mapping[str, Any],
    protocol: Mapping[str, Any],
    measures: Mapping[str, float],
    **more: Any,
) -> None:
    """Writes a result. `about` is what may differ between results that are compared."""
    about = {**about, "jax": jax.__version__, "devices": jax.device_count()}
    found = {"about": about, "protocol": protocol, "measures": measures, **more}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1))


def lines(measures: Mapping[str, float]) -> str:
    """A measure a line."""
    return "\n".join(f"{name:20} {value:.6g}" for name, value in measures.items())


def read(path: str) -> dict[str, Any]:
    """A result file.

    Raises:
      UserError: it cannot be read, or is none.
    """
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path!r} cannot be read: {error}") from None
    if not isinstance(found, dict) or not set(SECTIONS) <= found.keys():
        raise UserError(f"{path!r} is no result of evaluate: it lacks {', '.join(SECTIONS)}")
    return found


def table(paths: Sequence[str]) -> str:
    """Measures as rows, results as columns, and below all that their protocols differ in.

    Raises:
      UserError: fewer than two results, or a file that is none.
    """
    if len(paths) < 2:
        raise UserError(f"--compare takes two results or more, not {len(paths)}")
    found = [read(path) for path in paths]
    titles = [_short(path, paths) for path in paths]
    names = list(dict.fromkeys(name for each in found for name in each["measures"]))
    rows = [[name, *(_number(each["measures"].get(name)) for each in found)] for name in names]
    text = _aligned([["", *titles], *rows])
    keys = list(dict.fromkeys(key for each in found for key in each["protocol"]))
    shown = [[key, *(json.dumps(each["protocol"].get(key)) for each in found)] for key in keys]
    differing = [row for row in shown if len(set(row[1:])) > 1]
    if not differing:
        return f"{text}\n\nof one protocol: comparable"
    return f"{text}\n\nNOT COMPARABLE where these matter, the protocols differ:\n" + _aligned(
        [["", *titles], *differing]
    )


def _short(path: str, paths: Sequence[str]) -> str:
    """The file's name, or all of the path where names are the same."""
    name = Path(path).name
    return name if sum(Path(other).name == name for other in paths) == 1 else path


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    return "\n".join(
        "  ".join([row[0].ljust(first), *(x.rjust(w) for x, w in zip(row[1:], others))]).rstrip()
        for row in rows
    )
