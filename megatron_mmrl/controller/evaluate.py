"""Answers to held-out prompts: greedy ones while a run trains, any number of sampled ones for ``mmrl eval``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from megatron_mmrl.controller.stats import term_means
from megatron_mmrl.types import EncodedPrompt, Group, SamplingParams

if TYPE_CHECKING:
    from megatron_mmrl.controller.handover import Handover
    from megatron_mmrl.controller.parts import Fleet, Parts
    from megatron_mmrl.controller.scoring import Scorer


def evaluate(parts: Parts, step: int) -> dict[str, float]:
    """``eval/*`` of the run's held-out prompts; {} when there are none."""
    if not parts.eval_prompts:
        return {}
    with parts.log.time("evaluate"):
        return greedy_scores(
            parts.eval_prompts, parts.fleet, parts.scorer, parts.handover, sampling=parts.sampling, step=step
        )


def greedy_scores(
    prompts: Sequence[EncodedPrompt],
    fleet: Fleet,
    scorer: Scorer,
    handover: Handover,
    *,
    sampling: SamplingParams,
    step: int,
) -> dict[str, float]:
    """Means over prompts of one greedy answer each: ``eval/<term>``, ``eval/reward``, ``eval/response_tokens``."""
    greedy = replace(sampling, temperature=0.0, num_samples=1)
    with handover.generating():
        groups = fleet.generate(prompts, greedy, seed=0, step=step)  # nothing is drawn: the seed does not matter
    return score_means(scorer.score(groups))


def answered(
    prompts: Iterable[Sequence[EncodedPrompt]],
    fleet: Fleet,
    scorer: Scorer,
    handover: Handover,
    *,
    sampling: SamplingParams,
    seed: int,
) -> Iterator[list[Group]]:
    """The scored groups of one list of prompts after the other; prompts are asked for as they are needed."""
    with handover.generating():
        for some in prompts:
            if some:
                yield scorer.score(fleet.generate(some, sampling, seed=seed, step=0, finished=scorer.submit))


def score_means(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all responses of scored groups: ``eval/<term>``, ``eval/reward``, ``eval/response_tokens``."""
    row = {f"eval/{name}": value for name, value in term_means(groups).items()}
    row["eval/reward"] = float(np.mean([group.rewards.mean() for group in groups]))
    row["eval/response_tokens"] = float(np.mean([len(r.ids) for group in groups for r in group.responses]))
    return row
