"""All engines as every rank sees them: leaders talk to theirs, and all learn what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from megatron_mmrl.rollout.engine import EngineError, RolloutEngine
from megatron_mmrl.rollout.routing import leader_ranks, shares
from megatron_mmrl.types import EncodedPrompt, Group, Response, SamplingParams

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
NamedTensor = tuple[str, "torch.Tensor"]


class Exchange(Protocol):
    """The collective that the fleet needs, for values of our own ranks only."""

    rank: int
    world_size: int

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order."""
        ...


class EngineFleet:
    """The rollout engines of a run.

    An engine's failure is known to one rank only; every call ends by telling all, so that all raise it together
    instead of waiting for each other.

    Args:
        engine: this rank's engine if it leads one, else None.
        num_engines: over all ranks.
        bucket_bytes: weights are sent in lists of at most this size.
    """

    def __init__(
        self, engine: RolloutEngine | None, exchange: Exchange, *, num_engines: int, bucket_bytes: int
    ) -> None:
        self._leaders = leader_ranks(num_engines, exchange.world_size)
        if (engine is not None) != (exchange.rank in self._leaders):
            raise ValueError(f"rank {exchange.rank}: engines are led by ranks {self._leaders}, engine={engine}")
        self._engine, self._exchange, self._bucket_bytes = engine, exchange, bucket_bytes

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, seed: int, step: int
    ) -> list[Group]:
        """A group for each prompt, in order, equal on every rank. ``prompts`` must be equal on every rank.

        Raises:
            EngineError: on every rank, when any engine failed.
        """
        own: list[tuple[Response, ...]] = []

        def work(engine: RolloutEngine) -> None:
            share = shares(len(prompts), len(self._leaders))[self._leaders.index(self._exchange.rank)]
            own.extend(engine.generate(prompts[share], sampling, seed=seed, step=step))

        error = self._attempt(work)
        outcomes = self._exchange.all_gather((error, own))
        _raise_first([failure for failure, _ in outcomes])
        responses = [group for _, part in outcomes for group in part]
        return [Group(prompt=prompt, responses=group) for prompt, group in zip(prompts, responses, strict=True)]

    def update_weights(self, named: Callable[[], Iterator[NamedTensor]], version: int) -> None:
        """Give every engine the tensors that ``named()`` yields; making them is collective, so all ranks iterate.

        Raises:
            EngineError: on every rank, when any engine failed.
        """
        stream = buckets(named(), self._bucket_bytes)
        error = self._attempt(lambda engine: engine.update_weights(stream, version))
        for _ in stream:
            pass  # a rank without an engine, or whose engine failed, still takes its part in making the tensors
        _raise_first(self._exchange.all_gather(error))

    def release_kv_cache(self) -> None:
        """Give the engines' KV memory to the trainer."""
        self._everywhere(lambda engine: engine.release_kv_cache())

    def resume_kv_cache(self) -> None:
        """Give it back."""
        self._everywhere(lambda engine: engine.resume_kv_cache())

    def check_alive(self) -> None:
        """Raise EngineError on every rank when any engine has ended."""
        self._everywhere(lambda engine: engine.check_alive())

    def close(self) -> None:
        """End this rank's engine, if it has one; safe to call twice. Not collective: it also ends a failed run."""
        if self._engine is not None:
            self._engine.close()

    def _everywhere(self, work: Callable[[RolloutEngine], None]) -> None:
        _raise_first(self._exchange.all_gather(self._attempt(work)))

    def _attempt(self, work: Callable[[RolloutEngine], None]) -> EngineError | None:
        if self._engine is None:
            return None
        try:
            work(self._engine)
        except EngineError as error:
            return error
        return None


def buckets(named: Iterable[NamedTensor], max_bytes: int) -> Iterator[list[NamedTensor]]:
    """Consecutive tensors in lists of at most ``max_bytes``; a larger tensor comes alone."""
    bucket: list[NamedTensor] = []
    size = 0
    for name, tensor in named:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _raise_first(errors: Iterable[EngineError | None]) -> None:
    for rank, error in enumerate(errors):
        if error is not None:
            raise type(error)(f"engine of rank {rank}: {error}")
