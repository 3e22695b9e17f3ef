"""Numbers of one step, from its groups and its updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_mmrl.types import Group, UpdateStats

LAST = ("lr",)  # reported as of the last update; everything else as the mean over the step's updates
MAXIMA = ("mismatch/max_abs",)


class MismatchError(RuntimeError):
    """Trainer and engine disagree about log-probs by more than the configured limit."""


def term_means(groups: Sequence[Group]) -> dict[str, float]:
    """Mean raw value of each reward term over all responses, and of what else users' rewards want logged."""
    scores = [score for group in groups for score in group.scores or ()]
    means = {name: float(np.mean([score.terms[name] for score in scores])) for name in scores[0].terms}
    for name in sorted({name for score in scores for name in score.extras}):  # of those responses that have it
        means[name] = float(np.mean([score.extras[name] for score in scores if name in score.extras]))
    return means


def rollout_stats(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, lengths and finish reasons of a scored rollout."""
    responses = [response for group in groups for response in group.responses]
    lengths = np.array([len(response.ids) for response in responses])
    rewards = np.stack([group.rewards for group in groups])
    row = {f"reward/{name}": value for name, value in term_means(groups).items()}
    row["reward/mean"] = float(rewards.mean())
    row["reward/std"] = float(rewards.std(axis=1).mean())
    row["reward/uniform_groups"] = float(np.mean(rewards.min(axis=1) == rewards.max(axis=1)))
    row["response_tokens/mean"] = float(lengths.mean())
    row["response_tokens/max"] = float(lengths.max())
    row["response_tokens/cut"] = float(np.mean([response.finish == "length" for response in responses]))
    row["tokens"] = float(sum(len(g.prompt.ids) * len(g.responses) for g in groups) + lengths.sum())
    return row


def update_stats(updates: Sequence[UpdateStats]) -> dict[str, float]:
    """Loss, gradient norm and token metrics over the updates of one step; zeros when there was none."""
    if not updates:
        return {"loss": 0.0, "grad_norm": 0.0, "updates": 0.0}
    rows = [{"loss": u.loss, "grad_norm": u.grad_norm, "lr": u.lr, **u.metrics} for u in updates]
    stats = {name: _combine(name, [row[name] for row in rows]) for name in rows[0]}
    return stats | {"updates": float(len(updates))}


def check_mismatch(stats: Mapping[str, float], limit: float | None, step: int) -> None:
    """Raise MismatchError when mean |log pi_trainer - log pi_engine| exceeds ``limit``."""
    mean = stats.get("mismatch/mean_abs", 0.0)
    if limit is not None and mean > limit:
        raise MismatchError(
            f"step {step}: trainer and engine log-probs differ by {mean:.3g} on average, above "
            f"algorithm.max_mismatch={limit:.3g}; the engine does not compute what the trainer does"
        )


def _combine(name: str, values: Sequence[float]) -> float:
    if name in LAST:
        return values[-1]
    return max(values) if name in MAXIMA else float(np.mean(values))
