"""The client against servers that lie, refuse, hang or die; a real engine answers in tests/parity."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.rollout.engine import EngineDiedError, EngineError, PromptMismatchError
from megatron_mmrl.rollout.server_args import CHECKSUM_LOADER, Endpoint
from megatron_mmrl.rollout.sglang_client import SGLangEngine
from megatron_mmrl.types import EncodedPrompt, Message, Prompt, SamplingParams

BANNED = (90, 91)
SAMPLE = {
    "output_ids": [5, 6, 2],
    "prompt_token_ids": [1, 9, 9, 9, 9, 3],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 2},
        "weight_version": "4",
        "num_retractions": 0,
        "output_token_logprobs": [[-0.5, 5, None], [-1.25, 6, None], [-0.125, 2, None]],
    },
}


class Scripted:
    """An HTTP server that answers /generate as told and keeps what it was asked."""

    def __init__(self):
        self.asked: list[tuple[str, dict, str]] = []
        self.sample, self.status, self.version, self.refuse = copy.deepcopy(SAMPLE), 200, "4", None
        self.dead = False
        self.stopped = threading.Event()
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._answer({"weight_version": script.version})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                script.asked.append((self.path, body, self.headers["Authorization"]))
                if self.path == "/generate":
                    count = body["sampling_params"]["n"]
                    self._answer([script.sample] * count if count > 1 else script.sample, script.status)
                else:
                    refused = self.path == script.refuse
                    self._answer({"success": not refused, "message": "no such tensor" if refused else "done"})

            def _answer(self, content, status=200):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = Endpoint(port=self._http.server_port, api_key="user", admin_key="root")
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def wait_until_ready(self):
        pass

    def check_alive(self):
        if self.dead:
            raise EngineDiedError("the engine ended with status -9")

    def stop(self):
        if not self.stopped.is_set():
            self.stopped.set()
            self._http.shutdown()
            self._http.server_close()

    def paths(self):
        return [path for path, _, _ in self.asked]


def encoded(name="train.parquet:7", images=(b"\x89PNG",)):
    ids = np.array(SAMPLE["prompt_token_ids"], dtype=np.int64)
    return EncodedPrompt(
        prompt=Prompt(
            id=name, source="s", messages=(Message(role="user", text="<image>?"),), images=images, answer="7"
        ),
        ids=ids,
        engine_ids=np.array([1, 9, 3], dtype=np.int64),
        images=images,
        pixel_values=np.zeros((16, 4), dtype=np.float32),
        image_grid_thw=np.array([[1, 4, 4]], dtype=np.int64),
    )


def connect(server, **config):
    config = {"request_timeout_s": 5.0} | config
    return SGLangEngine(
        server,
        RolloutConfig(**config),
        banned_token_ids=BANNED,
        decode=lambda ids: " ".join(map(str, ids)),
        shares_device=False,
    )


@pytest.fixture
def server():
    scripted = Scripted()
    yield scripted
    scripted.stop()


@pytest.fixture
def engine(server):
    client = connect(server)
    client.update_weights([[("w", torch.ones(2))]], 4)
    server.asked.clear()
    yield client
    client.close()


def generate(engine, prompts=None, **sampling):
    sampling = {"temperature": 0.7, "num_samples": 2, "max_new_tokens": 9} | sampling
    return engine.generate(prompts or [encoded()], SamplingParams(**sampling), seed=1, step=2)


def test_what_is_sent_and_what_comes_back(server, engine):
    ((first, second),) = generate(engine)
    assert first.ids.tolist() == [5, 6, 2]
    assert first.ids.dtype == np.int64
    assert first.logprobs.tolist() == [-0.5, -1.25, -0.125]
    assert first.logprobs.dtype == np.float32
    assert (first.finish, first.policy_version, first.text) == ("stop", 4, "5 6 2")
    assert second.ids.tolist() == [5, 6, 2]
    ((path, body, key),) = server.asked  # one request for all samples of a prompt
    assert (path, key) == ("/generate", "Bearer user")
    assert body["input_ids"] == [1, 9, 3]  # one pad per image
    assert body["image_data"] == [[base64.b64encode(b"\x89PNG").decode()]]
    assert body["sampling_params"] == {
        "n": 2,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "repetition_penalty": 1.0,
        "max_new_tokens": 9,
    }


def test_one_sample_of_a_text_prompt(server, engine):
    ((only,),) = generate(engine, [encoded(images=())], num_samples=1, temperature=0.0)
    assert only.finish == "stop"
    assert "image_data" not in server.asked[0][1]


def test_seeds_are_sent_by_a_deterministic_engine_only(server):
    client = connect(server, deterministic=True)
    client.update_weights([], 4)
    server.asked.clear()
    prompts = [encoded("a:1"), encoded("a:2")]
    for step in (2, 2, 3):
        client.generate(prompts, SamplingParams(), seed=1, step=step)
    client.close()
    seeds = [body["sampling_params"]["sampling_seed"] for _, body, _ in server.asked]
    assert set(seeds[:2]) == set(seeds[2:4])
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("settings", [{"deterministic": True}, {"repetition_penalty": 1.1}])
def test_an_exact_engine_may_not_compute_a_token_twice(server, settings):
    client = connect(server, **settings)
    client.update_weights([], 4)
    generate(client)
    server.sample["meta_info"]["num_retractions"] = 1
    with pytest.raises(EngineError, match=r"train.parquet:7: the KV cache was too small.*rollout.max_total_tokens"):
        generate(client)
    client.close()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prompt_token_ids", [1, 9, 9, 9, 3], r"train.parquet:7: the engine read 5 prompt tokens, ours has 6.*index 4"),
        ("prompt_token_ids", [1, 9, 9, 9, 9, 4], r"index 5 on: \[4\] instead of \[3\]"),
        ("output_ids", [5, 6, 90], r"train.parquet:7: the engine sampled the banned tokens \[90\]"),
        ("output_ids", [5, 6], r"train.parquet:7: sampled \[5, 6\] but got log-probs for \[5, 6, 2\]"),
    ],
)
def test_an_answer_about_something_else_is_refused(server, engine, key, value, message):
    server.sample[key] = value
    error = PromptMismatchError if key == "prompt_token_ids" else EngineError
    with pytest.raises(error, match=message):
        generate(engine)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight_version", "3", "weights of version '3' instead of 4"),
        ("finish_reason", {"type": "abort", "message": "out of memory"}, "gave up.*out of memory"),
        ("output_token_logprobs", [[-0.5, 5, None], [float("nan"), 6, None], [0.0, 2, None]], "not all finite"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused(server, engine, key, value, message):
    server.sample["meta_info"][key] = value
    with pytest.raises(EngineError, match=f"train.parquet:7.*{message}"):
        generate(engine)


def test_a_missing_field_is_named(server, engine):
    del server.sample["prompt_token_ids"]
    with pytest.raises(EngineError, match="no 'prompt_token_ids', only"):
        generate(engine)


def test_an_error_status_names_the_prompt(server, engine):
    server.status = 401
    with pytest.raises(EngineError, match=r"train.parquet:7: /generate answered 401"):
        generate(engine)


def test_weights_travel_whole_and_in_order(server, engine):
    base = torch.arange(10.0)
    engine.update_weights([[("a", base[2:4]), ("b", torch.eye(2))], [("c", torch.ones(1, dtype=torch.bfloat16))]], 4)
    update = "/update_weights_from_tensor"
    assert server.paths() == [
        "/pause_generation",
        update,
        update,
        "/flush_cache",
        "/update_weight_version",
        "/continue_generation",
    ]
    assert {key for _, _, key in server.asked} == {"Bearer root"}
    payloads = [
        base64.b64decode(body["serialized_named_tensors"][0]) for path, body, _ in server.asked if path == update
    ]
    first, second = (pickle.loads(payload) for payload in payloads)
    assert [name for name, _ in first] == ["a", "b"]
    assert torch.equal(first[0][1], torch.tensor([2.0, 3.0]))
    assert first[0][1].untyped_storage().nbytes() == 8  # not the ten numbers it was cut from
    assert torch.equal(second[0][1], torch.ones(1, dtype=torch.bfloat16))


def test_a_paused_engine_is_not_asked_to_generate_and_pauses_once(server, engine):
    engine.pause()
    engine.pause()
    with pytest.raises(EngineError, match="the engine is paused"):
        generate(engine)
    engine.resume()
    engine.resume()
    assert server.paths() == ["/pause_generation", "/continue_generation"]
    generate(engine)


def test_ranks_are_told_different_things_and_the_version_comes_after_a_flush(server):
    client = connect(server, tensor_parallel_size=2)
    client.pause()
    client.tell_ranks("checksums", ["for rank 0", "for rank 1"])
    client.set_version(4)
    client.close()
    paths = ["/pause_generation", "/update_weights_from_tensor", "/flush_cache", "/update_weight_version"]
    assert server.paths() == [*paths, "/continue_generation"]
    body = server.asked[1][1]
    assert body["load_format"] == CHECKSUM_LOADER
    contents = [pickle.loads(base64.b64decode(payload)) for payload in body["serialized_named_tensors"]]
    assert [bytes(tensor.tolist()).decode() for ((_, tensor),) in contents] == ["for rank 0", "for rank 1"]


def test_every_tensor_parallel_rank_gets_a_payload(server):
    client = connect(server, tensor_parallel_size=3)
    client.update_weights([[("a", torch.zeros(1))]], 4)
    client.close()
    (body,) = (body for path, body, _ in server.asked if path == "/update_weights_from_tensor")
    assert len(body["serialized_named_tensors"]) == 3


def test_a_refused_bucket_leaves_an_engine_that_does_not_generate(server, engine):
    server.refuse = "/update_weights_from_tensor"
    with pytest.raises(EngineError, match="updating to version 5: the engine refused: no such tensor"):
        engine.update_weights([[("a", torch.zeros(1))]], 5)
    with pytest.raises(EngineError, match="no weights yet"):
        generate(engine)


def test_a_version_that_did_not_take_is_found(server, engine):
    server.version = "4"
    with pytest.raises(EngineError, match="reports version '4' afterwards"):
        engine.update_weights([], 5)


def test_no_generation_before_the_first_weights(server):
    client = connect(server)
    with pytest.raises(EngineError, match="no weights yet"):
        generate(client)
    client.close()


def test_the_kv_cache_stays_where_nothing_shares_the_device(server, engine):
    engine.release_kv_cache()
    engine.resume_kv_cache()
    assert server.asked == []


class Silent:
    """Accepts connections and never says a word."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint(port=self._socket.getsockname()[1], api_key="user", admin_key="root")
        self.dead = False

    wait_until_ready = Scripted.wait_until_ready
    check_alive = Scripted.check_alive

    def stop(self):
        self._socket.close()


def test_an_engine_that_never_answers_is_named_within_the_limit():
    client = connect(Silent(), request_timeout_s=0.3)
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"pausing: no answer from .*request_timeout_s=0.3"):
        client.update_weights([], 1)
    assert time.monotonic() - start < 5
    client.close()


def test_a_dead_engine_ends_the_waiting():
    silent = Silent()
    client = connect(silent, request_timeout_s=60)
    threading.Timer(0.2, lambda: setattr(silent, "dead", True)).start()
    start = time.monotonic()
    with pytest.raises(EngineDiedError, match="pausing: the engine ended with status -9"):
        client.update_weights([], 1)
    assert time.monotonic() - start < 10
    client.close()


def test_close_stops_the_server_and_may_be_repeated(server):
    client = connect(server)
    client.close()
    client.close()
    assert server.stopped.is_set()
