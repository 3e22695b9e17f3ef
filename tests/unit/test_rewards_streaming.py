"""Scoring while other completions are still being generated: the same scores, whatever finishes first or fails."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_mmrl.config.reward import RewardConfig, RewardTerm
from megatron_mmrl.controller.scoring import Scorer
from megatron_mmrl.rewards.pool import RewardPool
from megatron_mmrl.rollout.engine import EngineDiedError, EngineError
from megatron_mmrl.rollout.fleet import EngineFleet
from megatron_mmrl.types import Group, Response, SamplingParams
from tests.unit.test_rewards_pool import group
from tests.unit.test_rollout_client import connect, encoded, generate, server
from tests.unit.test_rollout_fleet import ThreadExchange

__all__ = ["server"]  # a fixture

REWARD = """
import time

def counted(prompt, text, *, path):
    with open(path, "a") as file:
        file.write(f"{prompt.id} {text}\\\\n")
    return float(len(text))

def slow(prompt, text, *, seconds):
    time.sleep(seconds)
    return float(len(text))
"""


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(REWARD.replace("\\\\n", "\\n"))
    return tmp_path / "rewards.py"


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(RewardConfig(num_workers=2)) as made:
        yield made


def groups_of(texts: str) -> list[Group]:
    return [group([f"<answer>{n}</answer>", f"{n} {texts}"], name=f"p{n}", answer=str(n % 3)) for n in range(12)]


def test_scores_are_those_of_the_sequential_path_in_any_order_of_completion(pool: RewardPool) -> None:
    with RewardPool(RewardConfig()) as sequential:
        truth = [each.scores for each in sequential.score(groups_of("a"))]
    groups = groups_of("a")
    for seed in range(3):
        order = random.Random(seed).sample(groups, len(groups))
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(pool.submit, order))
        assert all(pool.has(each) for each in groups)
        assert [each.scores for each in pool.score(groups)] == truth


def test_submitting_does_not_wait_and_nothing_is_scored_twice(reward: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    terms = [RewardTerm(name=f"{reward}:counted", kwargs={"path": str(log)})]
    with RewardPool(RewardConfig(terms=terms, num_workers=2)) as made:
        first = group(["a", "b", "a"], name="p")
        assert not made.has(first)
        for _ in range(3):
            made.submit(first)
        assert made.has(first)
        assert not made.has(group(["a", "c"], name="p"))
        (scored,) = made.score([first])
        made.submit(first)
        assert made.score([first]) == [scored]
        made.submit(group(["never collected"], name="q"))
        made.score([group(["d"], name="p")])
    lines = sorted(log.read_text().split("\n")[:-1])
    assert lines[:3] == ["p a", "p b", "p d"]
    assert lines[3:] in ([], ["q never collected"])


def test_what_was_submitted_is_done_when_it_is_asked_for(reward: Path) -> None:
    terms = [RewardTerm(name=f"{reward}:slow", kwargs={"seconds": 0.3})]
    with RewardPool(RewardConfig(terms=terms)) as made:
        for name in ("p", "q"):
            made.submit(group(["x"], name=name))
        deadline = time.monotonic() + 60
        while not all(future.done() for future in made._asked.values()):
            assert time.monotonic() < deadline
            time.sleep(0.05)  # the engine is at work; nobody looks after the pool but its own thread
        scored = made.score([group(["x"], name="p"), group(["x"], name="q")])
    assert [score.total for each in scored for score in each.scores or ()] == [1.0, 1.0]


def test_a_late_response_is_counted_and_killed_without_being_asked_for(reward: Path) -> None:
    terms = [RewardTerm(name=f"{reward}:slow", kwargs={"seconds": 1e6})]
    with RewardPool(RewardConfig(terms=terms, timeout_s=0.5)) as made:
        before = made.worker_pids
        made.submit(group(["x"], name="p"))
        deadline = time.monotonic() + 60
        while made.worker_pids == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (scored,) = made.score([group(["x"], name="p")])
        assert "longer than the limit" in ((scored.scores or ())[0].error or "")
        assert made.counters() == {"reward/timeouts": 1.0, "reward/errors": 0.0}


def test_closing_ends_who_waits(reward: Path) -> None:
    terms = [RewardTerm(name=f"{reward}:slow", kwargs={"seconds": 1e6})]
    made = RewardPool(RewardConfig(terms=terms, timeout_s=600))
    made.submit(group(["x"]))
    threading.Timer(0.3, made.close).start()
    with pytest.raises(RuntimeError, match="closed"):
        made.score([group(["x"])])


class Engine:
    """Finishes its prompts backwards, and dies after ``dies_after`` of them."""

    def __init__(self, dies_after: int | None = None, salt: str = "") -> None:
        self.dies_after, self.salt = dies_after, salt

    def generate(self, prompts, sampling, *, seed, step, finished=None):
        answers = {}
        for done, prompt in enumerate(reversed(prompts)):
            if done == self.dies_after:
                raise EngineDiedError("ended")
            answers[prompt.prompt.id] = tuple(
                Response(
                    ids=np.arange(3),
                    logprobs=np.zeros(3, np.float32),
                    finish="stop",
                    policy_version=step,
                    text=f"{prompt.prompt.id} {self.salt}{sample}",
                )
                for sample in range(sampling.num_samples)
            )
            if finished is not None:
                finished(Group(prompt=prompt, responses=answers[prompt.prompt.id]))
        return [answers[prompt.prompt.id] for prompt in prompts]

    def close(self) -> None:
        pass


def rank_by_rank(engines: list[list[Engine]], reward: Path, log: Path) -> list[list[Group] | EngineError]:
    """Generate five prompts on the ranks' engines (empty: it leads none) and score them, as every rank sees it."""
    values, barrier = [None] * len(engines), threading.Barrier(len(engines))
    terms = [RewardTerm(name=f"{reward}:counted", kwargs={"path": str(log)})]
    leaders = sum(bool(queue) for queue in engines)
    prompts = [group([], name=f"p{n}").prompt for n in range(5)]

    def run(rank: int) -> list[Group] | EngineError:
        exchange = ThreadExchange(rank, values, barrier)
        start = (lambda: engines[rank].pop(0)) if engines[rank] else None
        fleet = EngineFleet(start, exchange, num_engines=leaders, bucket_bytes=8, max_restarts=1)
        with RewardPool(RewardConfig(terms=terms)) as pool:
            scorer = Scorer(pool, exchange)
            groups = fleet.generate(prompts, SamplingParams(num_samples=2), seed=0, step=1, finished=scorer.submit)
            return scorer.score(groups)

    with ThreadPoolExecutor(len(engines)) as threads:
        return list(threads.map(run, range(len(engines))))


