"""Plain YAML values -> checked dataclasses; every error names the full key. Nothing here knows which keys exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

D = TypeVar("D", bound="DataclassInstance")


class ConfigError(ValueError):
    """The configuration cannot be used; the message says which key and what would work."""


def build(cls: type[D], values: object) -> D:
    """Make a ``cls``, a keyword-only dataclass, out of a mapping, nested dataclasses and lists included.

    Raises:
        ConfigError: unknown or missing key, wrong type, or a value that a dataclass itself refuses.
    """
    return _build(cls, values, "", list(known_keys(cls)))


def known_keys(cls: type[DataclassInstance], key: str = "") -> Iterator[str]:
    """Every dotted key that can be set; ``[0]`` stands for any index of a list."""
    for name, hint in _hints(cls).items():
        if get_origin(hint) is list and is_dataclass(get_args(hint)[0]):
            yield _join(key, name)
            yield from known_keys(get_args(hint)[0], f"{_join(key, name)}[0]")
        elif is_dataclass(hint) and isinstance(hint, type):
            yield from known_keys(hint, _join(key, name))
        else:
            yield _join(key, name)


def _build(cls: type[D], values: object, key: str, known: list[str]) -> D:
    """``key``: dotted name of this part, empty for the root; ``known``: all keys of the root."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key}={shown(values)}: expected keys below it, such as {_join(key, fields(cls)[0].name)}")
    hints = _hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(_unknown(cls, key, _first_leaf(_join(key, str(name)), values[name]), known))
    arguments = {}
    for field in fields(cls):
        name = _join(key, field.name)
        if field.name in values:
            arguments[field.name] = _convert(values[field.name], hints[field.name], name, known)
        elif _is_required(field):
            hint = hints[field.name]
            if not (isinstance(hint, type) and is_dataclass(hint)):
                raise ConfigError(f"{name} is not set; give it in the file or as {name}=...")
            arguments[field.name] = _build(hint, {}, name, known)
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _convert(value: object, hint: Any, key: str, known: list[str]) -> object:
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        (hint,) = (option for option in get_args(hint) if option is not NoneType)
    if isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value, key, known)
    if get_origin(hint) is list and isinstance(value, list):
        (item,) = get_args(hint)
        return [_convert(entry, item, f"{key}[{index}]", known) for index, entry in enumerate(value)]
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return dict(value)
    return _scalar(value, hint, key)


def _scalar(value: object, hint: Any, key: str) -> object:
    """``value`` if it is what ``hint`` asks for, or a number written in another way."""
    # type() and not isinstance(): a bool is an int to Python, not to a reader of the configuration.
    if type(value) is hint or (get_origin(hint) is Literal and value in get_args(hint)):
        return value
    if type(value) is int and hint in (float, str):
        return hint(value)
    if hint is int and type(value) is float and value.is_integer():  # 1e9
        return int(value)
    raise ConfigError(f"{key}={shown(value)}: expected {_described(hint)}")


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(option) for option in get_args(hint))
    if get_origin(hint) is list:
        return "a list"
    if get_origin(hint) is dict:
        return "keys and values"
    return {int: "an integer", float: "a number", str: "text", bool: "true or false"}[hint]


def shown(value: object) -> str:
    """``value`` as a YAML file would have it."""
    names: dict[object, str] = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else repr(value)


def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _unknown(cls: type[DataclassInstance], section: str, key: str, known: list[str]) -> str:
    """Message for a key that does not exist, with the nearest that does or else the keys of its section."""
    if hint := _nearest(key, section, list(known_keys(cls, section)), known):
        return f"unknown key {key}; did you mean {hint}?"
    names = ", ".join(field.name for field in fields(cls))
    return f"unknown key {key}; {section or 'the top level'} has {names}"


def _nearest(key: str, section: str, siblings: list[str], known: list[str]) -> str | None:
    """First a key of the same section with a similar name, then a key of that name anywhere."""

    def closest(name: str, names: dict[str, str], cutoff: float) -> str | None:
        matches = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
        return names[matches[0]] if matches else None

    start = len(section) + 1 if section else 0
    return closest(key[start:], {other[start:]: other for other in siblings}, 0.7) or closest(
        key.rsplit(".", 1)[-1], {other.rsplit(".", 1)[-1]: other for other in reversed(known)}, 0.8
    )


def _first_leaf(key: str, value: object) -> str:
    """The first dotted key below an unknown section: a better clue to what was meant than the section's name."""
    while isinstance(value, Mapping) and value:
        name, value = next(iter(value.items()))
        key = _join(key, str(name))
    return key


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
