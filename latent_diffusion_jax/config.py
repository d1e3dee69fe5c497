"""Config files: `FILE.py[:arg]` with `get_config(arg)`, and overrides from the command line."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_dict, config_flags

from latent_diffusion_jax.errors import UserError, choose


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Runs `get_config(arg)` of `FILE.py:arg` and applies `--config.key=value` overrides.

    Raises:
      UserError: a missing file, an argument that the file does not know, an unknown key, a value
        of another type.
    """
    name, _, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        listing = f"; {path.parent} has {', '.join(near)}" if near else ""
        raise UserError(f"no config file {name!r}{listing}")
    return override(_get_config(path.resolve(), arg), overrides)


def _get_config(path: Path, arg: str) -> ConfigDict:
    # configs import their shared pieces as `configs.sections`, from whichever folder one starts
    root = next((p.parent for p in path.parents if p.name == "configs"), path.parent)
    if str(root) not in sys.path:
        sys.path.append(str(root))
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {str(path)!r} defines no get_config(arg)")
    return module.get_config(arg)


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies `--config.key=value` strings, each value read as the type that the key has.

    Raises:
      UserError: an unknown key or a value of another type.
    """
    for text in overrides:
        _check_key(config, text)
    values = flags.FlagValues()
    argv = ["", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return values.config


def _check_key(config: ConfigDict, text: str) -> None:
    key, equals, _ = text.removeprefix("--config.").partition("=")
    if not equals:
        raise UserError(f"{text} has no value; write --config.key=value")
    *sections, name = key.split(".")
    where = "config"
    for section in sections:
        config = choose(f"section in {where}:", section, config)
        where = f"{where}.{section}"
        if not isinstance(config, ConfigDict):
            raise UserError(f"{where} is a value, not a section: it has no key {name!r}")
    choose(f"key in {where}:", name, config)


def to_json(config: ConfigDict) -> str:
    """The config as stored in a workdir."""
    return config.to_json(indent=2, sort_keys=True)


def _from_json(value: Any) -> Any:
    # JSON knows neither tuples nor typed placeholders, and only those can be overridden
    if isinstance(value, dict):
        return {k: _from_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_from_json(v) for v in value)
    return config_dict.placeholder(float) if value is None else value


def read_config(text: str) -> ConfigDict:
    """The config that `to_json` wrote."""
    return ConfigDict(_from_json(json.loads(text)))


def stored_config(workdir: str) -> ConfigDict:
    """The config that a workdir was made with.

    Raises:
      UserError: nothing was trained there.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"no config.json in {workdir!r}: train there first")
    try:
        return read_config(path.read_text())
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not readable as JSON: {error}") from error
