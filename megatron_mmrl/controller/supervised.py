"""A supervised warm-up before GRPO: cross-entropy on given solutions, through the same policy and packing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_mmrl import pulse
from megatron_mmrl.algorithms.supervised import supervised_loss
from megatron_mmrl.controller.batches import minibatches
from megatron_mmrl.trainer.sequences import supervised_sequences
from megatron_mmrl.types import EncodedPrompt

if TYPE_CHECKING:
    from megatron_mmrl.controller.parts import Parts

SOLUTION = "solution"  # key of Prompt.meta, from extra_info.solution


def warm_up(parts: Parts, encode_solution: Callable[[str], Sequence[int]]) -> None:
    """Run ``supervised.num_steps`` updates; writes ``supervised.jsonl``.

    Raises:
        ValueError: a training row has no ``extra_info.solution``.
    """
    cfg = parts.config.supervised
    for step in range(1, cfg.num_steps + 1):
        pulse.at_step(step)
        prompts = parts.prompts.next(cfg.batch_sequences)
        targets = [np.array(encode_solution(_solution(prompt)), dtype=np.int64) for prompt in prompts]
        with parts.log.time("update"):
            (batch,) = minibatches(parts, supervised_sequences(prompts, targets), whole=True)
            stats = parts.policy.update(batch, supervised_loss)
        parts.log.supervised(step, {"loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr})


def _solution(prompt: EncodedPrompt) -> str:
    text = prompt.prompt.meta.get(SOLUTION)
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"row {prompt.prompt.id} has no text in extra_info.{SOLUTION}, which supervised.num_steps > 0 needs as its "
            "target"
        )
    return text
