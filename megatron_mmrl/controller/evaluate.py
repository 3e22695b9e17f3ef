"""Greedy answers to the held-out prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from megatron_mmrl.controller.stats import term_means

if TYPE_CHECKING:
    from megatron_mmrl.controller.parts import Parts


def evaluate(parts: Parts, step: int) -> dict[str, float]:
    """``eval/<term>``: mean over prompts of one greedy answer each; {} without held-out data."""
    if not parts.eval_prompts:
        return {}
    greedy = replace(parts.sampling, temperature=0.0, num_samples=1)
    with parts.log.time("evaluate"):
        with parts.handover.generating():
            groups = parts.fleet.generate(parts.eval_prompts, greedy, seed=parts.config.run.seed, step=step)
        groups = parts.scorer.score(groups)
    row = {f"eval/{name}": value for name, value in term_means(groups).items()}
    row["eval/reward"] = float(np.mean([group.rewards.mean() for group in groups]))
    row["eval/response_tokens"] = float(np.mean([len(r.ids) for group in groups for r in group.responses]))
    return row
