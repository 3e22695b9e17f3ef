"""Index convention of training sequences, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_mmrl.trainer.sequences import sequences_of, supervised_sequences
from megatron_mmrl.types import EncodedPrompt, Group, Message, Prompt, Response

PIXELS = np.arange(8, dtype=np.float32).reshape(4, 2)
GRID = np.array([[1, 2, 2]])


def encoded(ids: list[int], name: str = "a:0") -> EncodedPrompt:
    prompt = Prompt(id=name, source="s", messages=(Message(role="user", text="q"),), images=(), answer="1")
    return EncodedPrompt(
        prompt=prompt,
        ids=np.array(ids, dtype=np.int64),
        engine_ids=np.array(ids),
        images=(),
        pixel_values=PIXELS,
        image_grid_thw=GRID,
    )


def response(ids: list[int], logprobs: list[float]) -> Response:
    return Response(
        ids=np.array(ids, dtype=np.int64),
        logprobs=np.array(logprobs, dtype=np.float32),
        finish="stop",
        policy_version=0,
        text="",
    )


def test_entry_t_describes_the_prediction_of_token_t():
    group = Group(
        prompt=encoded([5, 6, 7]),
        responses=(response([8, 9], [-0.5, -0.25]), response([10], [-1.0])),
    )
    first, second = sequences_of([group])

    assert first.ids.tolist() == [5, 6, 7, 8, 9]
    assert first.loss_mask.tolist() == [False, False, False, True, True]
    assert first.advantages.tolist() == [0, 0, 0, 0, 0]  # the estimator's to give
    assert first.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -0.25]
    assert (first.old_logprobs, first.ref_logprobs) == (None, None)
    assert first.pixel_values is PIXELS  # one copy per prompt, however many responses
    assert second.pixel_values is PIXELS
    assert second.ids.tolist() == [5, 6, 7, 10]
    assert [array.dtype for array in (first.ids, first.loss_mask, first.advantages, first.rollout_logprobs)] == [
        np.int64,
        np.bool_,
        np.float32,
        np.float32,
    ]


def test_groups_and_their_responses_keep_their_order():
    groups = [
        Group(
            prompt=encoded([first], f"a:{first}"),
            responses=tuple(response([first, n], [0, 0]) for n in range(3)),
        )
        for first in (1, 2)
    ]
    assert [sequence.ids.tolist() for sequence in sequences_of(groups)] == [
        [1, 1, 0],
        [1, 1, 1],
        [1, 1, 2],
        [2, 2, 0],
        [2, 2, 1],
        [2, 2, 2],
    ]


def test_an_empty_response_has_nothing_to_learn():
    (sequence,) = sequences_of([Group(prompt=encoded([1, 2]), responses=(response([], []),))])
    assert sequence.ids.tolist() == [1, 2]
    assert not sequence.loss_mask.any()
    assert sequence.advantages.tolist() == [0, 0]


def test_supervised_targets_are_learned_with_advantage_one():
    (sequence,) = supervised_sequences([encoded([1, 2])], [np.array([3, 4])])
    assert sequence.ids.tolist() == [1, 2, 3, 4]
    assert sequence.loss_mask.tolist() == [False, False, True, True]
    assert sequence.advantages.tolist() == [0, 0, 1, 1]
    assert sequence.rollout_logprobs.tolist() == [0, 0, 0, 0]


def test_what_does_not_fit_together_is_refused_by_name():
    group = Group(prompt=encoded([1], "b:7"), responses=(response([2], [0.0]),))
    with pytest.raises(ValueError, match="b:7 has 2 ids but 1 log-probs"):
        sequences_of([replace(group, responses=(response([2, 3], [0.0]),))])
    with pytest.raises(ValueError, match="b:7 has no tokens"):
        sequences_of([replace(group, prompt=encoded([], "b:7"))])
    with pytest.raises(ValueError, match="1 prompts but 0 targets"):
        supervised_sequences([encoded([1])], [])
