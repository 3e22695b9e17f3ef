"""A user's reward, function or class, by name: ``package.module:function`` or ``path/to/file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any


def is_plugin_name(name: str) -> bool:
    """Whether ``name`` has the form of a plugin, without looking whether there is one."""
    place, separator, attribute = name.rpartition(":")
    is_module = all(part.isidentifier() for part in place.split("."))
    return bool(separator) and attribute.isidentifier() and (is_module or place.endswith(".py"))


def load_plugin(name: str) -> Callable[..., Any]:
    """The function or class that ``name`` stands for.

    Raises:
        ValueError: the module or file cannot be loaded, or has no such function or class.
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, SyntaxError) as error:
        where = (
            "does it need a package that is not installed here?" if place.endswith(".py") else "is it on PYTHONPATH?"
        )
        raise ValueError(f"reward {name}: cannot import {place} ({error}); {where}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ValueError(f"reward {name}: {place} ({module.__file__}) has no function {attribute}")
    return found


def check_plugin_file(name: str) -> None:
    """Raise ValueError when ``name`` names a file that is not there. Nothing is imported."""
    place = name.rpartition(":")[0]
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"reward {name}: there is no file {place} (looked for from {Path.cwd()})")


def _load_file(path: Path) -> ModuleType:
    """The file as a module of its own; files beside it can be imported by it."""
    path = path.resolve()
    name = f"mmrl_reward_{path.stem}_{blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"there is no Python file {path}")
    sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the file look for it there
    spec.loader.exec_module(module)
    return module
