"""Accuracy over several samples of each question: Pass@1[n], pass@k, and how far chance alone moves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

NO_VALUE = "(none)"
"""Group of the questions that lack a column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How one question went: ``num_correct`` of ``num_samples`` answers are right."""

    num_samples: int
    num_correct: int
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column -> the groups that the question is in there (one, but for a column that lists several)."""

    def __post_init__(self) -> None:
        if not 0 <= self.num_correct <= self.num_samples or self.num_samples < 1:
            raise ValueError(f"{self.num_correct} correct of {self.num_samples} samples: impossible")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over questions and its standard error, both as fractions of 1."""

    mean: float
    error: float
    """Standard error over questions (their samples are not independent of each other); nan of a single question."""


def pass_at_1(num_samples: int, num_correct: int) -> float:
    """Pass@1[n]: the share of a question's n samples that are right."""
    return num_correct / num_samples


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of k samples is right, without bias: 1 - C(n - c, k) / C(n, k).

    Equation 1 of Chen et al. 2021 (arXiv:2107.03374), with n samples drawn of which c are right.

    Raises:
        ValueError: k exceeds n: there is no unbiased estimate from fewer samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs k between 1 and the {num_samples} samples of each question")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of one value per question, and its standard error s / sqrt(N) with s over N - 1."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean=mean, error=math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean=mean, error=math.sqrt(variance / count))


def score_names(num_samples: int, ks: Sequence[int]) -> dict[str, Callable[[Tally], float]]:
    """Name -> value of one question: ``accuracy`` of a single sample, else ``pass@1[n]`` and the wanted ``pass@k``.

    Raises:
        ValueError: a k that ``num_samples`` cannot estimate.
    """
    for k in ks:
        pass_at_k(num_samples, 0, k)
    first = "accuracy" if num_samples == 1 else f"pass@1[{num_samples}]"
    names: dict[str, Callable[[Tally], float]] = {first: lambda tally: pass_at_1(tally.num_samples, tally.num_correct)}
    for k in sorted({k for k in ks if k > 1}):
        names[f"pass@{k}"] = _pass_at(k)
    return names


def default_ks(num_samples: int) -> tuple[int, ...]:
    """Powers of two up to the number of samples: 2, 4, 8, ..."""
    return tuple(2**power for power in range(1, num_samples.bit_length()) if 2**power <= num_samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Scores of the questions that share one value of one column; ``column`` is ``all`` of the whole set."""

    column: str
    value: str
    num_prompts: int
    scores: Mapping[str, Estimate]


def report(tallies: Sequence[Tally], ks: Sequence[int], by: Sequence[str] = ()) -> list[Row]:
    """One row for the whole set, then one for each value of each column of ``by``, values in alphabetical order.

    A question without a column counts under ``(none)`` there, one with several values under each of them. All questions
    must have equally many samples.

    Raises:
        ValueError: no questions, or different numbers of samples.
    """
    sizes = {tally.num_samples for tally in tallies}
    if len(sizes) != 1:
        raise ValueError(f"questions have {sorted(sizes)} samples each; one and the same number is needed")
    names = score_names(sizes.pop(), ks)
    rows = [_row("all", "", tallies, names)]
    for column in by:
        groups: dict[str, list[Tally]] = {}
        for tally in tallies:
            for value in tally.columns.get(column) or (NO_VALUE,):
                groups.setdefault(value, []).append(tally)
        rows += [_row(column, value, group, names) for value, group in sorted(groups.items())]
    return rows


def as_json(rows: Iterable[Row]) -> list[dict[str, object]]:
    """Rows as plain values: scores with ``mean`` and ``error``, None for an error that one question cannot have."""
    return [
        {
            "column": row.column,
            "value": row.value,
            "prompts": row.num_prompts,
            **{name: {"mean": each.mean, "error": _or_none(each.error)} for name, each in row.scores.items()},
        }
        for row in rows
    ]


def _row(column: str, value: str, tallies: Sequence[Tally], names: Mapping[str, Callable[[Tally], float]]) -> Row:
    scores = {name: estimate([score(tally) for tally in tallies]) for name, score in names.items()}
    return Row(column=column, value=value, num_prompts=len(tallies), scores=scores)


def _pass_at(k: int) -> Callable[[Tally], float]:
    return lambda tally: pass_at_k(tally.num_samples, tally.num_correct, k)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
