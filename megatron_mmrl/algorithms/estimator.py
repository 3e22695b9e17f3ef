"""From scored groups to the advantage of every token: KL in the reward, baseline, weight, mask, whitening, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.algorithms.advantages import reward_to_go, whiten
from megatron_mmrl.algorithms.kl import KL_VALUES
from megatron_mmrl.types import Group, TrainSequence

Baseline = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Rewards [G] of one group -> advantages [G]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """Calls give the sequences that are learned from, with their advantages. Pure; equal on every rank."""

    baseline: Baseline
    weight: Callable[[NDArray[np.float64], NDArray[np.int64]], float] | None = None
    """Factor of a group's advantages, from its rewards and lengths [G] (ADORA); None: 1."""
    kl_coef: float = 0.0
    """Of the KL that is taken off the reward; 0: none."""
    kl_estimator: str = "k1"
    kl_per_token: bool = False
    """A token is charged with the KL from itself on (REINFORCE++); false: a response with all of its KL."""
    mask_overlong: bool = False
    """Leave cut-off responses out, after the statistics of their groups have been taken."""
    whitened: bool = False
    """Normalise over all tokens that are learned from."""
    std_floor: float = 1e-6

    def __call__(self, groups: Sequence[Group], sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
        """The sequences of ``groups``, in their order, with advantages; those that are masked are left out.

        Raises:
            ValueError: sequences that do not belong to the groups, or that lack log-probs which the KL needs.
        """
        responses = [response for group in groups for response in group.responses]
        if len(responses) != len(sequences):
            raise ValueError(f"{len(groups)} groups have {len(responses)} responses, but there are {len(sequences)}")
        remaining = iter([self._penalty(sequence) for sequence in sequences])
        values = list(
            chain.from_iterable(
                self._of_group(group, list(islice(remaining, len(group.responses)))) for group in groups
            )
        )
        learned = [not (self.mask_overlong and response.finish == "length") for response in responses]
        sequences = [sequence for sequence, keep in zip(sequences, learned, strict=True) if keep]
        values = [value for value, keep in zip(values, learned, strict=True) if keep]
        if self.whitened:
            values = whiten(values, std_floor=self.std_floor)
        return [_with_advantages(sequence, value) for sequence, value in zip(sequences, values, strict=True)]

    def _penalty(self, sequence: TrainSequence) -> NDArray[np.float64]:
        """kl_coef x KL of each loss token, [R]."""
        mask = sequence.loss_mask
        if self.kl_coef == 0:
            return np.zeros(int(mask.sum()))
        if sequence.old_logprobs is None or sequence.ref_logprobs is None:
            raise ValueError("algorithm.kl_in=reward needs log pi_old and log pi_ref of every sequence")
        log_ratio = sequence.ref_logprobs[mask].astype(np.float64) - sequence.old_logprobs[mask]
        return self.kl_coef * KL_VALUES[self.kl_estimator](log_ratio)

    def _of_group(self, group: Group, penalties: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        """Advantages of each loss token of each response, [R] each."""
        rewards = group.rewards
        if not self.kl_per_token:
            rewards = rewards - np.array([penalty.sum() for penalty in penalties])
        advantages = self.baseline(rewards)
        if self.weight is not None:
            lengths = np.array([len(response.ids) for response in group.responses])
            advantages = advantages * self.weight(group.rewards, lengths)
        values = [np.full(len(penalty), value) for penalty, value in zip(penalties, advantages, strict=True)]
        if not self.kl_per_token:
            return values
        return [value - reward_to_go(penalty) for value, penalty in zip(values, penalties, strict=True)]


def _with_advantages(sequence: TrainSequence, values: NDArray[np.float64]) -> TrainSequence:
    advantages = np.zeros(len(sequence.ids), np.float32)
    advantages[sequence.loss_mask] = values
    return replace(sequence, advantages=advantages)
