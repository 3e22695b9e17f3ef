"""Which output directories a run may use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mmrl.checkpoint.output_dir import FREE_TO_CHANGE, claim_output_dir
from megatron_mmrl.config import Config, ConfigError, dump_config
from megatron_mmrl.config.build import known_keys
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.optim import OptimConfig
from megatron_mmrl.config.run import RunConfig


def configure(directory: Path, **run: object) -> Config:
    return Config(model=ModelConfig(path="m"), run=RunConfig(output_dir=str(directory), **run))


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A directory that holds a run."""
    (tmp_path / "config.yaml").write_text(dump_config(configure(tmp_path, num_steps=10)))
    return tmp_path


def test_a_new_directory_is_ours(tmp_path: Path) -> None:
    claim_output_dir(configure(tmp_path))
    claim_output_dir(configure(tmp_path / "not" / "there"))
    assert list(tmp_path.iterdir()) == []


def test_logs_of_a_run_that_never_began_are_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.log").touch()
    claim_output_dir(configure(tmp_path))


def test_files_that_are_no_run_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"holds files but no run \(config.yaml is missing\); use another directory"):
        claim_output_dir(configure(tmp_path, resume="auto"))


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"is a file; name a directory"):
        claim_output_dir(configure(tmp_path / "file"))


def test_a_run_is_continued_only_when_asked(used: Path) -> None:
    with pytest.raises(ConfigError, match=r"already holds a run; use another directory, or run.resume=auto"):
        claim_output_dir(configure(used, num_steps=10))
    claim_output_dir(configure(used, num_steps=10, resume="auto"))


def test_a_continued_run_may_be_longer_and_keep_more(used: Path) -> None:
    claim_output_dir(configure(used, num_steps=20, resume="auto", save_every=5, keep_checkpoints=0))


def test_another_run_is_refused_and_the_first_difference_named(used: Path) -> None:
    config = replace(configure(used, seed=1, resume="auto"), optim=OptimConfig(lr=0.5))
    with pytest.raises(ConfigError, match=r"holds another run: run.seed is 0 there and 1 now; use another directory"):
        claim_output_dir(config)


def test_a_run_whose_configuration_cannot_be_read_is_not_overwritten(used: Path) -> None:
    (used / "config.yaml").write_text("model: {path: m}\nrun: {sed: 1}\n")
    with pytest.raises(ConfigError, match=r"holds a run that cannot be read: unknown key run.sed"):
        claim_output_dir(configure(used, resume="auto"))


def test_the_keys_that_are_free_to_change_exist() -> None:
    assert set(known_keys(Config)) >= FREE_TO_CHANGE
