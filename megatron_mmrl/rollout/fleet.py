"""All engines as every rank sees them: leaders talk to theirs, and all learn what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from megatron_mmrl.rollout.engine import EngineDiedError, EngineError, RolloutEngine
from megatron_mmrl.rollout.routing import leader_ranks, shares
from megatron_mmrl.types import EncodedPrompt, Group, Response, SamplingParams

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
NamedTensor = tuple[str, "torch.Tensor"]
Work = Callable[[int, RolloutEngine], None]  # with the number of the engine, and the engine


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
    instead of waiting for each other. One that has died is started again, is given weights, and repeats its part.

    Args:
        start: starts an engine, without waiting for it, from the main thread; None on a rank that leads none.
        num_engines: over all ranks.
        bucket_bytes: weights are sent in lists of at most this size.
        max_restarts: so many deaths are survived.
    """

    def __init__(
        self,
        start: Callable[[], RolloutEngine] | None,
        exchange: Exchange,
        *,
        num_engines: int,
        bucket_bytes: int,
        max_restarts: int = 0,
    ) -> None:
        self._leaders = leader_ranks(num_engines, exchange.world_size)
        if (start is not None) != (exchange.rank in self._leaders):
            raise ValueError(f"rank {exchange.rank}: engines are led by ranks {self._leaders}, start={start}")
        self._start, self._exchange, self._bucket_bytes = start, exchange, bucket_bytes
        self._engine = start() if start else None
        self._max_restarts, self.restarts = max_restarts, 0
        self.restore: Callable[[], None] = lambda: None
        """Called on every rank after engines were started again, to give those the weights."""

    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: SamplingParams,
        *,
        seed: int,
        step: int,
        finished: Callable[[Group], None] | None = None,
    ) -> list[Group]:
        """A group for each prompt, in order, equal on every rank. ``prompts`` must be equal on every rank.

        ``finished`` is told of each group as soon as it is there, on the rank that leads its engine only, from any
        thread and in any order. An engine that dies answers its share again: of what it had finished, ``finished`` is
        told twice, perhaps with other responses; only those that are returned count.

        Raises:
            EngineError: on every rank, when any engine failed.
        """
        own: list[tuple[Response, ...]] = []

        def work(number: int, engine: RolloutEngine) -> None:
            share = shares(len(prompts), len(self._leaders))[number]
            own.extend(engine.generate(prompts[share], sampling, seed=seed, step=step, finished=finished))

        self.everywhere(work)
        responses = [group for part in self._exchange.all_gather(own) for group in part]
        return [Group(prompt=prompt, responses=group) for prompt, group in zip(prompts, responses, strict=True)]

    def update_weights(self, named: Callable[[], Iterator[NamedTensor]], version: int) -> None:
        """Give every engine the tensors that ``named()`` yields; making them is collective, so all ranks iterate.

        Raises:
            EngineError: on every rank, when any engine failed.
        """
        stream = buckets(named(), self._bucket_bytes)
        error = self._attempt(lambda _, engine: engine.update_weights(stream, version))
        for _ in stream:
            pass  # a rank without an engine, or whose engine failed, still takes its part in making the tensors
        _raise_first(self._exchange.all_gather(error))

    def release_kv_cache(self) -> None:
        """Give the engines' KV memory to the trainer."""
        self.everywhere(lambda _, engine: engine.release_kv_cache())

    def resume_kv_cache(self) -> None:
        """Give it back."""
        self.everywhere(lambda _, engine: engine.resume_kv_cache())

    def pause(self) -> None:
        """Have every engine compute nothing."""
        self.everywhere(lambda _, engine: engine.pause())

    def resume(self) -> None:
        """Have them compute again."""
        self.everywhere(lambda _, engine: engine.resume())

    def close(self) -> None:
        """End this rank's engine, if it has one; safe to call twice. Not collective: it also ends a failed run."""
        if self._engine is not None:
            self._engine.close()

    def everywhere(self, work: Work) -> None:
        """Do ``work`` on each leader's engine; with an engine that died before it was done, once more from the start.

        Raises:
            EngineError: on every rank, when any engine failed otherwise, or has died too often.
        """
        errors = self._exchange.all_gather(self._attempt(work))
        while any(isinstance(error, EngineDiedError) for error in errors):
            _raise_first([None if isinstance(error, EngineDiedError) else error for error in errors])
            self._start_again(errors)
            again = errors[self._exchange.rank] is not None
            errors = self._exchange.all_gather(self._attempt(work) if again else None)
        _raise_first(errors)

    def _start_again(self, errors: Sequence[EngineError | None]) -> None:
        """Replace the engines whose leaders report an error, which are dead. Raises EngineError if that is too many."""
        self.restarts += sum(error is not None for error in errors)
        if self.restarts > self._max_restarts:
            _raise_first(errors)
        if errors[self._exchange.rank] is not None and self._start is not None:
            self.close()
            self._engine = self._start()
        self.restore()

    def _attempt(self, work: Work) -> EngineError | None:
        if self._engine is None:
            return None
        try:
            work(self._leaders.index(self._exchange.rank), self._engine)
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
