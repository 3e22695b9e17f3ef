"""``mmrl doctor versions`` tells what is installed, and what is not."""

from __future__ import annotations

import importlib.metadata
import json
import platform

import pytest
import torch

import megatron_mmrl
from megatron_mmrl import cli
from megatron_mmrl.doctor.versions import ABSENT, PACKAGES


def test_every_package_has_its_version_or_is_said_to_be_absent(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "versions", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["megatron_mmrl"], told["python"]) == (megatron_mmrl.__version__, platform.python_version())
    installed = {name.metadata["Name"].lower().replace("_", "-") for name in importlib.metadata.distributions()}
    for package in PACKAGES:
        assert (told[package] == ABSENT) == (package not in installed)
    assert told["torch"] == importlib.metadata.version("torch")
    assert told["CUDA of torch"] == (torch.version.cuda or "none")
    assert (told["devices"] == "CPU only") == (not torch.cuda.is_available())


def test_people_get_aligned_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "versions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("megatron_mmrl")
    starts = {len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines}
    assert len(starts) == 1
