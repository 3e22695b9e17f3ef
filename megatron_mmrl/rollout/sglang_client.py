"""A rollout engine behind HTTP: prompts in, tokens with log-probs out, weights in. Checks what it is told."""

from __future__ import annotations

import base64
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.rollout.engine import EngineError, LoaderName, PromptMismatchError
from megatron_mmrl.rollout.http import Call, EngineHttp, EngineServer, Json
from megatron_mmrl.rollout.seeding import prompt_seed
from megatron_mmrl.rollout.server_args import ATTACH_LOADER, CHECKSUM_LOADER, EngineModel
from megatron_mmrl.rollout.sglang_server import start_server
from megatron_mmrl.types import EncodedPrompt, Finish, Group, Response, SamplingParams

if TYPE_CHECKING:
    import torch

Decode = Callable[[NDArray[np.int64]], str]
ScoredToken = tuple[float, int, None]  # log-prob, token id, text (not asked for)
_LOADERS: Mapping[LoaderName, str] = {"attach": ATTACH_LOADER, "checksums": CHECKSUM_LOADER}
_FINISHES: Mapping[str, Finish] = {"stop": "stop", "length": "length"}


class SGLangEngine:
    """Implements ``RolloutEngine`` for one SGLang server.

    Args:
        server: the server; ``close`` stops it.
        config: sizes and time limits; ``deterministic`` must be what the server was started with.
        banned_token_ids: what the server was told to ban; an answer that holds one is refused.
        decode: token ids to text without special tokens.
        shares_device: the KV cache has to be released when the trainer works.
    """

    def __init__(
        self,
        server: EngineServer,
        config: RolloutConfig,
        *,
        banned_token_ids: Sequence[int],
        decode: Decode,
        shares_device: bool,
    ) -> None:
        self._server, self._config, self._decode = server, config, decode
        self._banned = frozenset(banned_token_ids)
        self._shares_device, self._kv_cache_released = shares_device, False
        self._version: int | None = None
        self._paused = False
        self._http = EngineHttp(server, config.request_timeout_s)

    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: SamplingParams,
        *,
        seed: int,
        step: int,
        finished: Callable[[Group], None] | None = None,
    ) -> list[tuple[Response, ...]]:
        """See ``RolloutEngine``. One request per prompt, all at once, so that its images are processed once.

        Raises:
            PromptMismatchError: the engine read other prompt ids than ours.
            EngineError: time limit, dead engine, or an answer that breaks what was asked; names the prompt.
        """
        if self._version is None:
            raise EngineError("the engine has no weights yet: give it some, and their version, before generate")
        if self._paused:
            raise EngineError("the engine is paused: call resume or set_version before generate")
        calls = [self._generate_call(prompt, sampling, seed, step) for prompt in prompts]

        def read(number: int, answer: object) -> tuple[Response, ...]:
            responses = self._responses(prompts[number], answer, sampling)
            if finished is not None:
                finished(Group(prompt=prompts[number], responses=responses))
            return responses

        return self._http.call_all(calls, read)

    def update_weights(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], version: int) -> None:
        """See ``RolloutEngine``. The first call waits for the server. Nothing may be generating: it would be aborted.

        Raises:
            EngineError: the server did not start, refused a bucket, did not flush, or reports another version after it.
        """
        self._server.wait_until_ready()
        what = f"updating to version {version}"
        self._version = None
        self.pause()
        for bucket in buckets:
            self._load(what, [_serialize(bucket)] * self._config.tensor_parallel_size)
        self.set_version(version)

    def tell_ranks(self, what: LoaderName, messages: Sequence[str]) -> None:
        """See ``RolloutEngine``.

        Raises:
            EngineError: the message did not arrive; what the ranks make of it, their answers say.
        """
        self._load(f"asking for {what}", [_serialize_text(message) for message in messages], _LOADERS[what])

    def set_version(self, version: int) -> None:
        """See ``RolloutEngine``.

        Raises:
            EngineError: the engine did not flush, or reports another version afterwards.
        """
        what = f"setting version {version}"
        self._version = None
        self._admin(what, "/flush_cache", {})
        body = {"new_version": str(version), "abort_all_requests": False}
        self._expect_success(what, self._admin(what, "/update_weight_version", body))
        self.resume()
        info = cast("Json", self._http.call(Call(what=what, path="/model_info")))
        if info["weight_version"] != str(version):
            raise EngineError(f"{what}: the engine reports version {info['weight_version']!r} afterwards")
        self._version = version

    def pause(self) -> None:
        """See ``RolloutEngine``. Nothing may be generating: it would be aborted."""
        self._server.wait_until_ready()
        self._server.check_alive()
        if not self._paused:
            self._admin("pausing", "/pause_generation", {"mode": "abort"})
            self._paused = True

    def resume(self) -> None:
        """See ``RolloutEngine``."""
        if self._paused:
            self._admin("resuming", "/continue_generation", {})
            self._paused = False

    def release_kv_cache(self) -> None:
        """Give the KV cache's memory back to the device."""
        if self._shares_device and not self._kv_cache_released:
            self._admin("releasing the KV cache", "/release_memory_occupation", {"tags": ["kv_cache"]})
            self._kv_cache_released = True

    def resume_kv_cache(self) -> None:
        """Take the KV cache's memory again."""
        if self._shares_device and self._kv_cache_released:
            self._admin("resuming the KV cache", "/resume_memory_occupation", {"tags": ["kv_cache"]})
            self._kv_cache_released = False

    def check_alive(self) -> None:
        """Raise EngineError, with the end of the engine's log, when its process has ended."""
        self._server.check_alive()

    def close(self) -> None:
        """End every process of the engine; safe to call twice."""
        try:
            self._http.close()
        finally:
            self._server.stop()

    def _load(self, what: str, serialized: Sequence[str], load_format: str | None = None) -> None:
        """``serialized``: for each rank, from ``_serialize``."""
        body: dict[str, object] = {"serialized_named_tensors": list(serialized), "flush_cache": False}
        if load_format is not None:
            body["load_format"] = load_format
        self._expect_success(what, self._admin(what, "/update_weights_from_tensor", body))

    def _admin(self, what: str, path: str, body: Json) -> object:
        return self._http.call(Call(what=what, path=path, body=body, admin=True))

    @staticmethod
    def _expect_success(what: str, answer: object) -> None:
        verdict = cast("Json", answer)
        if verdict["success"] is not True:
            raise EngineError(f"{what}: the engine refused: {verdict['message']}")

    def _generate_call(self, prompt: EncodedPrompt, sampling: SamplingParams, seed: int, step: int) -> Call:
        params: dict[str, object] = {
            "n": sampling.num_samples,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "max_new_tokens": sampling.max_new_tokens,
        }
        body: dict[str, object] = {
            "input_ids": prompt.engine_ids.tolist(),
            "sampling_params": params,
            "return_logprob": True,
            "return_prompt_token_ids": True,
        }
        if self._config.deterministic:
            params["sampling_seed"] = prompt_seed(seed, step, prompt.prompt.id)
            # No prefix from another prompt's cache: keys of a longer prompt differ in the last bits.
            body["extra_key"] = prompt.prompt.id
        if prompt.images:
            images = [base64.b64encode(image).decode() for image in prompt.images]
            # With n > 1 SGLang takes the request for a batch of one prompt, whose images are one list in a list.
            body["image_data"] = images if sampling.num_samples == 1 else [images]
        return Call(what=f"generating for prompt {prompt.prompt.id}", path="/generate", body=body)

    def _responses(self, prompt: EncodedPrompt, answer: object, sampling: SamplingParams) -> tuple[Response, ...]:
        samples = cast("list[Json]", answer if isinstance(answer, list) else [answer])
        if len(samples) != sampling.num_samples:
            raise EngineError(
                f"prompt {prompt.prompt.id}: asked for {sampling.num_samples} responses, got {len(samples)}"
            )
        return tuple(self._response(prompt, sample) for sample in samples)

    def _response(self, prompt: EncodedPrompt, sample: Json) -> Response:
        name = f"prompt {prompt.prompt.id}"
        _check_prompt_ids(name, prompt.ids, np.array(_field(name, sample, "prompt_token_ids"), dtype=np.int64))
        meta = cast("Json", _field(name, sample, "meta_info"))
        reason = cast("Json", _field(name, meta, "finish_reason"))
        if reason["type"] not in _FINISHES:
            raise EngineError(f"{name}: the engine gave up: {reason}")
        version = _field(name, meta, "weight_version")
        if version != str(self._version):
            raise EngineError(f"{name}: sampled by weights of version {version!r} instead of {self._version}")
        # What is computed again has other last bits, and SGLang has forgotten which tokens it is to penalise.
        exact = self._config.deterministic or self._config.repetition_penalty != 1
        if exact and _field(name, meta, "num_retractions"):
            raise EngineError(
                f"{name}: the KV cache was too small and part of the response was computed twice, which neither "
                "rollout.deterministic nor rollout.repetition_penalty survives: raise rollout.max_total_tokens or "
                "lower rollout.max_running_requests"
            )
        ids = cast("list[int]", _field(name, sample, "output_ids"))
        if found := self._banned.intersection(ids):
            raise EngineError(f"{name}: the engine sampled the banned tokens {sorted(found)}")
        tokens = np.array(ids, dtype=np.int64)
        return Response(
            ids=tokens,
            logprobs=_logprobs(name, ids, cast("list[ScoredToken]", _field(name, meta, "output_token_logprobs"))),
            finish=_FINISHES[cast("str", reason["type"])],
            policy_version=cast("int", self._version),
            text=self._decode(tokens),
        )


