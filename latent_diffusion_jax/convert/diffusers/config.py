"""config.json files: reading them with distrust, and comparing them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from latent_diffusion_jax.errors import UserError

Config = dict[str, Any]
T = TypeVar("T")


def read_json(path: Path) -> Config:
    """A JSON object.

    Raises:
      UserError: no such file, or something else in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} is not a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As diffusers writes it: sorted, a final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def number(config: Mapping[str, Any], name: str, place: str) -> int:
    """An entry that counts something.

    Raises:
      UserError: it is missing, or not a positive integer.
    """
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{place!r}: {name} is {json.dumps(value)}, not a positive integer")
    return value


def listed(config: Mapping[str, Any], name: str, kind: type[T], place: str) -> list[T]:
    """An entry that is a list, not empty, of positive integers or of strings.

    Raises:
      UserError: it is missing, or something else.
    """
    value = config.get(name)
    items: list[Any] = value if isinstance(value, list) else []
    if not items or not all(type(v) is kind and v not in (0, "") for v in items):
        raise UserError(f"{place!r}: {name} is {json.dumps(value)}, not a list of {kind.__name__}")
    return items


def check(config: Mapping[str, Any], ours: Mapping[str, Any], place: str) -> None:
    """Compares with the config.json that this package would write of the same network.

    Raises:
      UserError: an entry that makes it another network.
    """
    for name, value in ours.items():
        if name in config and config[name] != value:
            raise UserError(
                f"{place!r}: {name} is {json.dumps(config[name])}; this package has only"
                f" {json.dumps(value)} there"
            )


def plain(value: Any) -> Any:
    """A list of equal entries as that entry: diffusers means the same by both."""
    same = isinstance(value, list) and len(value) > 0 and all(v == value[0] for v in value)
    return value[0] if same else value
