"""Estimators of KL(pi || pi_ref) from single sampled tokens.

J. Schulman, "Approximating KL divergence" (2020). With tokens drawn from pi and d = log pi_ref - log pi:

- k1 = -d              unbiased, high variance, negative half of the time. As a term of the loss it pulls nowhere:
                       the expected gradient of log pi(x), x drawn from pi, is zero. Good as a metric and in rewards.
- k2 = d^2 / 2         biased, never negative; its gradient is that of the true KL.
- k3 = exp(d) - 1 - d  unbiased, never negative; the KL term of GRPO (DeepSeekMath, arXiv 2402.03300, equation 4).
- k3_unbiased          the value of k3 with the gradient of k2: both are unbiased, the gradient for tokens of pi itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """log_ratio [T] = log pi_ref - log pi of the drawn tokens, nats -> [T]."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """log_ratio [T] = log pi_ref - log pi of the drawn tokens, nats -> [T], >= 0."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """log_ratio [T] = log pi_ref - log pi of the drawn tokens, nats -> [T], >= 0.

    ``expm1`` keeps the digits that exp(d) - 1 would lose near d = 0.
    """
    return log_ratio.expm1() - log_ratio


def k3_unbiased(log_ratio: Tensor) -> Tensor:
    """log_ratio [T] = log pi_ref - log pi of the drawn tokens, nats -> [T]: k3, whose gradient passes through k2.

    E[d k2] = E[(log pi - log pi_ref) d log pi] = d KL, while E[d k3] is the gradient of KL(pi_ref || pi).
    """
    surrogate = k2(log_ratio)
    return k3(log_ratio).detach() + (surrogate - surrogate.detach())


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "k3_unbiased": k3_unbiased}

# The same on numbers without gradient, for a KL that is taken off the reward.
KL_VALUES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "k1": lambda log_ratio: -log_ratio,
    "k2": lambda log_ratio: log_ratio**2 / 2,
    "k3": lambda log_ratio: np.expm1(log_ratio) - log_ratio,
}