@pytest.mark.parametrize(
    ("engines", "texts"),
    [
        ([[Engine()], []], ["", "", "", "", ""]),
        ([[Engine()], [], [Engine()], []], ["", "", "", "", ""]),
        ([[Engine()], [Engine(dies_after=1), Engine(salt="again ")]], ["", "", "", "again ", "again "]),
    ],
)
def test_every_rank_gets_every_score_once(
    engines: list[list[Engine]], texts: list[str], reward: Path, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    results = rank_by_rank(engines, reward, log)
    expected = [[f"p{n} {salt}{sample}" for sample in range(2)] for n, salt in enumerate(texts)]
    for groups in results:
        assert [[response.text for response in each.responses] for each in groups] == expected
        scores = [[score.total for score in each.scores or ()] for each in groups]
        assert scores == [[float(len(text)) for text in row] for row in expected]
    calls = log.read_text().split("\n")[:-1]
    assert len(calls) == len(set(calls))
    wanted = {f"p{n} {text}" for n, row in enumerate(expected) for text in row}
    assert wanted <= set(calls)
    assert len(set(calls) - wanted) == (2 if "again " in texts else 0)  # what the dead engine had finished


class TwoRanks:
    """The exchange of rank 0 of two; the other one has nothing and scores what it is dealt."""

    rank, world_size = 0, 2

    def __init__(self, theirs: list) -> None:
        self.theirs = theirs

    def all_gather(self, value):
        return [value, self.theirs.pop(0)]


def test_what_nobody_began_is_dealt_out(pool: RewardPool) -> None:
    groups = groups_of("dealt")[:4]
    pool.submit(groups[1])
    other = [each.scores for each in pool.score(groups)]
    pool.submit(groups[1])
    scored = Scorer(pool, TwoRanks([[False, False, False, True], [other[3]]])).score(groups)
    assert [each.scores for each in scored] == other


def test_an_engine_tells_of_each_prompt_as_its_answer_comes(server) -> None:
    client = connect(server)
    client.update_weights([], 4)
    told: list[Group] = []
    prompts = [encoded(f"a:{n}") for n in range(4)]
    answers = client.generate(prompts, SamplingParams(num_samples=2), seed=1, step=2, finished=told.append)
    assert sorted(each.prompt.prompt.id for each in told) == ["a:0", "a:1", "a:2", "a:3"]
    by_id = {each.prompt.prompt.id: each.responses for each in told}
    assert [by_id[prompt.prompt.id] for prompt in prompts] == answers
    server.sample["output_ids"] = [5, 6, 90]
    told.clear()
    with pytest.raises(EngineError, match="banned"):
        generate(client)
    assert told == []
    client.close()
