"""What the loop asks of a rollout engine. The SGLang server behind HTTP is the one implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from megatron_mmrl.types import EncodedPrompt, Group, Response, SamplingParams

if TYPE_CHECKING:
    import torch


LoaderName = Literal["attach", "checksums"]
"""What the ranks of an engine can be told about weights in shared memory."""


class EngineError(RuntimeError):
    """The engine died, did not answer in time, or answered something that cannot be used."""


class EngineDiedError(EngineError):
    """The engine's process has ended; a new one can be started in its place."""


class PromptMismatchError(EngineError):
    """The engine read other prompt ids than ours; names the prompt."""


class RolloutEngine(Protocol):
    """One engine, as its leader rank sees it. Every call has a time limit and raises EngineError."""

    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: SamplingParams,
        *,
        seed: int,
        step: int,
        finished: Callable[[Group], None] | None = None,
    ) -> list[tuple[Response, ...]]:
        """``sampling.num_samples`` responses for each prompt, in the order of ``prompts``.

        ``seed`` and ``step`` matter only to a deterministic engine, whose draws depend on
        (seed, step, prompt id, sample index) and nothing else. ``finished`` is told of each prompt whose responses are
        all there while others are waited for, in any order and from any thread; after an error it may have been told
        of some.

        Raises:
            PromptMismatchError: the engine's prompt ids differ from ``EncodedPrompt.ids``.
        """
        ...

    def update_weights(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], version: int) -> None:
        """Load full tensors under Hugging Face names, then make them known as ``version``, see ``set_version``."""
        ...

    def tell_ranks(self, what: LoaderName, messages: Sequence[str]) -> None:
        """Hand a message to each rank of the engine, which it answers in a file; see ``reshard/attach.py``."""
        ...

    def set_version(self, version: int) -> None:
        """The weights have changed: forget what was computed with the old ones, and compute again."""
        ...

    def pause(self) -> None:
        """Compute nothing until ``resume`` or ``set_version``. Waits for an engine that is starting."""
        ...

    def resume(self) -> None:
        """Compute again, with the weights as they are."""
        ...

    def release_kv_cache(self) -> None:
        """Give the KV cache's memory back to the device (no effect where nothing shares it)."""
        ...

    def resume_kv_cache(self) -> None: ...

    def close(self) -> None:
        """End every process of the engine; safe to call twice."""
        ...
