"""Everything the loop works with, and the protocols it asks of each part. Composed in ``megatron_mmrl/train.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.config import Config
from megatron_mmrl.types import EncodedPrompt, Group, SamplingParams, TrainBatch, UpdateStats

if TYPE_CHECKING:
    import torch

    from megatron_mmrl.algorithms.losses import LossFn
    from megatron_mmrl.algorithms.registry import Algorithm
    from megatron_mmrl.controller.handover import Handover
    from megatron_mmrl.controller.scoring import Scorer
    from megatron_mmrl.trainer.packing import Packer

T = TypeVar("T")


class Exchange(Protocol):
    """Collectives over all ranks, for values of our own ranks only."""

    rank: int
    world_size: int

    def all_gather(self, value: T) -> list[T]: ...

    def broadcast(self, value: T, src: int) -> T: ...

    def barrier(self) -> None: ...


class Policy(Protocol):
    """The model being trained, as one rank sees it; every call is collective."""

    def logprobs(self, batch: TrainBatch) -> list[NDArray[np.float32]]:
        """log pi_theta of each micro-batch of this replica, each [T], 0 outside the loss mask."""
        ...

    def reference_logprobs(self, batch: TrainBatch) -> list[NDArray[np.float32]]:
        """The same under the reference model. Raises RuntimeError when none is kept."""
        ...

    def update(self, batch: TrainBatch, loss: LossFn) -> UpdateStats:
        """One optimizer step."""
        ...

    def refresh_reference(self) -> None:
        """Make the reference model what the policy is now."""
        ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors under Hugging Face names, in the same order on every rank."""
        ...

    def offload(self) -> int:
        """Move optimizer state off a device that the engine shares (nothing on a CPU); returns bytes moved."""
        ...

    def onload(self) -> int:
        """The reverse."""
        ...


class PromptSource(Protocol):
    """An endless, resumable stream of encoded prompts, equal on every rank."""

    def next(self, n: int) -> list[EncodedPrompt]: ...

    def counters(self) -> dict[str, float]: ...


class Fleet(Protocol):
    """All rollout engines, as one rank sees them; every call is collective."""

    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: SamplingParams,
        *,
        seed: int,
        step: int,
        finished: Callable[[Group], None] | None = None,
    ) -> list[Group]:
        """``finished`` is told of a group as soon as it is there, on one rank, while others are waited for."""
        ...

    def update_weights(self, named: Callable[[], Iterator[tuple[str, torch.Tensor]]], version: int) -> None: ...

    def release_kv_cache(self) -> None: ...

    def resume_kv_cache(self) -> None: ...

    def pause(self) -> None:
        """Have every engine compute nothing."""
        ...

    def resume(self) -> None: ...

    restarts: int
    """Engines that died and were started again."""
    restore: Callable[[], None]
    """Called on every rank after that, to give them weights."""


class RunLog(Protocol):
    """What the run writes down; only rank 0 writes, every rank may call."""

    def time(self, phase: str) -> AbstractContextManager[None]: ...

    def write(self, step: int, row: Mapping[str, float]) -> None: ...

    def supervised(self, step: int, row: Mapping[str, float]) -> None: ...

    def completions(self, step: int, groups: Sequence[Group]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """One rank's parts of a run."""

    config: Config
    policy: Policy
    fleet: Fleet
    scorer: Scorer
    algorithm: Algorithm
    packer: Packer
    prompts: PromptSource
    eval_prompts: Sequence[EncodedPrompt]
    sampling: SamplingParams
    handover: Handover
    log: RunLog
    exchange: Exchange
    num_steps: int
    start_step: int  # steps already done, 0 for a new run
    save: Callable[[int], None]  # writes a checkpoint of this step
    stop_asked: Callable[[], bool]  # whether this rank was asked to stop

    def evaluation_due(self, step: int) -> bool:
        every = self.config.run.evaluate_every
        return step == self.num_steps or (every > 0 and step % every == 0)

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks agree, for they end their last step together."""
        return any(self.exchange.all_gather(self.stop_asked()))

    def refresh_reference_if_due(self, step: int) -> None:
        every = self.config.algorithm.reference_refresh_every
        if every > 0 and step % every == 0:
            self.policy.refresh_reference()

    def save_if_due(self, step: int) -> None:
        every = self.config.run.save_every
        if step == self.num_steps or (every > 0 and step % every == 0):
            self.save(step)
