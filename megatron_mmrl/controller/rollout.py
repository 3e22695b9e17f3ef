"""One step's groups: ask prompts, score the answers, keep the groups that are learned from, ask again if too few.

With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) rounds follow each other until ``prompts_per_step`` groups
are kept or ``max_rounds`` have been asked. A round asks ``oversample`` times the prompts that are still missing, so
that the engines have something to work on while the longest answers are finished. Groups are kept in the order of the
data and those beyond ``prompts_per_step`` are dropped: what a step learns from is a function of the position in the
data, the seed, the step and the round, and a run that resumes collects what the unbroken one did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_mmrl import pulse
from megatron_mmrl.types import Group

if TYPE_CHECKING:
    from megatron_mmrl.controller.parts import Parts

_ROUND_STRIDE = 1 << 32  # between the seeds of two rounds; the first has the run's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What came of a step's generation."""

    groups: Sequence[Group]  # to be learned from: at most prompts_per_step, in the order of the data
    generated: Sequence[Group]  # every group, scored
    num_kept: int  # groups that passed the filters, those that were not needed included
    rounds: int

    def counters(self) -> dict[str, float]:
        """Rates of the selection, in groups."""
        return {
            "sampling/rounds": float(self.rounds),
            "sampling/generated": float(len(self.generated)),
            "sampling/refused": float(len(self.generated) - self.num_kept),
            "sampling/surplus": float(self.num_kept - len(self.groups)),
            "sampling/used": float(len(self.groups)),
        }


def collect(parts: Parts, step: int) -> Rollout:
    """q ~ D, o_i ~ pi_old(. | q), r_i = R(q, o_i), until the step has its groups or may not ask again. Collective."""
    pulse.at_step(step)
    wanted, sampling = parts.config.rollout.prompts_per_step, parts.config.algorithm.dynamic_sampling
    max_rounds, oversample = (sampling.max_rounds, sampling.oversample) if sampling.enabled else (1, 1.0)
    generated: list[Group] = []
    kept: list[Group] = []
    rounds = 0
    with parts.handover.generating():
        while rounds < max_rounds and len(kept) < wanted:
            groups = _ask(parts, math.ceil((wanted - len(kept)) * oversample), step, rounds)
            generated += groups
            kept += [group for group in groups if parts.algorithm.select(group, step)]
            rounds += 1
    return Rollout(groups=kept[:wanted], generated=generated, num_kept=len(kept), rounds=rounds)


def _ask(parts: Parts, num_prompts: int, step: int, number: int) -> list[Group]:
    """Generate and score one round."""
    seed = parts.config.run.seed + number * _ROUND_STRIDE
    with parts.log.time("generate"):
        prompts = parts.prompts.next(num_prompts)
        groups = parts.fleet.generate(prompts, parts.sampling, seed=seed, step=step, finished=parts.scorer.submit)
    with parts.log.time("reward_wait"):  # for what is not scored yet
        return parts.scorer.score(groups)
