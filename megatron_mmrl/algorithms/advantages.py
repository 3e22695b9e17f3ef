"""How much better a response is than the others of its group: the formulas, on the numbers of one group."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.algorithms.filters import is_uniform


def group_advantages(
    rewards: NDArray[np.float64], *, std_floor: float = 1e-6, normalize_std: bool = True
) -> NDArray[np.float64]:
    """Advantages [G] of the responses to one prompt, from their rewards [G], in float64.

    A_i = (r_i - mean(r)) / std(r)   GRPO, DeepSeekMath (arXiv 2402.03300), section 4.1.2
    A_i =  r_i - mean(r)             Dr. GRPO (arXiv 2503.20783), ``normalize_std=False``

    ``std`` is the sample standard deviation (divisor G - 1). The paper does not say which; the widely used trainers
    take this one, so that learning rates carry over. The population's would make advantages larger by
    sqrt(G / (G - 1)), 7 % at G = 8. Nothing is added to it: at or below ``std_floor`` the group's rewards are
    taken as equal and every advantage is exactly 0, as it is for a group of one.

    Raises:
        ValueError: rewards are not a vector, or not all finite.
    """
    rewards = _checked(rewards)
    if is_uniform(rewards, std_floor):
        return np.zeros_like(rewards)
    deviations = rewards - rewards.mean()
    return deviations / rewards.std(ddof=1) if normalize_std else deviations


def leave_one_out_advantages(rewards: NDArray[np.float64], *, std_floor: float = 1e-6) -> NDArray[np.float64]:
    """A_i = r_i - mean of the others' rewards: RLOO (arXiv 2402.14740). [G] -> [G], float64.

    It equals G / (G - 1) times Dr. GRPO's. Equal rewards, and a group of one, give exactly 0.

    Raises:
        ValueError: rewards are not a vector, or not all finite.
    """
    rewards = _checked(rewards)
    size = len(rewards)
    return group_advantages(rewards, std_floor=std_floor, normalize_std=False) * (size / max(1, size - 1))


def plain_rewards(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """A_i = r_i: REINFORCE++ (arXiv 2501.03262) has no baseline within the group, only the batch's. [G] -> [G].

    Raises:
        ValueError: rewards are not a vector, or not all finite.
    """
    return _checked(rewards)


def adora_weight(
    rewards: NDArray[np.float64],
    lengths: NDArray[np.int64],
    *,
    lamda: float,
    length_limit: int,
    threshold: float = 0.5,
) -> float:
    """Weight of a group's advantages: 1 where a right answer is the longest, or there is none; else ``lamda``.

    With L+ the largest length of the responses of reward above ``threshold``, and L- the mean length of the others
    that are shorter than ``length_limit`` (infinite if there are none): 1 if L+ > L- or no response is right.
    ADORA, as published for vision-language models (github.com/ShadeCloak/ADORA, ADORA_VL) and used by MM-EUREKA; both
    fix the limit at 4094.

    Args:
        rewards: [G], total rewards.
        lengths: [G], tokens of the responses.
    """
    right = rewards > threshold
    wrong = lengths[~right & (lengths < length_limit)]
    if not right.any():
        return 1.0
    return 1.0 if len(wrong) and lengths[right].max() > wrong.mean() else lamda


def reward_to_go(kl: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of kl [R] from each token to the last, [R]: undiscounted returns (REINFORCE++, arXiv 2501.03262)."""
    return np.cumsum(kl[::-1])[::-1]


def whiten(values: list[NDArray[np.float64]], *, std_floor: float = 1e-6) -> list[NDArray[np.float64]]:
    """(x - mean) / std over all tokens of all responses, [R_i] each: batch normalisation of REINFORCE++.

    arXiv 2501.03262. Sample standard deviation; at or below ``std_floor`` everything is exactly 0.
    """
    flat = np.concatenate(values) if values else np.zeros(0)
    if is_uniform(flat, std_floor):
        return [np.zeros_like(each) for each in values]
    mean, std = flat.mean(), flat.std(ddof=1)
    return [(each - mean) / std for each in values]


def _checked(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 1:
        raise ValueError(f"rewards of one group must be a vector [G], got shape {rewards.shape}")
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    return rewards
