"""Engine and trainer never agree to the last bit: how far apart they are, and how to correct for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def truncated_importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_rollout, cap) per token [T], without gradient: a factor of the policy term only.

    ``old_logprobs`` are the trainer's, ``rollout_logprobs`` the engine's, both [T], nats, of the same tokens under
    what should be the same weights. The ratio corrects for what differs; the cap bounds the variance (truncated
    importance sampling, Ionides 2008).
    """
    return (old_logprobs - rollout_logprobs).exp().clamp(max=cap).detach()
