"""The one error that a person, not a programmer, is meant to read."""

import difflib
import json
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """One clear line that names the value and the choices; the CLI prints it and exits with 2."""


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Looks `name` up in `table`.

    Raises:
      UserError: `unknown sampler 'dimm'; did you mean 'ddim'? One of ddim, ddpm`.
    """
    if name in table:
        return table[name]
    close = difflib.get_close_matches(str(name), table, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    choices = f"one of {', '.join(sorted(table))}" if table else "there are none"
    raise UserError(f"unknown {kind} {name!r};{hint} {choices}")


def differences(here: Mapping, there: Mapping, place: str) -> list[str]:
    """`optim.lr: 0.001 here, 0.0001 in runs/ldm` for each dotted key whose values differ.

    A network's `remat` may differ: it changes memory, not numbers.
    """
    ours, theirs = _flatten(here), _flatten(there)
    return [
        f"{key}: {_show(ours, key)} here, {_show(theirs, key)} {place}"
        for key in sorted(ours.keys() | theirs.keys())
        if _show(ours, key) != _show(theirs, key) and not key.endswith(".remat")
    ]


def _flatten(tree: Mapping, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat.update(_flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def _show(flat: Mapping[str, object], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"  # a tuple and a list show alike
