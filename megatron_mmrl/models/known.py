"""A model to plan for, by name or path: its ``config.json`` in a directory, without a checkpoint. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

import megatron_mmrl
from megatron_mmrl.config import ConfigError
from megatron_mmrl.models.registry import MODELS

MODELS_DIR = Path(megatron_mmrl.__file__).parent.parent / "configs" / "models"


@contextmanager
def config_dir(model: str) -> Iterator[Path]:
    """A directory whose ``config.json`` is that of ``model``, while the context lasts.

    Args:
        model: a file of ``configs/models`` without its suffix, a YAML or JSON file, or a checkpoint's directory.

    Raises:
        ConfigError: no such model, or one that is not supported.
    """
    named = MODELS_DIR / f"{model}.yaml"
    file = next((f for f in (named, Path(model), Path(model) / "config.json") if f.is_file()), None)
    known = sorted(f.stem for f in MODELS_DIR.glob("*.yaml"))
    if file is None:
        raise ConfigError(
            f"model {model} is neither one of {known}, nor a YAML or JSON file, nor a directory with a config.json"
        )
    config = _read(file)
    with TemporaryDirectory(prefix="mmrl-model-") as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        yield Path(directory)


def known_model(path: str) -> str | None:
    """The file of ``configs/models`` (without suffix) that a checkpoint's directory is named after, or None.

    ``models/Qwen2.5-VL-7B-Instruct`` and ``qwen2_5_vl_7b`` are both ``qwen2_5_vl_7b``.
    """
    name = Path(path).name.lower().translate(str.maketrans(".-", "__"))
    known = {file.stem for file in MODELS_DIR.glob("*.yaml")}
    return next((stem for stem in known if name == stem or name.startswith(f"{stem}_")), None)


def _read(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    try:
        config = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in MODELS:
        raise ConfigError(f"{file} is of model_type {model_type!r}; supported: {sorted(MODELS)}")
    return config
