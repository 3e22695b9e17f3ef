"""YAML + ``key=value`` overrides -> a checked, frozen ``Config``. Nothing here loads torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_mmrl.config.build import ConfigError, build
from megatron_mmrl.config.root import Config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, check everything.

    A key is dotted and may index a list (``reward.terms[0].weight=0.5``); a value is YAML and replaces what the file
    has. ``${section.key}`` in a value stands for another key's value.

    Raises:
        ConfigError: file missing or not YAML, unknown key, wrong type, value out of range.
    """
    tree = _read(Path(path))
    for override in overrides:
        _apply(tree, override)
    try:
        values = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    return build(Config, values)


def dump_config(config: Config) -> str:
    """The complete configuration as YAML: ``load_config`` of it gives an equal ``Config``."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"config file {file} does not exist")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"config file {file} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"config file {file} must hold keys and values, not a {type(loaded).__name__}")
    return {str(key): value for key, value in loaded.items()}


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one ``key=value`` in ``tree``, making sections on the way."""
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"\w+(\[\d+\])*(\.\w+(\[\d+\])*)*", key):
        raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    *way, last = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", key)]
    node: Any = tree
    for part in way:
        if isinstance(node, dict) and not isinstance(node.get(part), (dict, list)):
            node[part] = {}
        node = _item(node, part, override)
    if isinstance(node, list):
        _item(node, last, override)
    node[last] = value


def _item(node: Any, part: str | int, override: str) -> Any:
    if isinstance(node, list) and not (isinstance(part, int) and part < len(node)):
        raise ConfigError(f"override {override!r}: the config file has a list of {len(node)} there, no item {part}")
    return node[part]
