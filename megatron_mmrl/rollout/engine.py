"""What the loop asks of a rollout engine. The SGLang server behind HTTP is the one implementation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_mmrl.types import EncodedPrompt, Response, SamplingParams

if TYPE_CHECKING:
    import torch


class EngineError(RuntimeError):
    """The engine died, did not answer in time, or answered something that cannot be used."""


class PromptMismatchError(EngineError):
    """The engine read other prompt ids than ours; names the prompt."""


class RolloutEngine(Protocol):
    """One engine, as its leader rank sees it. Every call has a time limit and raises EngineError."""

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, seed: int, step: int
    ) -> list[tuple[Response, ...]]:
        """``sampling.num_samples`` responses for each prompt, in the order of ``prompts``.

        ``seed`` and ``step`` matter only to a deterministic engine, whose draws depend on
        (seed, step, prompt id, sample index) and nothing else.

        Raises:
            PromptMismatchError: the engine's prompt ids differ from ``EncodedPrompt.ids``.
        """
        ...

    def update_weights(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], version: int) -> None:
        """Load full tensors under Hugging Face names, then flush the prefix cache and set the version."""
        ...

    def release_kv_cache(self) -> None:
        """Give the KV cache's memory back to the device (no effect where nothing shares it)."""
        ...

    def resume_kv_cache(self) -> None: ...

    def check_alive(self) -> None:
        """Raise EngineError, with the end of the engine's log, when its process has ended."""
        ...

    def close(self) -> None:
        """End every process of the engine; safe to call twice."""
        ...
