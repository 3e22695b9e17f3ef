"""From groups to advantages per token: by hand, and what must not change them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from megatron_mmrl.algorithms.advantages import (
    adora_weight,
    group_advantages,
    leave_one_out_advantages,
    plain_rewards,
    reward_to_go,
    whiten,
)
from megatron_mmrl.algorithms.estimator import Estimator
from megatron_mmrl.algorithms.registry import ALGORITHMS, build_algorithm
from megatron_mmrl.config.algorithm import AdoraConfig, AlgorithmConfig
from megatron_mmrl.types import EncodedPrompt, Group, Prompt, Response, Score, TrainSequence

MEAN = partial(group_advantages, normalize_std=False)


def group(rewards: Sequence[float], lengths: Sequence[int], cut: Sequence[int] = ()) -> Group:
    """Responses ``cut`` did not end by themselves."""
    ids = np.array([1, 2])
    prompt = EncodedPrompt(
        prompt=Prompt(id="p", source="s", messages=(), images=(), answer="7"),
        ids=ids,
        engine_ids=ids,
        images=(),
        pixel_values=np.zeros((0, 1176), np.float32),
        image_grid_thw=np.zeros((0, 3), np.int64),
    )
    responses = tuple(
        Response(
            ids=np.arange(n),
            logprobs=np.zeros(n, np.float32),
            finish="length" if i in cut else "stop",
            policy_version=0,
            text="",
        )
        for i, n in enumerate(lengths)
    )
    return Group(prompt=prompt, responses=responses, scores=tuple(Score(total=r, terms={}) for r in rewards))


def sequences(groups: Sequence[Group], gap: float = 0.0) -> list[TrainSequence]:
    """Prompt of 2 tokens, then the response; log pi_old - log pi_ref is ``gap`` on every token."""
    result = []
    for response in (response for group in groups for response in group.responses):
        mask = np.arange(2 + len(response.ids)) >= 2
        result.append(
            TrainSequence(
                ids=np.zeros(len(mask), np.int64),
                loss_mask=mask,
                advantages=np.zeros(len(mask), np.float32),
                rollout_logprobs=np.zeros(len(mask), np.float32),
                pixel_values=np.zeros((0, 1176), np.float32),
                image_grid_thw=np.zeros((0, 3), np.int64),
                old_logprobs=np.full(len(mask), -1.0, np.float32),
                ref_logprobs=np.full(len(mask), -1.0 - gap, np.float32),
            )
        )
    return result


def values(learned: Sequence[TrainSequence]) -> list[list[float]]:
    assert not any(each.advantages[~each.loss_mask].any() for each in learned)
    return [each.advantages[each.loss_mask].tolist() for each in learned]


def test_leave_one_out_by_hand() -> None:
    # 1 - (0 + 0.5) / 2; 0 - (1 + 0.5) / 2; 0.5 - (1 + 0) / 2
    np.testing.assert_allclose(leave_one_out_advantages(np.array([1, 0, 0.5])), [0.75, -0.75, 0.0], atol=1e-15)
    assert leave_one_out_advantages(np.array([0.9] * 7)).tolist() == [0.0] * 7
    assert leave_one_out_advantages(np.array([1.0])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("rewards", "lengths", "weight"),
    [
        ([1, 0], [10, 6], 1.0),  # the right answer is longer
        ([1, 0], [6, 6], 0.1),  # not longer
        ([1, 1, 0], [3, 9, 8], 1.0),  # the longest right one counts
        ([1, 0, 0], [7, 4, 9], 1.0),  # against the mean of the wrong ones: 6.5
        ([0, 0.5], [10, 6], 1.0),  # 0.5 is not right: none is
        ([1, 1], [10, 6], 0.1),  # no wrong answer: L- is infinite
        ([1, 0], [10, 20], 0.1),  # at the limit a wrong answer does not count, and none is left
        ([1, 0, 0], [10, 20, 4], 1.0),
    ],
)
def test_adora_by_hand(rewards: list[float], lengths: list[int], weight: float) -> None:
    arguments = np.array(rewards, float), np.array(lengths)
    assert adora_weight(*arguments, lamda=0.1, length_limit=20) == weight
    flipped = arguments[0][::-1], arguments[1][::-1]
    assert adora_weight(*flipped, lamda=0.1, length_limit=20) == weight


def test_reward_to_go_and_whitening_by_hand() -> None:
    assert reward_to_go(np.array([1.0, 2.0, 4.0])).tolist() == [7, 6, 4]
    # 1, 2, 6: mean 3, deviations -2, -1, 3; sample variance 14 / 2
    first, second = whiten([np.array([1.0, 2.0]), np.array([6.0])])
    np.testing.assert_allclose([*first, *second], np.array([-2, -1, 3]) / np.sqrt(7))
    assert [each.tolist() for each in whiten([np.full(3, 0.9), np.full(4, 0.9)])] == [[0] * 3, [0] * 4]
    assert whiten([]) == []


def test_grpo_gives_every_token_its_responses_advantage() -> None:
    groups = [group([1, 0], [2, 3]), group([0, 0], [1, 1])]
    estimator = Estimator(baseline=MEAN)
    assert values(estimator(groups, sequences(groups))) == [[0.5] * 2, [-0.5] * 3, [0.0], [0.0]]


def test_kl_in_the_reward_of_a_response_by_hand() -> None:
    # k1 = 0.5 a token, coefficient 0.1: rewards 1 - 2 x 0.05 and 0.5 - 4 x 0.05; the mean is 0.6
    groups = [group([1, 0.5], [2, 4])]
    estimator = Estimator(baseline=MEAN, kl_coef=0.1, kl_estimator="k1")
    (first, second) = values(estimator(groups, sequences(groups, gap=0.5)))
    assert first == pytest.approx([0.3] * 2)
    assert second == pytest.approx([-0.3] * 4)
    # k3 of d = -0.5: exp(-0.5) - 1 + 0.5; k2: 0.125
    for name, kl in (("k3", np.exp(-0.5) - 0.5), ("k2", 0.125)):
        got = values(replace(estimator, kl_estimator=name)(groups, sequences(groups, gap=0.5)))
        assert got[0] == pytest.approx([(0.5 + 0.2 * kl) / 2] * 2)


def test_reinforce_pp_by_hand() -> None:
    # r - 0.1 x KL to go, k1 = 1 a token: 1 - 0.2, 1 - 0.1 | 0 - 0.1; mean 1.6 / 3
    groups = [group([1, 0], [2, 1])]
    plain = Estimator(baseline=plain_rewards, kl_coef=0.1, kl_per_token=True)
    assert values(plain(groups, sequences(groups, gap=1.0))) == [pytest.approx([0.8, 0.9]), pytest.approx([-0.1])]
    config = AlgorithmConfig(name="reinforce_pp", kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    got = values(build_algorithm(config).advantages(groups, sequences(groups, gap=1.0)))
    returns = np.array([0.8, 0.9, -0.1])
    expected = (returns - returns.mean()) / returns.std(ddof=1)
    np.testing.assert_allclose([*got[0], *got[1]], expected, rtol=1e-6)


def test_reinforce_pp_baseline_by_hand() -> None:
    # centred: 0.5 (2 tokens), -0.5 (1) | 0, 0; over 5 tokens the mean is 0.1
    groups = [group([1, 0], [2, 1]), group([1, 1], [1, 1])]
    got = values(build_algorithm(AlgorithmConfig(name="reinforce_pp_baseline")).advantages(groups, sequences(groups)))
    tokens = np.array([0.5, 0.5, -0.5, 0, 0])
    expected = (tokens - tokens.mean()) / tokens.std(ddof=1)
    np.testing.assert_allclose(np.concatenate(got), expected, rtol=1e-6)


def test_cut_off_responses_leave_the_loss_but_not_their_group() -> None:
    groups = [group([1, 0, 0], [2, 3, 4], cut=(2,))]
    learned = Estimator(baseline=MEAN, mask_overlong=True)(groups, sequences(groups))
    assert values(learned) == [pytest.approx([2 / 3] * 2), pytest.approx([-1 / 3] * 3)]
    # and whitening counts the tokens that are learned from only
    learned = Estimator(baseline=MEAN, mask_overlong=True, whitened=True)(groups, sequences(groups))
    tokens = np.concatenate(values(learned))
    assert tokens.mean() == pytest.approx(0, abs=1e-6)
    assert tokens.std(ddof=1) == pytest.approx(1, rel=1e-6)
    assert len(tokens) == 5


def test_adora_weighs_whole_groups() -> None:
    groups = [group([1, 0], [2, 3]), group([1, 0], [3, 2])]
    config = AlgorithmConfig(adora=AdoraConfig(enabled=True), normalize_std=False)
    got = values(build_algorithm(config, max_response_tokens=16).advantages(groups, sequences(groups)))
    assert got == [pytest.approx([0.05] * 2), pytest.approx([-0.05] * 3), [0.5] * 3, [-0.5] * 2]
    with pytest.raises(ValueError, match="length_limit"):
        build_algorithm(config)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_the_order_of_responses_and_groups_does_not_matter(name: str, kl_in: str) -> None:
    config = AlgorithmConfig(
        name=name, kl_coef=0.1, kl_in=kl_in, kl_estimator="k3", adora=AdoraConfig(enabled=True), mask_overlong=True
    )
    estimator = build_algorithm(config, max_response_tokens=9).advantages
    rewards, lengths = [1.0, 0.1, 0.9, 0.0], [4, 2, 7, 5]
    order = [2, 0, 3, 1]
    one = group(rewards, lengths, cut=(3,))
    two = group([0.3, 0.1], [3, 6])
    mixed = replace(one, responses=tuple(one.responses[i] for i in order), scores=tuple(one.scores[i] for i in order))
    expected = values(estimator([one, two], sequences([one, two], gap=0.2)))
    got = values(estimator([two, mixed], sequences([two, mixed], gap=0.2)))
    # two first; then responses 2, 0 and 1: 3 is cut off
    for found, index in zip(got, [3, 4, 2, 0, 1], strict=True):
        np.testing.assert_allclose(found, expected[index], rtol=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_padding_at_the_end_of_a_sequence_is_not_seen(name: str) -> None:
    estimator = build_algorithm(
        AlgorithmConfig(name=name, kl_coef=0.1, kl_in="reward"), max_response_tokens=9
    ).advantages
    groups = [group([1, 0, 0.5], [4, 2, 3])]
    given = sequences(groups, gap=0.3)

    def padded(sequence: TrainSequence) -> TrainSequence:
        more = {
            "ids": 0, "loss_mask": False, "advantages": 0, "rollout_logprobs": 0, "old_logprobs": np.nan,
            "ref_logprobs": np.nan,
        }  # fmt: skip
        return replace(
            sequence, **{key: np.append(getattr(sequence, key), [value] * 3).astype(getattr(sequence, key).dtype)
                         for key, value in more.items()}
        )  # fmt: skip

    assert values(estimator(groups, [padded(each) for each in given])) == values(estimator(groups, given))


def test_what_does_not_belong_together_is_refused() -> None:
    groups = [group([1, 0], [2, 2])]
    with pytest.raises(ValueError, match="2 responses, but there are 1"):
        Estimator(baseline=MEAN)(groups, sequences(groups)[:1])
    without = [replace(each, ref_logprobs=None) for each in sequences(groups)]
    with pytest.raises(ValueError, match="log pi_ref"):
        Estimator(baseline=MEAN, kl_coef=0.1)(groups, without)
    assert values(Estimator(baseline=MEAN)(groups, without)) == [[0.5] * 2, [-0.5] * 2]
