"""Whose directory is it: a run continues its own output and never mixes with another's. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from megatron_mmrl.config import Config, ConfigError, load_config
from megatron_mmrl.config.build import shown

CONFIG_FILE = "config.yaml"
LOG_DIR = "logs"

# What may differ between a run and its continuation: how long it is, what it keeps and shows, and how long it waits.
FREE_TO_CHANGE = frozenset(
    {
        "run.output_dir",  # a directory may be moved
        "run.num_steps",
        "run.num_epochs",
        "run.resume",
        "run.evaluate_every",
        "run.save_every",
        "run.keep_checkpoints",
        "run.export_hf",
        "run.log_completions",
        "run.tensorboard",
        "run.wandb_project",
        "parallel.timeout_s",
        "rollout.request_timeout_s",
        "rollout.startup_timeout_s",
    }
)
# Sections that say how a run is started and watched, not what it computes.
_FREE_SECTIONS = ("cluster.",)


def claim_output_dir(config: Config) -> None:
    """Refuse ``run.output_dir`` unless it is new, or holds this very run and ``run.resume=auto``.

    Creates and writes nothing. Log files alone do not make a run: the one that left them never began.

    Raises:
        ConfigError: names the directory, and for another run's the first key that differs.
    """
    directory = Path(config.run.output_dir)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"run.output_dir={directory} is a file; name a directory")
    if not directory.is_dir() or all(entry.name == LOG_DIR for entry in directory.iterdir()):
        return
    if not (directory / CONFIG_FILE).is_file():
        raise ConfigError(
            f"run.output_dir={directory} holds files but no run ({CONFIG_FILE} is missing); use another directory"
        )
    if config.run.resume != "auto":
        raise ConfigError(
            f"run.output_dir={directory} already holds a run; use another directory, or run.resume=auto to continue it"
        )
    _refuse_another_run(config, directory)


def _refuse_another_run(config: Config, directory: Path) -> None:
    try:
        earlier = load_config(directory / CONFIG_FILE)
    except ConfigError as error:
        raise ConfigError(f"run.output_dir={directory} holds a run that cannot be read: {error}") from error
    was, now = dict(settings_of(earlier)), dict(settings_of(config))
    for key, value in now.items():
        if key not in FREE_TO_CHANGE and not key.startswith(_FREE_SECTIONS) and was[key] != value:
            raise ConfigError(
                f"run.output_dir={directory} holds another run: {key} is {shown(was[key])} there and {shown(value)} "
                "now; use another directory, or the same settings to continue that run"
            )


def settings_of(part: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys with their values, in the order of the dataclasses."""
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if is_dataclass(value):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value
