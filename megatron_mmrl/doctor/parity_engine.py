"""SGLang's side: a real server scores given tokens. Only token log-probs and prompt ids can be seen from outside.

A weight at fault is found by sending the checkpoint's tensors again, stage by stage: the stage whose sending changes
the log-probs held something else.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.data.processor import Processor
from megatron_mmrl.doctor.parity_compare import difference, stage_of
from megatron_mmrl.doctor.parity_oracle import Dtype
from megatron_mmrl.doctor.parity_samples import NO_IMAGE, Variant
from megatron_mmrl.models.hf_io import HFReader
from megatron_mmrl.parallel.device import device
from megatron_mmrl.rollout.engine import EngineError
from megatron_mmrl.rollout.fleet import buckets
from megatron_mmrl.rollout.http import Call, EngineHttp
from megatron_mmrl.rollout.server_args import EngineModel
from megatron_mmrl.rollout.sglang_client import SGLangEngine
from megatron_mmrl.rollout.sglang_server import start_server

if TYPE_CHECKING:
    from torch import Tensor

_BUCKET_BYTES = 1 << 29
_REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineScores:
    """What the engine said of each sequence."""

    logprobs: tuple[NDArray[np.float32], ...]  # [R] each; NaN where the ids differ
    other_ids: tuple[str, ...]  # sequences whose ids the engine expanded differently from our processor, and where


class EngineProbe:
    """A server with a checkpoint's weights, to be used as a context manager from the main thread.

    Args:
        checkpoint: its weights are sent as a training run sends them.
        processor: writes the model directory that the server starts from.
        tensor_parallel: of the server.
        directory: for the model directory and the server's log.
    """

    def __init__(
        self, checkpoint: Path, processor: Processor, *, tensor_parallel: int, dtype: Dtype, directory: Path
    ) -> None:
        self._reader, self._version, self._stack = HFReader(checkpoint), 0, ExitStack()
        processor.write_engine_dir(directory / "engine_model")
        config = RolloutConfig(tensor_parallel_size=tensor_parallel, request_timeout_s=_REQUEST_TIMEOUT_S)
        model = EngineModel(path=directory / "engine_model", dtype=dtype, device=_device())
        server = start_server(config, model, banned_token_ids=(), log_path=directory / "engine.log")
        self._engine = SGLangEngine(
            server, config, banned_token_ids=(), decode=processor.decode, shares_device=_device() == "cuda"
        )
        self._stack.callback(self._engine.close)
        self._http = EngineHttp(server, _REQUEST_TIMEOUT_S)
        self._stack.callback(self._http.close)

    def __enter__(self) -> EngineProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors, read one at a time."""
        return ((name, self._reader[name][:]) for name in (self._reader.names if names is None else names))

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Send weights. Raises EngineError when the engine refuses them."""
        self._version += 1
        self._engine.update_weights(buckets(tensors, _BUCKET_BYTES), self._version)

    def score(self, variants: Sequence[Variant]) -> EngineScores:
        """Log-probs of the responses at temperature 1 and without a mask.

        Raises:
            EngineError: no answer, or one without the log-probs that were asked for.
        """
        answers = self._http.call_all([_call(variant) for variant in variants], lambda _, answer: answer)
        logprobs: list[NDArray[np.float32]] = []
        other_ids = []
        for variant, answer in zip(variants, answers, strict=True):
            content = cast("Mapping[str, object]", answer)
            theirs = np.array(content["prompt_token_ids"], dtype=np.int64)
            if np.array_equal(theirs, variant.ours.ids):
                logprobs.append(_logprobs(variant, content))
                continue
            logprobs.append(np.full(len(variant.response), np.nan, np.float32))
            other_ids.append(f"{variant.name}: {len(theirs)} ids instead of {len(variant.ours.ids)}")
        return EngineScores(logprobs=tuple(logprobs), other_ids=tuple(other_ids))

    def stages_at_fault(
        self, variant: Variant, reference: NDArray[np.float32], tolerance: float
    ) -> tuple[list[str], float]:
        """Send the checkpoint's tensors again, stage by stage in the model's order, until the log-probs are right.

        Returns:
            The stages whose sending changed the log-probs of ``variant``, and how far these are off at the end, nats.
        """
        stages: dict[str, list[str]] = {}
        for name in self._reader.names:
            stages.setdefault(stage_of(name), []).append(name)
        before = self.score([variant]).logprobs[0]
        changed = []
        for stage in sorted(stages, key=_model_order):
            self.load(self.tensors(stages[stage]))
            after = self.score([variant]).logprobs[0]
            if difference([after], [before]).max > tolerance / 10:
                changed.append(stage)
            before = after
            if difference([after], [reference]).max <= tolerance:
                break
        return changed, difference([before], [reference]).max


def explain_engine(
    probe: EngineProbe,
    scores: EngineScores,
    variants: Sequence[Variant],
    reference: Sequence[NDArray[np.float32]],
    tolerance: float,
) -> str | None:
    """One sentence that names what makes the engine differ; None when it does not."""
    if scores.other_ids:
        return f"the engine's processor reads other ids than ours: {scores.other_ids[0]}"
    gaps = [difference([ours], [theirs]).max for ours, theirs in zip(scores.logprobs, reference, strict=True)]
    worst = int(np.argmax(gaps))
    if gaps[worst] <= tolerance:
        return None
    text_only = [gap for gap, variant in zip(gaps, variants, strict=True) if not variant.prompt.images]
    path = "the language model" if not text_only or max(text_only) > tolerance else "the vision path"
    stages, left = probe.stages_at_fault(variants[worst], reference[worst], tolerance)
    where = f"{path} differs ({variants[worst].name} by {gaps[worst]:.2g} nats"
    if path == "the vision path":
        where += f", {NO_IMAGE} by at most {max(text_only):.2g}"
    if stages and left <= tolerance:
        return f"{where}): {', '.join(stages[:3])} did not hold the checkpoint's weights; sent again, they agree"
    return f"{where}): not a matter of weights, which were sent again and leave {left:.2g} nats"


def _call(variant: Variant) -> Call:
    """Scoring is generating nothing: the response is given as the end of the prompt, unexpanded as the engine wants."""
    body: dict[str, object] = {
        "input_ids": [*variant.prompt.engine_ids.tolist(), *variant.response.tolist()],
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": len(variant.prompt.ids) - 1,  # counted after the engine has expanded the images
        "return_prompt_token_ids": True,
    }
    if variant.prompt.images:
        body["image_data"] = [base64.b64encode(image).decode() for image in variant.prompt.images]
    return Call(what=f"scoring {variant.name}", path="/generate", body=body)


def _logprobs(variant: Variant, answer: Mapping[str, object]) -> NDArray[np.float32]:
    meta = cast("Mapping[str, object]", answer["meta_info"])
    scored = cast("list[tuple[float, int, None]]", meta["input_token_logprobs"])[1:]
    if [token for _, token, _ in scored] != variant.response.tolist():
        raise EngineError(
            f"scoring {variant.name}: asked for the log-probs of {variant.response.tolist()}, "
            f"got those of {[token for _, token, _ in scored]}"
        )
    return np.array([value for value, _, _ in scored], dtype=np.float32)


def _model_order(stage: str) -> tuple[int, int, bool]:
    """Vision first, then layer by layer, attention before MLP."""
    order = (
        "visual.patch_embed",
        "visual.blocks",
        "visual.merger",
        "embeddings",
        "model.layers",
        "model.norm",
        "lm_head",
    )
    place = next(number for number, part in enumerate(order) if stage.startswith(part))
    number = re.search(r"\d+", stage)
    return place, int(number.group()) if number else 0, stage.endswith("mlp")


def _device() -> Literal["cpu", "cuda"]:
    return "cuda" if device().type == "cuda" else "cpu"
