"""A real SGLang server (TP 1) against Hugging Face, token by token, and against those who should not reach it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.rollout.engine import EngineError, PromptMismatchError
from megatron_mmrl.rollout.http import Call, EngineHttp
from megatron_mmrl.trainer.logprobs import token_logprobs
from megatron_mmrl.trainer.repetition import repetition_of
from megatron_mmrl.types import SamplingParams
from tests.parity.engine_case import TOLERANCE, make_case, start, update

PROBE = Path(__file__).parent / "engine_probe"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("tp1"))


@pytest.fixture(scope="module")
def decode_log(tmp_path_factory):
    path = tmp_path_factory.mktemp("decoded") / "log"
    path.touch()
    return path


@pytest.fixture(scope="module")
def engine(case, decode_log, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PROBE))
        patch.setenv("IMAGE_DECODE_LOG", str(decode_log))
        engine = start(case, tmp_path_factory.mktemp("log") / "engine.log", RolloutConfig(request_timeout_s=60))
    try:
        update(engine, case.weights(), 0)
        yield engine
    finally:
        engine.close()


def processes(engine):
    launcher = psutil.Process(engine._server.pid)
    return [launcher, *launcher.children(recursive=True)]


@pytest.mark.parametrize(("version", "temperature"), [(1, 1.0), (2, 0.8), (3, 1.4)])
def test_logprobs_are_those_of_the_masked_and_tempered_distribution(case, engine, version, temperature):
    # The same prompts each time: features or prefixes kept from other weights would show.
    prompts, weights = case.prompts(9), case.weights(seed=version)
    update(engine, weights, version)
    sampling = SamplingParams(temperature=temperature, num_samples=3, max_new_tokens=10)
    groups = engine.generate(prompts, sampling, seed=0, step=version)
    assert case.largest_difference(weights, prompts, groups, temperature=temperature) <= TOLERANCE
    # Without the mask, with another temperature, with other weights the same check fails.
    assert case.largest_difference(weights, prompts, groups, temperature=temperature, mask=False) > TOLERANCE
    assert case.largest_difference(weights, prompts, groups, temperature=temperature * 1.01) > TOLERANCE
    assert case.largest_difference(case.weights(), prompts, groups, temperature=temperature) > TOLERANCE
    assert {response.policy_version for group in groups for response in group} == {version}
    assert all(len({tuple(response.ids) for response in group}) == 3 for group in groups)


def test_greedy_takes_the_best_allowed_token(case, engine):
    prompts, weights = case.prompts(6), case.weights()
    update(engine, weights, 4)
    groups = engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=8), seed=0, step=4)
    for prompt, (response,) in zip(prompts, groups, strict=True):
        logits = case.logits(weights, prompt, response)
        logits[:, case.banned] = float("-inf")
        assert logits.argmax(1).tolist() == response.ids.tolist()
    assert case.largest_difference(weights, prompts, groups, temperature=1.0) <= TOLERANCE


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_logprobs_under_a_repetition_penalty_are_the_trainers(case, engine, penalty):
    """The trainer's own function, on Hugging Face's logits as hidden states below an output layer that is 1."""
    prompts, weights = case.prompts(6), case.weights(seed=7)
    update(engine, weights, 7)
    sampling = SamplingParams(temperature=0.8, repetition_penalty=penalty, num_samples=3, max_new_tokens=40)
    groups = engine.generate(prompts, sampling, seed=0, step=7)
    answers = [(p, r, case.logits(weights, p, r)) for p, group in zip(prompts, groups, strict=True) for r in group]

    def difference(penalty: float) -> float:
        largest = 0.0
        for prompt, response, logits in answers:
            ids, length = np.concatenate([prompt.ids, response.ids]), len(response.ids)
            mask, bounds = np.arange(len(ids)) >= len(prompt.ids), np.array([0, len(ids)], np.int32)
            repetition = repetition_of(
                ids, mask, bounds, np.arange(length), penalty=penalty, device=torch.device("cpu")
            )
            ours, _ = token_logprobs(
                logits, torch.eye(logits.shape[1]), torch.tensor(response.ids), vocab_start=0, temperature=0.8,
                banned=torch.tensor(case.banned), vocab_size=logits.shape[1], group=None, chunk_tokens=16,
                repetition=repetition,
            )  # fmt: skip
            largest = max(largest, (ours - torch.tensor(response.logprobs)).abs().max().item())
        return largest

    assert any(len(set(response.ids.tolist())) < len(response.ids) for _, response, _ in answers)
    assert difference(penalty) <= TOLERANCE
    assert difference(1.0) > 100 * TOLERANCE
    assert difference(1.01 * penalty) > 10 * TOLERANCE


def test_banned_tokens_are_not_sampled_even_when_nothing_else_is_likely(case, engine):
    prompts, weights = case.prompts(3), case.weights()
    weights["lm_head.weight"][case.banned] *= 100
    update(engine, weights, 5)
    for temperature in (1.0, 0.0):
        sampling = SamplingParams(temperature=temperature, num_samples=4 if temperature else 1, max_new_tokens=12)
        groups = engine.generate(prompts, sampling, seed=0, step=5)
        favourites = [
            case.logits(weights, prompt, response).argmax(1).tolist()
            for prompt, group in zip(prompts, groups, strict=True)
            for response in group
        ]
        assert all(token in case.banned for tokens in favourites for token in tokens)
        assert not any(token in case.banned for group in groups for response in group for token in response.ids)
        assert case.largest_difference(weights, prompts, groups, temperature=temperature or 1.0) <= TOLERANCE


def test_a_response_ends_at_the_end_token(case, engine):
    weights = case.weights()
    weights["lm_head.weight"][case.processor.end_token_id] = 100 * weights["lm_head.weight"].abs().amax(0)
    update(engine, weights, 6)
    groups = engine.generate(case.prompts(3), SamplingParams(num_samples=8, max_new_tokens=12), seed=0, step=6)
    ended = [response for group in groups for response in group if response.finish == "stop"]
    assert ended
    for group in groups:
        for response in group:
            ends = (response.ids == case.processor.end_token_id).nonzero()[0]
            assert ends.tolist() == ([len(response.ids) - 1] if response.finish == "stop" else [])
            assert response.finish == "stop" or len(response.ids) == 12


def test_other_prompt_ids_than_the_engine_reads_are_refused_by_name(case, engine):
    update(engine, case.weights(), 7)
    good = case.prompt(70)
    padded = dataclasses.replace(good, ids=np.insert(good.ids, 9, good.ids[9]))
    with pytest.raises(PromptMismatchError, match="prompt case:70: the engine read"):
        engine.generate([case.prompt(71), padded], SamplingParams(max_new_tokens=2), seed=0, step=7)
    changed = dataclasses.replace(good, engine_ids=np.insert(good.engine_ids, 1, 3))
    with pytest.raises(PromptMismatchError, match="prompt case:70"):
        engine.generate([changed], SamplingParams(max_new_tokens=2), seed=0, step=7)


def test_a_prompt_whose_pads_and_images_disagree_is_an_error_and_not_the_end(case, engine):
    update(engine, case.weights(), 8)
    prompt = case.prompt(72)
    for wrong in (
        dataclasses.replace(prompt, engine_ids=prompt.ids),  # pads expanded already
        dataclasses.replace(prompt, images=()),
        dataclasses.replace(prompt, images=(prompt.images[0][:200],)),  # cut off
    ):
        with pytest.raises(EngineError, match="prompt case:72"):
            engine.generate([wrong], SamplingParams(max_new_tokens=2), seed=0, step=8)
    assert engine.generate([prompt], SamplingParams(max_new_tokens=2), seed=0, step=8)


def test_images_are_decoded_once_per_prompt(case, engine, decode_log):
    update(engine, case.weights(), 9)
    before = len(decode_log.read_text().splitlines())
    prompts = [case.prompt(800, 1), case.prompt(801, 2), case.prompt(802, 0)]
    engine.generate(prompts, SamplingParams(num_samples=8, max_new_tokens=4), seed=0, step=9)
    assert len(decode_log.read_text().splitlines()) - before == 3


def test_without_the_right_key_nothing_opens(engine):
    server = engine._server
    keys = server.endpoint
    user_only = dataclasses.replace(keys, admin_key=keys.api_key)
    none = dataclasses.replace(keys, api_key="wrong", admin_key="wrong")
    for endpoint, path in (
        (none, "/generate"),
        (none, "/model_info"),
        (none, "/update_weights_from_tensor"),
        (user_only, "/flush_cache"),
    ):
        http = EngineHttp(_Other(server, endpoint), timeout_s=10)
        try:
            body = None if path == "/model_info" else {"text": "x"}
            with pytest.raises(EngineError, match=f"{path} answered 40[13]"):
                http.call(Call(what="knocking", path=path, body=body, admin=path in ("/flush_cache",)))
        finally:
            http.close()


class _Other:
    """The same server, asked with other keys."""

    def __init__(self, server, endpoint):
        self.check_alive, self.endpoint = server.check_alive, endpoint


def test_the_keys_are_in_no_argument_no_log_and_no_file(engine):
    server = engine._server
    secrets = (server.endpoint.api_key, server.endpoint.admin_key)
    places = [" ".join(process.cmdline()) for process in processes(engine)]
    places += [" ".join(process.environ().values()) for process in processes(engine)]
    places += [server._log_path.read_text(errors="replace")]
    places += [path.read_text(errors="replace") for path in server._scratch_dir.rglob("*") if path.is_file()]
    assert len(places) > 6
    assert not [place for place in places for secret in secrets if secret in place]


def test_only_loopback_is_listened_on(engine):
    listening = {
        connection.laddr.ip
        for process in processes(engine)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_an_idle_engine_takes_no_core(engine):
    def cpu_seconds():
        return sum(sum(process.cpu_times()[:2]) for process in processes(engine))

    time.sleep(1)  # the last test's work is over
    before = cpu_seconds()
    time.sleep(3)
    assert (cpu_seconds() - before) / 3 < 0.2  # an engine that polls takes 1


def test_weights_that_do_not_fit_end_the_engine_with_its_log(case, engine):
    with pytest.raises(EngineError, match=r"(?s)updating to version 10.*the end of .*engine.log"):
        engine.update_weights([[("lm_head.weight", torch.zeros(3, 5))]], 10)
    with pytest.raises(EngineError, match="the engine ended with status"):
        engine.check_alive()
