"""Everything that can be known to be wrong before a process is started. Loads no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.config import Config, ConfigError
from megatron_mmrl.data.formats import FORMATS
from megatron_mmrl.data.template import template_of
from megatron_mmrl.parallel.layout import check_layout
from megatron_mmrl.rewards.check import check_rewards

_RAW = (".json", ".jsonl", ".ndjson", ".csv", ".arrow")  # what ``mmrl data prepare`` reads besides parquet


def preflight(config: Config, *, need: Literal["train_files", "eval_files"] | None = "train_files") -> None:
    """Check what the configuration names: the model and its layout, data files, rewards, the algorithm.

    Args:
        config: the run's configuration.
        need: the key under ``data.`` that must name at least one file. An evaluation does not look at train_files,
            and with None no file of data is looked at.

    Raises:
        ConfigError: names the key, what was found and what would work.
    """
    try:
        check_layout(read_model_config(config.model.path), config)
        _check_engine_ranks(config)
        build_algorithm(config.algorithm, max_response_tokens=config.rollout.max_response_tokens)
        template_of(config.data)
        check_rewards(config.reward)
    except KeyError as error:
        raise ConfigError(f"model.path={config.model.path}: config.json has no {error.args[0]}") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_format(config.data.format)
    if need is not None:
        _check_files(config, need)


def read_model_config(path: str) -> Mapping[str, Any]:
    """``config.json`` of a Hugging Face checkpoint.

    Raises:
        ConfigError: there is none, or it is not the configuration of a vision-language model.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(f"model.path={path}: no config.json there; name the directory of a Hugging Face checkpoint")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path={path}: config.json is not valid JSON: {error}") from error
    if not isinstance(values, dict) or "vision_config" not in values:
        raise ConfigError(f"model.path={path}: config.json has no vision_config; a vision-language model is needed")
    return values


def _check_engine_ranks(config: Config) -> None:
    """Each rank of an engine reads the memory of a trainer process of its own."""
    engines, tensor = config.rollout.num_engines, config.rollout.tensor_parallel_size
    processes = config.parallel.world_size // engines
    if config.reshard.method == "in_place" and tensor > processes:
        raise ConfigError(
            f"rollout.tensor_parallel_size={tensor} exceeds the {processes} trainer processes of an engine "
            f"({config.parallel.world_size} / rollout.num_engines={engines}), each of which shares its memory with one "
            "rank of the engine; use fewer or smaller engines, or reshard.method=reference"
        )


def _check_format(name: str) -> None:
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(FORMATS)}"
        raise ConfigError(f"data.format={name!r} is not known; {hint}")


def _check_files(config: Config, need: str) -> None:
    files = {"eval_files": config.data.eval_files}
    if need == "train_files":
        files["train_files"] = config.data.train_files
    if not files[need]:
        raise ConfigError(f"data.{need} is empty; name at least one file of prompts")
    for key, names in files.items():
        for name in names:
            if not Path(name).is_file():
                raise ConfigError(f"data.{key}: {name} does not exist")
            if (ending := Path(name).suffix.lower()) in _RAW:
                raise ConfigError(
                    f"data.{key}: {name} is {ending} where parquet is needed; write it with mmrl data prepare {name} "
                    f"--format {config.data.format} --output-dir D (--test-split 0: nothing is held out), and name "
                    "D/train.parquet with data.format=verl"
                )
