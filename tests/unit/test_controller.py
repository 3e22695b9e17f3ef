"""The loop's own parts: numbers of a step, scores over ranks, and the reasons to stop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from megatron_mmrl.controller.handover import ByName, Handover
from megatron_mmrl.controller.scoring import Scorer
from megatron_mmrl.controller.stats import MismatchError, check_mismatch, rollout_stats, term_means, update_stats
from megatron_mmrl.types import EncodedPrompt, Group, Message, Prompt, Response, Score, UpdateStats


def group(name: str, rewards: Sequence[float], lengths: Sequence[int]) -> Group:
    prompt = Prompt(id=name, source="t", messages=(Message(role="user", text="?"),), images=(), answer="1")
    encoded = EncodedPrompt(
        prompt=prompt,
        ids=np.arange(4),
        engine_ids=np.arange(4),
        images=(),
        pixel_values=np.zeros((0, 1176), np.float32),
        image_grid_thw=np.zeros((0, 3), np.int64),
    )
    responses = tuple(
        Response(
            ids=np.arange(length),
            logprobs=np.zeros(length, np.float32),
            finish="length" if length == 6 else "stop",
            policy_version=0,
            text=f"{name}{index}",
        )
        for index, length in enumerate(lengths)
    )
    scores = tuple(Score(total=reward, terms={"accuracy": float(reward > 0.5)}) for reward in rewards)
    return Group(prompt=encoded, responses=responses, scores=scores)


def test_rollout_stats_by_hand() -> None:
    groups = [group("a", (1.0, 0.0), (2, 6)), group("b", (0.4, 0.4), (3, 5))]
    stats = rollout_stats(groups)
    assert stats["reward/mean"] == pytest.approx(0.45)
    assert stats["reward/accuracy"] == 0.25
    assert stats["reward/std"] == pytest.approx(0.25)  # (0.5 + 0) / 2
    assert stats["reward/uniform_groups"] == 0.5
    assert stats["response_tokens/mean"] == 4.0
    assert stats["response_tokens/max"] == 6.0
    assert stats["response_tokens/cut"] == 0.25
    assert stats["tokens"] == 4 * 4 + 16
    assert term_means(groups) == {"accuracy": 0.25}


def test_update_stats_combine_several_updates() -> None:
    updates = [
        UpdateStats(loss=1.0, grad_norm=2.0, lr=0.1, metrics={"entropy": 0.5, "mismatch/max_abs": 3.0}),
        UpdateStats(loss=3.0, grad_norm=4.0, lr=0.2, metrics={"entropy": 1.5, "mismatch/max_abs": 1.0}),
    ]
    assert update_stats(updates) == {
        "loss": 2.0,
        "grad_norm": 3.0,
        "lr": 0.2,
        "entropy": 1.0,
        "mismatch/max_abs": 3.0,
        "updates": 2.0,
    }
    assert update_stats([])["updates"] == 0.0


def test_mismatch_beyond_the_limit_stops_the_run() -> None:
    check_mismatch({"mismatch/mean_abs": 0.5}, None, step=3)
    check_mismatch({"mismatch/mean_abs": 0.5}, 0.5, step=3)
    with pytest.raises(MismatchError, match=r"step 3: .* 0\.6 .* algorithm\.max_mismatch=0\.5"):
        check_mismatch({"mismatch/mean_abs": 0.6}, 0.5, step=3)


class NamingPool:
    """Scores a response by its text, so that a score in the wrong place shows."""

    def __init__(self, rank: int) -> None:
        self.seen: list[str] = []
        self._rank = rank

    def score(self, groups: Sequence[Group]) -> list[Group]:
        self.seen += [each.prompt.prompt.id for each in groups]
        return [
            each.with_scores(tuple(Score(total=0.0, terms={response.text: 1.0}) for response in each.responses))
            for each in groups
        ]

    def has(self, group: Group) -> bool:
        return False

    def counters(self) -> dict[str, float]:
        return {"reward/timeouts": float(self._rank + 1)}


class Recording:
    """The exchange of rank ``rank`` of two: plays back what the other rank said, one thing after the other."""

    world_size = 2

    def __init__(self, rank: int, *other: object) -> None:
        self.rank, self._other = rank, list(other)

    def all_gather(self, value):
        other = self._other.pop(0)
        return [value, other] if self.rank == 0 else [other, value]


def test_scores_come_back_in_order_whoever_made_them() -> None:
    groups = [group(name, (0.0, 0.0), (1, 1)) for name in "abc"]
    theirs = [each.scores for each in NamingPool(1).score(groups[1::2])]
    pool = NamingPool(0)
    scored = Scorer(pool, Recording(0, [False] * 3, theirs)).score(groups)
    assert pool.seen == ["a", "c"]  # rank 1 has b
    assert [[next(iter(score.terms)) for score in each.scores or ()] for each in scored] == [
        ["a0", "a1"],
        ["b0", "b1"],
        ["c0", "c1"],
    ]
    assert Scorer(pool, Recording(0, {"reward/timeouts": 2.0})).counters() == {"reward/timeouts": 3.0}


class Noting:
    """Stands for policy, fleet and weights; notes the calls made on it."""

    restarts = 0

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: self.calls.append(name) or 5


def test_the_device_changes_hands_in_order_also_when_generation_fails() -> None:
    parts = Noting()
    handover = Handover(parts, parts, parts)
    handover.publish(1)
    with handover.generating():
        parts.calls.append("generate")
    expected = [
        "publish",
        *("offload", "resume_kv_cache", "resume", "generate"),
        *("pause", "release_kv_cache", "onload"),  # weights may change only once the engine computes nothing
    ]
    assert parts.calls == expected
    parts.counters = dict
    row = handover.counters()
    assert (row["handover/offload_bytes"], row["handover/onload_bytes"]) == (5, 5)
    assert row.keys() >= {"time/offload_s", "time/onload_s", "time/kv_cache_s"}
    assert "handover/offload_bytes" not in handover.counters()  # told once
    parts.calls.clear()
    with pytest.raises(RuntimeError, match="engine"), handover.generating():
        raise RuntimeError("engine")
    assert parts.calls[-3:] == ["pause", "release_kv_cache", "onload"]


def test_weights_by_name_are_sent_again_to_engines_that_were_started_again() -> None:
    sent: list[int] = []
    fleet = Noting()
    fleet.update_weights = lambda _, version: sent.append(version)
    weights = ByName(Noting(), fleet)
    weights.restore()
    assert sent == []  # nothing was published yet
    weights.publish(3)
    weights.restore()
    assert sent == [3, 3]
    assert fleet.calls == ["pause", "pause"]
