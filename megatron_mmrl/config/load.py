"""YAML + ``key=value`` overrides -> a checked, frozen ``Config``. Nothing here loads torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from megatron_mmrl.config.root import Config


class ConfigError(ValueError):
    """The configuration cannot be used; the message says which key and what would work."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, check everything.

    Raises:
        ConfigError: file missing or not YAML, unknown key, wrong type, value out of range.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"config file {file} does not exist")
    try:
        loaded = OmegaConf.load(file)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} is not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"config file {file} must hold a mapping of keys, not {type(loaded).__name__}")
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not of the form key=value")
    given = OmegaConf.unsafe_merge(loaded, OmegaConf.from_dotlist(list(overrides)))
    _reject_unknown_keys(given)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), given)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]  # builds the dataclasses, runs their checks
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is not set; give it in {file} or as {error.full_key}=...") from error
    except ConfigKeyError as error:
        raise ConfigError(f"unknown key {error.full_key}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def dump_config(config: Config) -> str:
    """The complete configuration as YAML: ``load_config`` of it gives an equal ``Config``."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def known_keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key that can be set."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        key = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            yield from known_keys(hints[item.name], f"{key}.")
        else:
            yield key


def _reject_unknown_keys(given: DictConfig) -> None:
    known = list(known_keys())
    for key in _given_keys(given, known):
        if key not in known:
            hint = _nearest(key, known)
            raise ConfigError(f"unknown key {key}" + (f"; did you mean {hint}?" if hint else ""))


def _given_keys(node: DictConfig, known: list[str], prefix: str = "") -> Iterator[str]:
    for name in node:
        key = f"{prefix}{name}"
        child = node._get_node(name)
        if isinstance(child, DictConfig) and any(k.startswith(f"{key}.") for k in known):
            yield from _given_keys(child, known, f"{key}.")
        else:
            yield key


def _nearest(key: str, known: list[str]) -> str | None:
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not matches:  # right name, wrong section: compare the last part alone
        last = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
        matches = [last[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.7)]
    return matches[0] if matches else None
