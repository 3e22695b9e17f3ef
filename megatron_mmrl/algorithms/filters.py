"""Which groups are learned from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.types import Group


def is_uniform(rewards: NDArray[np.float64], std_floor: float) -> bool:
    """Whether rewards [G] say nothing about which response is better: equal up to ``std_floor``.

    The spread is the sample standard deviation (see ``advantages.py``); a single response is always uniform.
    Equality is asked for first, because the mean of equal numbers is not always that number: 0.9 seven times has
    a standard deviation of 1e-16, not 0.
    """
    return len(rewards) < 2 or rewards.max() == rewards.min() or float(rewards.std(ddof=1)) <= std_floor


def keep_all(group: Group) -> bool:
    """Every group is learned from; one with equal rewards has zero advantages."""
    return True


def keep_informative(group: Group, *, std_floor: float) -> bool:
    """False for a scored group whose rewards are all equal (DAPO, arXiv 2503.14476, section 3.2, without resampling).

    It changes the loss only through its denominators: such a group's policy gradient is zero, but its tokens would
    still be counted.
    """
    return not is_uniform(group.rewards, std_floor)
