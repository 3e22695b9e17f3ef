"""The fleet on several ranks (threads here): every rank gets every response, and every failure."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from megatron_mmrl.rollout.engine import EngineDiedError, EngineError, PromptMismatchError
from megatron_mmrl.rollout.fleet import EngineFleet
from megatron_mmrl.types import EncodedPrompt, Prompt, Response, SamplingParams


class ThreadExchange:
    """all_gather between the threads of one test."""

    def __init__(self, rank, values, barrier):
        self.rank, self.world_size = rank, len(values)
        self._values, self._barrier = values, barrier

    def all_gather(self, value):
        self._values[self.rank] = value
        self._barrier.wait(10)
        gathered = list(self._values)
        self._barrier.wait(10)
        return gathered


class Engine:
    """Answers with the prompt's number; notes what it was given."""

    def __init__(self, fail_with=None):
        self.fail_with, self.got, self.closed = fail_with, [], False

    def generate(self, prompts, sampling, *, seed, step, finished=None):
        if self.fail_with:
            raise self.fail_with
        self.got.append([prompt.prompt.id for prompt in prompts])
        return [
            tuple(
                Response(
                    ids=np.array([int(prompt.prompt.id), i]),
                    logprobs=np.zeros(2, dtype=np.float32),
                    finish="stop",
                    policy_version=step,
                    text="",
                )
                for i in range(sampling.num_samples)
            )
            for prompt in prompts
        ]

    def update_weights(self, buckets, version):
        for number, bucket in enumerate(buckets):
            if self.fail_with and number == 1:
                raise self.fail_with
            self.got.append([name for name, _ in bucket])

    def pause(self):
        if self.fail_with:
            raise self.fail_with

    def close(self):
        self.closed = True


def prompt(number):
    return EncodedPrompt(
        prompt=Prompt(id=str(number), source="", messages=(), images=(), answer=""),
        ids=np.zeros(1, dtype=np.int64),
        engine_ids=np.zeros(1, dtype=np.int64),
        images=(),
        pixel_values=np.zeros((0, 4), dtype=np.float32),
        image_grid_thw=np.zeros((0, 3), dtype=np.int64),
    )


def on_ranks(engines, work, *, spares=None, max_restarts=0):
    """``work(fleet)`` on a rank per entry of ``engines``; the results or exceptions, by rank.

    ``spares``: by rank, the engines that are started when one has died.
    """
    values, barrier = [None] * len(engines), threading.Barrier(len(engines))
    num_engines = sum(engine is not None for engine in engines)

    def run(rank):
        exchange = ThreadExchange(rank, values, barrier)
        queue = [engines[rank], *(spares or {}).get(rank, ())]
        start = (lambda: queue.pop(0)) if engines[rank] else None
        fleet = EngineFleet(start, exchange, num_engines=num_engines, bucket_bytes=8, max_restarts=max_restarts)
        try:
            return work(fleet)
        except EngineError as error:
            return error

    with ThreadPoolExecutor(len(engines)) as pool:
        return list(pool.map(run, range(len(engines))))


def test_every_rank_gets_every_group_in_order():
    engines = [Engine(), None, Engine(), None]
    prompts = [prompt(i) for i in range(5)]
    results = on_ranks(engines, lambda fleet: fleet.generate(prompts, SamplingParams(num_samples=3), seed=0, step=8))
    assert [engines[0].got, engines[2].got] == [[["0", "1", "2"]], [["3", "4"]]]
    for groups in results:
        assert [group.prompt.prompt.id for group in groups] == ["0", "1", "2", "3", "4"]
        tokens = [[response.ids.tolist() for response in group.responses] for group in groups]
        assert tokens == [[[i, 0], [i, 1], [i, 2]] for i in range(5)]


def test_a_failure_of_one_engine_is_raised_on_every_rank():
    engines = [Engine(), None, Engine(PromptMismatchError("prompt 3: other ids")), None]
    results = on_ranks(
        engines, lambda fleet: fleet.generate([prompt(i) for i in range(5)], SamplingParams(), seed=0, step=0)
    )
    assert [type(result) for result in results] == [PromptMismatchError] * 4
    assert {str(result) for result in results} == {"engine of rank 2: prompt 3: other ids"}


@pytest.mark.parametrize("error", [None, EngineError("refused")])
def test_every_rank_takes_its_part_in_making_the_weights(error):
    engines = [Engine(), None, Engine(error), None]
    made = [0] * 4

    def update(fleet):
        def tensors():
            for name in "abcde":
                made[fleet._exchange.rank] += 1
                yield name, torch.zeros(2)

        fleet.update_weights(tensors, 1)

    results = on_ranks(engines, update)
    assert made == [5] * 4
    assert engines[0].got == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert [str(result) for result in results] == ["None" if error is None else "engine of rank 2: refused"] * 4


def test_a_dead_engine_is_known_everywhere():
    results = on_ranks([Engine(EngineDiedError("ended")), None], lambda fleet: fleet.pause())
    assert [(type(result), str(result)) for result in results] == [(EngineDiedError, "engine of rank 0: ended")] * 2


def test_a_dead_engine_is_replaced_given_weights_and_answers_its_own_prompts():
    engines, fresh = [Engine(), None, Engine(EngineDiedError("ended")), None], Engine()
    restored = []

    def work(fleet):
        fleet.restore = lambda: restored.append(fleet._engine)
        groups = fleet.generate([prompt(i) for i in range(5)], SamplingParams(), seed=0, step=8)
        return [group.prompt.prompt.id for group in groups], fleet.restarts

    results = on_ranks(engines, work, spares={2: [fresh]}, max_restarts=1)
    assert results == [(["0", "1", "2", "3", "4"], 1)] * 4
    assert engines[2].closed
    assert fresh.got == [["3", "4"]]
    assert engines[0].got == [["0", "1", "2"]]  # asked once
    assert len(restored) == 4
    assert fresh in restored
    assert engines[2] not in restored


def test_too_many_deaths_end_the_run_everywhere():
    dying = [Engine(EngineDiedError(f"ended {i}")) for i in range(3)]
    results = on_ranks([dying[0], None], lambda fleet: fleet.pause(), spares={0: dying[1:]}, max_restarts=2)
    assert [str(result) for result in results] == ["engine of rank 0: ended 2"] * 2
    assert [engine.closed for engine in dying] == [True, True, False]  # the last one is closed with the fleet


def test_another_failure_beside_a_death_starts_nothing():
    engines = [Engine(EngineDiedError("ended")), Engine(EngineError("refused"))]
    results = on_ranks(engines, lambda fleet: fleet.pause(), spares={0: [Engine()]}, max_restarts=5)
    assert [str(result) for result in results] == ["engine of rank 1: refused"] * 2
    assert not engines[0].closed


def test_an_engine_on_the_wrong_rank_is_refused():
    exchange = ThreadExchange(1, [None, None], threading.Barrier(2))
    with pytest.raises(ValueError, match=r"rank 1: engines are led by ranks \(0,\)"):
        EngineFleet(Engine, exchange, num_engines=1, bucket_bytes=8)


def test_close_ends_the_engine_of_this_rank_only():
    engine = Engine()
    on_ranks([engine, None], lambda fleet: fleet.close())
    assert engine.closed
