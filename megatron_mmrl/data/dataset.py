"""Data files as prompts by row number: parquet rows read in the configured format, with the configured template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.formats import FORMATS
from megatron_mmrl.data.images import read_image
from megatron_mmrl.data.parquet import ParquetRows
from megatron_mmrl.data.template import template_of
from megatron_mmrl.types import Prompt


class PromptDataset:
    """``dataset.prompt(i)`` reads row i.

    Args:
        files: parquet files.
        config: format, template, image root, and ``max_samples``: only the first so many rows.

    Raises:
        ValueError: unknown format or template, unreadable files.
    """

    def __init__(self, files: Sequence[str], config: DataConfig) -> None:
        if config.format not in FORMATS:
            raise ValueError(f"data.format={config.format!r} is not known; use one of {sorted(FORMATS)}")
        self._template = template_of(config)
        self._rows = ParquetRows(files)
        self._num_rows = min(config.max_samples or len(self._rows), len(self._rows))
        self._read = FORMATS[config.format]
        self._read_image = partial(read_image, image_root=config.image_root)
        self.fingerprint = self._rows.fingerprint

    def __len__(self) -> int:
        return self._num_rows

    def locate(self, index: int) -> tuple[str, int]:
        """File name and row within the file."""
        return self._rows.locate(index)

    def prompt(self, index: int) -> Prompt:
        """Row ``index`` as a prompt with the id ``<file name>:<row>``. Raises BadRowError."""
        file, row = self.locate(index)
        return self._template.apply(self._read(self._rows.row(index), f"{file}:{row}", self._read_image))
