"""Data files as prompts by row number: parquet rows read in the configured format."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.formats import FORMATS
from megatron_mmrl.data.images import read_image
from megatron_mmrl.data.parquet import ParquetRows
from megatron_mmrl.types import Prompt


class PromptDataset:
    """``dataset.prompt(i)`` reads row i. Raises ValueError for an unknown format or unreadable files."""

    def __init__(self, files: Sequence[str], config: DataConfig) -> None:
        if config.format not in FORMATS:
            raise ValueError(f"data.format={config.format!r} is not known; use one of {sorted(FORMATS)}")
        self._rows = ParquetRows(files)
        self._read = FORMATS[config.format]
        self._read_image = partial(read_image, image_root=config.image_root)
        self.fingerprint = self._rows.fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def locate(self, index: int) -> tuple[str, int]:
        """File name and row within the file."""
        return self._rows.locate(index)

    def prompt(self, index: int) -> Prompt:
        """Row ``index`` as a prompt with the id ``<file name>:<row>``. Raises BadRowError."""
        file, row = self.locate(index)
        return self._read(self._rows.row(index), f"{file}:{row}", self._read_image)
