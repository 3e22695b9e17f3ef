"""A deterministic engine at TP 2 and 4: equal requests give equal bits, whatever comes with them and in any order."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.rollout.engine import EngineError
from megatron_mmrl.types import SamplingParams
from tests.parity.engine_case import TOLERANCE, make_case, start, update

SAMPLING = SamplingParams(temperature=0.9, num_samples=4, max_new_tokens=12)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("tp2"))


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)])
def engine(request, case, tmp_path_factory):
    config = RolloutConfig(tensor_parallel_size=request.param, deterministic=True, request_timeout_s=120)
    engine = start(case, tmp_path_factory.mktemp("log") / "engine.log", config)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def first(case, engine):
    """The responses to 12 prompts sent together, by prompt."""
    return by_prompt(case, engine, case.prompts(12))


def by_prompt(case, engine, prompts, *, seed=7, step=3, sampling=SAMPLING, flush=True):
    if flush:
        update(engine, case.weights(), 1)
    groups = engine.generate(prompts, sampling, seed=seed, step=step)
    return {prompt.prompt.id: group for prompt, group in zip(prompts, groups, strict=True)}


def assert_same_bits(expected, found):
    for name, group in expected.items():
        for one, other in zip(group, found[name], strict=True):
            assert one.ids.tolist() == other.ids.tolist(), name
            assert one.logprobs.tolist() == other.logprobs.tolist(), name


def test_equals_hugging_face(case, first):
    prompts = case.prompts(12)
    groups = [first[prompt.prompt.id] for prompt in prompts]
    assert case.largest_difference(case.weights(), prompts, groups, temperature=0.9) <= TOLERANCE


def test_any_order(case, engine, first):
    shuffled = [case.prompts(12)[i] for i in np.random.default_rng(0).permutation(12)]
    assert_same_bits(first, by_prompt(case, engine, shuffled))


def test_one_at_a_time_and_from_a_warm_cache(case, engine, first):
    alone = {}
    for prompt in case.prompts(12):
        alone |= by_prompt(case, engine, [prompt], flush=False)
    assert_same_bits(first, alone)


def test_among_strangers(case, engine, first):
    assert_same_bits(first, by_prompt(case, engine, case.prompts(20, first=100) + case.prompts(12)))


def test_fewer_samples_are_the_first_of_more(case, engine, first):
    sampling = SamplingParams(temperature=0.9, num_samples=1, max_new_tokens=12)
    fewer = by_prompt(case, engine, case.prompts(12), sampling=sampling)
    assert_same_bits({name: group[:1] for name, group in first.items()}, fewer)


@pytest.mark.parametrize(("seed", "step"), [(8, 3), (7, 4)])
def test_another_seed_or_step_draws_anew(case, engine, first, seed, step):
    other = by_prompt(case, engine, case.prompts(12), seed=seed, step=step)
    same = [
        one.ids.tolist() == two.ids.tolist()
        for name in first
        for one, two in zip(first[name], other[name], strict=True)
    ]
    assert not any(same)


def test_the_copies_of_a_prompt_differ(first):
    assert all(len({tuple(response.ids) for response in group}) == SAMPLING.num_samples for group in first.values())


def test_an_engine_that_dies_while_it_generates_is_known_at_once(case, engine):
    sampling = SamplingParams(num_samples=8, max_new_tokens=2000)
    update(engine, case.weights(), 1)
    threading.Timer(0.5, engine._server._kill_group).start()
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"(?s)prompt case:.*ended with status -9; the end of .*engine.log"):
        by_prompt(case, engine, case.prompts(12), sampling=sampling, flush=False)
    assert time.monotonic() - begin < 20  # of the 120 s that a request may take
    with pytest.raises(EngineError, match="ended with status"):
        engine.check_alive()
