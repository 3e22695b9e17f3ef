"""Where the questions come from and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mmrl.config.checks import at_least, require, within


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Keys under ``data.``"""

    train_files: list[str] = field(default_factory=list)
    """Parquet files of training prompts."""
    eval_files: list[str] = field(default_factory=list)
    """Parquet files of held-out prompts; empty: no evaluation."""
    format: str = "verl"
    """How a row is read: a name of data/formats/registry.py; ``mmrl data prepare`` writes ``verl``."""
    image_root: str | None = None
    """Image paths in rows are opened only below this directory; unset: rows must carry image bytes."""
    system_prompt: str | None = None
    """Put before every conversation that has no system turn; takes the place of the template's."""
    instruction_suffix: str | None = None
    """Put after every user's turn; takes the place of the template's."""
    template: str | None = None
    """Texts around the question: a name of data/templates (siirl, mm_eureka, verl_boxed, swift_r1v, ...) or a YAML
    file."""
    max_samples: int | None = None
    """Only the first so many rows of the training files are used; unset: all."""
    min_pixels: int = 3136
    """Images are scaled to hold at least so many pixels (processor rule)."""
    max_pixels: int = 1003520
    """... and at most so many."""
    max_decoded_pixels: int = 40_000_000
    """An image file whose header claims more pixels is refused before it is decoded."""
    max_prompt_tokens: int = 2048
    """Longer prompts (image tokens included) are dropped and counted, never cut."""
    max_bad_fraction: float = 0.01
    """Bad rows are quarantined up to this share of all rows read; beyond it the run stops."""
    shuffle: bool = True
    """Reorder the training prompts anew in each epoch, by the run's seed."""
    cache_bytes: int = 1 << 30
    """Processed prompts are kept for later epochs up to this size, per rank."""

    def __post_init__(self) -> None:
        within("data.max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)
        at_least("data.min_pixels", self.min_pixels, 1)
        at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)
        at_least("data.cache_bytes", self.cache_bytes, 0)
        if self.max_samples is not None:
            at_least("data.max_samples", self.max_samples, 1)
        require(
            self.max_pixels >= self.min_pixels,
            f"data.max_pixels={self.max_pixels} is below data.min_pixels={self.min_pixels}",
        )
