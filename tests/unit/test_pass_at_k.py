"""Pass@1[n] and pass@k: values by hand, no bias, standard errors, groups."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_mmrl.metrics.pass_at_k import (
    Tally,
    as_json,
    default_ks,
    estimate,
    pass_at_1,
    pass_at_k,
    report,
)


def tally(correct: int, samples: int = 4, **columns: tuple[str, ...]) -> Tally:
    return Tally(num_samples=samples, num_correct=correct, columns=columns)


def test_values_by_hand() -> None:
    assert pass_at_1(8, 3) == 0.375
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the right one
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9)  # 1 of 10 triples misses both
    assert pass_at_k(8, 0, 8) == 0.0
    assert pass_at_k(8, 6, 3) == 1.0  # two wrong ones cannot fill three places
    assert pass_at_k(1000, 1, 1000) == 1.0  # far beyond what floats hold as factorials


@pytest.mark.parametrize(("samples", "correct", "k"), [(6, c, k) for c in range(7) for k in (1, 2, 3, 5, 6)])
def test_it_is_the_share_of_subsets_with_a_right_answer(samples: int, correct: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_at_k(samples, correct, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


def test_it_has_no_bias_where_the_plug_in_estimate_has() -> None:
    """Its mean over draws of n = 6 is 1 - (1 - p)^k exactly; 1 - (1 - c/n)^k is too low."""
    p, n, k = 0.3, 6, 4
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(truth, abs=1e-12)
    assert sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights)) < truth - 0.01


@pytest.mark.parametrize("k", [0, 5])
def test_more_than_the_samples_cannot_be_asked(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} needs k between 1 and the 4 samples"):
        pass_at_k(4, 2, k)


def test_standard_error_is_that_of_the_mean_over_questions() -> None:
    values = [0.0, 0.25, 1.0, 1.0, 0.5]
    got = estimate(values)
    assert got.mean == pytest.approx(0.55)
    assert got.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert math.isnan(estimate([1.0]).error)


def test_standard_error_covers_the_truth() -> None:
    """Two of it on either side hold the true accuracy in about 95 of 100 repetitions, although a question's samples
    go together."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        ease = rng.beta(0.4, 0.6, size=100)  # true accuracy 0.4; questions differ widely
        rows = report([tally(int(rng.binomial(4, p))) for p in ease], ks=())
        got = rows[0].scores["pass@1[4]"]
        hits += abs(got.mean - 0.4) <= 2 * got.error
    assert 0.91 <= hits / 400 <= 0.98


def test_groups() -> None:
    rows = report(
        [
            tally(4, data_source=("b",), subject=("algebra", "proofs")),
            tally(0, data_source=("a",), subject=("algebra",)),
            tally(2, data_source=("b",)),
        ],
        ks=(1, 2),
        by=("data_source", "subject"),
    )
    assert [(row.column, row.value, row.num_prompts) for row in rows] == [
        ("all", "", 3),
        ("data_source", "a", 1),
        ("data_source", "b", 2),
        ("subject", "(none)", 1),
        ("subject", "algebra", 2),
        ("subject", "proofs", 1),
    ]
    assert list(rows[0].scores) == ["pass@1[4]", "pass@2"]
    assert rows[0].scores["pass@1[4]"].mean == 0.5
    assert rows[2].scores["pass@2"].mean == pytest.approx((1 + 5 / 6) / 2)
    assert as_json(rows)[1] == {
        "column": "data_source",
        "value": "a",
        "prompts": 1,
        "pass@1[4]": {"mean": 0.0, "error": None},
        "pass@2": {"mean": 0.0, "error": None},
    }


def test_one_sample_is_plain_accuracy() -> None:
    (row,) = report([tally(1, 1), tally(0, 1)], ks=(), by=())
    assert {name: each.mean for name, each in row.scores.items()} == {"accuracy": 0.5}
    assert default_ks(1) == ()
    assert default_ks(8) == (2, 4, 8)
    assert default_ks(9) == (2, 4, 8)
    assert default_ks(7) == (2, 4)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="5 correct of 4 samples"):
        tally(5)
    with pytest.raises(ValueError, match=r"\[4, 8\] samples each"):
        report([tally(1), tally(1, 8)], ks=())
    with pytest.raises(ValueError, match="needs k between 1 and the 4 samples"):
        report([tally(1)], ks=(8,))