def start_engine(
    config: RolloutConfig, model: EngineModel, *, banned_token_ids: Sequence[int], decode: Decode, log_path: Path
) -> SGLangEngine:
    """Start a server, from the main thread. It needs weights and their version before it generates."""
    server = start_server(config, model, banned_token_ids=banned_token_ids, log_path=log_path)
    return SGLangEngine(
        server,
        config,
        banned_token_ids=banned_token_ids,
        decode=decode,
        shares_device=model.device == "cuda",
    )


def _field(name: str, answer: Json, key: str) -> object:
    if key not in answer:
        raise EngineError(f"{name}: the engine's answer has no {key!r}, only {sorted(answer)}")
    return answer[key]


def _logprobs(name: str, ids: Sequence[int], scored: Sequence[ScoredToken]) -> NDArray[np.float32]:
    """Log-probs of ``ids``, [R]. Raises EngineError unless there is a finite one for each."""
    if [token for _, token, _ in scored] != list(ids):
        raise EngineError(f"{name}: sampled {ids} but got log-probs for {[token for _, token, _ in scored]}")
    values = [value for value, _, _ in scored]
    if not all(math.isfinite(value) for value in values):
        raise EngineError(f"{name}: log-probs {values} are not all finite")
    return np.array(values, dtype=np.float32)


def _check_prompt_ids(name: str, ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> None:
    if np.array_equal(ours, theirs):
        return
    shared = min(len(ours), len(theirs))
    differing = np.flatnonzero(ours[:shared] != theirs[:shared])
    at = int(differing[0]) if len(differing) else shared
    raise PromptMismatchError(
        f"{name}: the engine read {len(theirs)} prompt tokens, ours has {len(ours)}; they differ from index {at} on: "
        f"{theirs[at : at + 4].tolist()} instead of {ours[at : at + 4].tolist()}"
    )


def _serialize(bucket: Sequence[tuple[str, torch.Tensor]]) -> str:
    """Base64 of a plain pickle: multiprocessing's pickler would pass file descriptors, which ends the engine."""
    return base64.b64encode(pickle.dumps([(name, _own_memory(tensor)) for name, tensor in bucket])).decode()


def _serialize_text(message: str) -> str:
    """``message`` as the one tensor of a bucket, its bytes: what gets through to a loader."""
    import torch

    return _serialize([("message", torch.frombuffer(bytearray(message.encode()), dtype=torch.uint8))])


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor that is all of its storage: pickle writes whole storages."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
