"""What ``mmrl quickstart`` prepares before it trains: questions about digits and a tiny random model."""

from __future__ import annotations

from pathlib import Path

from megatron_mmrl.data.digits import DigitsOptions, digits_texts, write_digits
from megatron_mmrl.models.tiny import make_tiny_checkpoint


def prepare(out_dir: Path, options: DigitsOptions | None = None, *, model_seed: int = 0) -> None:
    """Write ``train.parquet``, ``test.parquet`` and the checkpoint ``model/`` to ``out_dir``.

    The same arguments give the same files, so it can be run again over an earlier result.
    """
    write_digits(out_dir, options)
    make_tiny_checkpoint(out_dir / "model", seed=model_seed, texts=digits_texts())
