"""What a run does and keeps: length, seed, output, evaluation and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mmrl.config.checks import at_least, require


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Keys under ``run.``"""

    output_dir: str = "runs/default"
    """Everything the run leaves is under this directory."""
    seed: int = 0
    """Seeds data order, sampling and initialisation of what is not loaded."""
    num_steps: int | None = None
    """GRPO steps; when unset, ``num_epochs`` passes over the training prompts."""
    num_epochs: int = 1
    """Used only when ``num_steps`` is unset. Prompts that dynamic sampling asks in addition are not counted: with it, a
    run makes so many times the steps of one pass and sees more of the data."""
    resume: Literal["auto", "never"] = "never"
    """``auto``: continue from the last whole checkpoint in ``output_dir``, start afresh when there is none."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: only at the end."""
    evaluate_before_training: bool = True
    """Evaluate before the first step: row 0 of the metrics."""
    max_eval_prompts: int | None = None
    """Evaluate on the first so many held-out prompts; unset: all."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted; 0 keeps all."""
    export_hf: bool = True
    """Write the final model in Hugging Face format under ``hf/``."""
    log_completions: bool = True
    """Write ``completions/step_N.jsonl``."""
    tensorboard: bool = True
    """Write TensorBoard events under ``tensorboard/``."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project as well; unset: off."""

    def __post_init__(self) -> None:
        if self.num_steps is not None:
            at_least("run.num_steps", self.num_steps, 0)
        at_least("run.num_epochs", self.num_epochs, 1)
        for key in ("evaluate_every", "save_every", "keep_checkpoints"):
            at_least(f"run.{key}", getattr(self, key), 0)
        if self.max_eval_prompts is not None:
            at_least("run.max_eval_prompts", self.max_eval_prompts, 1)
        require(bool(self.output_dir), "run.output_dir is empty; name a directory such as runs/first")
