"""How much better a response is than the others of its group."""

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
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 1:
        raise ValueError(f"rewards of one group must be a vector [G], got shape {rewards.shape}")
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    if is_uniform(rewards, std_floor):
        return np.zeros_like(rewards)
    deviations = rewards - rewards.mean()
    return deviations / rewards.std(ddof=1) if normalize_std else deviations
