"""Which groups are learned from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.config.algorithm import AccuracyFilterConfig, AlgorithmConfig
from megatron_mmrl.types import Group


def is_uniform(rewards: NDArray[np.float64], std_floor: float) -> bool:
    """Whether rewards [G] say nothing about which response is better: equal up to ``std_floor``.

    The spread is the sample standard deviation (see ``advantages.py``); a single response is always uniform.
    Equality is asked for first, because the mean of equal numbers is not always that number: 0.9 seven times has
    a standard deviation of 1e-16, not 0.
    """
    return len(rewards) < 2 or rewards.max() == rewards.min() or float(rewards.std(ddof=1)) <= std_floor


def keep_group(group: Group, step: int, *, config: AlgorithmConfig) -> bool:
    """Whether a scored group is learned from in ``step``: it passes every filter that is switched on."""
    if config.drop_uniform_groups and not keep_informative(group, std_floor=config.std_floor):
        return False
    return not config.accuracy_filter.enabled or keep_by_accuracy(group, step, limits=config.accuracy_filter)


def keep_informative(group: Group, *, std_floor: float) -> bool:
    """False for a scored group whose rewards are all equal (DAPO, arXiv 2503.14476, section 3.2).

    It changes the loss only through its denominators: such a group's policy gradient is zero, but its tokens would
    still be counted.
    """
    return not is_uniform(group.rewards, std_floor)


def keep_by_accuracy(group: Group, step: int, *, limits: AccuracyFilterConfig) -> bool:
    """lower <= mean accuracy of the group <= upper; before that, up to step ``freezing_steps``, every group.

    The online filter of PRIME (arXiv 2502.01456) as MM-EUREKA uses it. The mean is of the raw term, not
    of the weighted reward.

    Raises:
        ValueError: the group has no such reward term.
    """
    values = [score.terms.get(limits.term) for score in group.scores or ()]
    known = [value for value in values if value is not None]
    if not known or len(known) != len(values):
        terms = sorted(group.scores[0].terms) if group.scores else []
        raise ValueError(f"algorithm.accuracy_filter.term={limits.term!r} is not among the reward's terms {terms}")
    return step <= limits.freezing_steps or limits.lower <= float(np.mean(known)) <= limits.upper
