"""What stands for -(expected reward) of one token: the ways in which PPO's descendants hold a step back.

With rho = pi / pi_old of the drawn token and A its advantage. Each function returns the loss of every token [T], to be
minimised, and where the bounds took its gradient away or changed its weight (bool [T]).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_mmrl.algorithms.aggregate import sequence_mean_of

if TYPE_CHECKING:
    from torch import Tensor


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A); where A < 0 at most -dual_clip A.

    PPO, arXiv 1707.06347, equation 7; two bounds: DAPO, arXiv 2503.14476, equation 8; dual clip: arXiv 1912.09729.
    ``log_ratio`` = log pi - log pi_old. The clip acts on tokens that already moved further than allowed in
    the direction of their advantage: rho > 1 + clip_high with A > 0, rho < 1 - clip_low with A < 0. The dual clip acts
    where A < 0 and rho > dual_clip: one token that became much likelier cannot outweigh all others.
    """
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss, active = -unclipped.minimum(clipped), clipped.detach() < unclipped.detach()
    if dual_clip is None:
        return loss, active
    ceiling = (-dual_clip * advantages).where(advantages < 0, float("inf"))
    return loss.minimum(ceiling), active | (loss.detach() > ceiling)


def detached_surrogate(
    logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi: CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5.

    The ratio is a weight without gradient, and bounded; no token loses its gradient, however far it has moved. The
    paper has no lower bound: ``clip_low=1``.
    """
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages * logprobs, weight != ratio


def sequence_log_ratio(log_ratio: Tensor, sequence: Tensor, tokens_in_sequence: Tensor) -> Tensor:
    """log of GSPO's s_{i,t} = sg(s_i) pi / sg(pi), with s_i = exp(mean_t log rho_t) of the response: [T].

    GSPO, arXiv 2507.18071, equations 7 and 14. All tokens of a response have the same value, its geometric mean ratio,
    and each passes its gradient to its own log-prob; under the mean over its tokens that is the gradient of s_i.
    ``sequence`` i64[T] and ``tokens_in_sequence`` [T]: see ``aggregate.sequence_mean_of``.
    """
    mean = sequence_mean_of(log_ratio.detach(), sequence, tokens_in_sequence)
    return mean + (log_ratio - log_ratio.detach())
