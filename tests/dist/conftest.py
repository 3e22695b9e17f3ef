"""What several files of this folder train."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint; a file that needs another one defines its own."""
    from megatron_mmrl.models.tiny import make_tiny_checkpoint

    path = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(path)
    return path
