"""Group-normalised advantages against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_mmrl.algorithms.advantages import group_advantages
from megatron_mmrl.algorithms.filters import is_uniform


def test_one_right_of_four() -> None:
    # mean 1/4; squared deviations 9/16 + 3 x 1/16 = 3/4; / (4 - 1) = 1/4; std 1/2; 0.75 / 0.5 and -0.25 / 0.5
    np.testing.assert_array_equal(group_advantages(np.array([1.0, 0, 0, 0])), [1.5, -0.5, -0.5, -0.5])


def test_two_responses() -> None:
    # mean 0.5; squared deviations 0.25 + 0.25 = 0.5; / 1; std sqrt(0.5); 0.5 / sqrt(0.5) = sqrt(0.5)
    np.testing.assert_allclose(group_advantages(np.array([1.0, 0.0])), [math.sqrt(0.5), -math.sqrt(0.5)], rtol=1e-15)


def test_without_std_only_the_mean_is_taken_off() -> None:
    np.testing.assert_array_equal(
        group_advantages(np.array([1.0, 0, 0, 0]), normalize_std=False), [0.75, -0.25, -0.25, -0.25]
    )


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("std_floor", [1e-6, 0.0])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.9, 0.1, 1 / 3, 0.9 * 1 + 0.1 * 0.7])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8, 11])
def test_equal_rewards_give_exactly_zero(size: int, value: float, std_floor: float, normalize_std: bool) -> None:
    advantages = group_advantages(np.full(size, value), std_floor=std_floor, normalize_std=normalize_std)
    assert advantages.tolist() == [0.0] * size


def test_the_case_is_real() -> None:
    """Without the test for equality some of these would not be zero: the mean of seven 0.9 is not 0.9."""
    rewards = np.full(7, 0.9)
    assert (rewards - rewards.mean()).any()


def test_rewards_equal_but_for_rounding_give_exactly_zero() -> None:
    assert group_advantages(np.array([0.3, 0.1 + 0.2, 0.3])).tolist() == [0.0, 0.0, 0.0]


def test_group_of_one_is_zero_in_float64() -> None:
    advantages = group_advantages(np.array([1.0], dtype=np.float32))
    assert advantages.tolist() == [0.0]
    assert advantages.dtype == np.float64


def test_invariant_to_shift_scale_and_order() -> None:
    rewards = np.array([0.1, 0.9, 1.0, 0.0, 0.9])
    order = np.array([3, 0, 4, 1, 2])
    advantages = group_advantages(rewards)
    np.testing.assert_allclose(group_advantages(5 * rewards - 2), advantages, atol=1e-12)
    np.testing.assert_allclose(group_advantages(rewards[order]), advantages[order], atol=1e-12)
    assert abs(advantages.sum()) < 1e-12
    assert advantages.std(ddof=1) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [[1.0, math.nan], [math.inf, 0.0]])
def test_rewards_that_are_not_finite_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        group_advantages(np.array(bad))


def test_rewards_of_several_groups_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 2\]|\(2, 2\)"):
        group_advantages(np.eye(2))


def test_a_spread_at_the_floor_counts_as_equal() -> None:
    rewards = np.array([0.0, 1.0])  # std sqrt(0.5) = 0.7071
    assert is_uniform(rewards, 0.71)
    assert not is_uniform(rewards, 0.70)
