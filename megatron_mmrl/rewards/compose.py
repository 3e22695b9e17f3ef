"""Several reward terms become one score."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_mmrl.types import Score


def compose(
    terms: Mapping[str, float], weights: Mapping[str, float], extras: Mapping[str, float] | None = None
) -> Score:
    """Score with total = sum over k of weights[k] x terms[k]; weights are taken as they are, not normalised.

    ``extras`` are logged and count for nothing.

    Raises:
        ValueError: the two do not name the same terms.
    """
    if terms.keys() != weights.keys():
        raise ValueError(f"reward terms {sorted(terms)} do not match the weights for {sorted(weights)}")
    total = math.fsum(weights[name] * value for name, value in terms.items())
    return Score(total=total, terms=dict(terms), extras=dict(extras or {}))


def zero_score(weights: Mapping[str, float], error: str) -> Score:
    """The score of a response that could not be scored: every term 0, and why."""
    return Score(total=0.0, terms=dict.fromkeys(weights, 0.0), error=error)
