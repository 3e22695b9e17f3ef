"""Bytes that the parameters of each pipeline stage cost: weights, gradients and optimizer state.

Of Megatron-core 0.16.1, as ``trainer/optim.py`` sets it up. A rank holds its weights whole, in ``model.dtype``. What is
trained has a float32 gradient (``grad_reduce_in_fp32``), and Adam's state: two float32 moments, and for bfloat16
weights a float32 master copy. The distributed optimizer divides that state, and nothing else, over the data x context
ranks; without it every rank has all. What is frozen is in no buffer and has no state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.memory.model import ITEM_BYTES, DType
from megatron_mmrl.models.parts import frozen_names
from megatron_mmrl.models.registry import held_parameters, tensor_shapes
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.parallel.sharding import Replicated, Vocab, WeightEntry, padded_vocab_size

GRADIENT_BYTES = 4
STATE_BYTES: Mapping[str, int] = {"float32": 8, "bfloat16": 12}
_ALIGNED_ELEMENTS = 64  # a parameter begins at a multiple of it in Megatron's buffers
_BUCKET_ELEMENTS = 128  # and a bucket ends at a multiple of it and of the ranks that divide it
_MIN_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000  # Megatron's size of buckets, with overlap_grad_reduce alone


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParameters:
    """Numbers that a rank of one pipeline stage holds, alike on all tensor-parallel ranks."""

    stage: int
    elements: int
    """Of all weights, padding of the vocabulary included."""
    trained: int
    buffered: int
    """Of Megatron's buffers: ``trained`` and what their alignment adds."""
    largest: int
    """Of the largest tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterBytes:
    """Of one rank of one stage."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def stage_parameters(model: ModelConfig, parallel: ParallelConfig) -> tuple[StageParameters, ...]:
    """Of each pipeline stage; ``model.path`` is a directory with a ``config.json``.

    Raises:
        ValueError: a model that is not supported, or ``model.freeze`` matches nothing.
    """
    return _of_stages(model.path, tuple(model.freeze), parallel)


def total_parameters(model: ModelConfig) -> tuple[int, int]:
    """(all, trained) of the whole model, a tied embedding once. Raises as ``stage_parameters`` does."""
    frozen = _frozen(model.path, tuple(model.freeze))
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(model.path).items()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name not in frozen)


@functools.lru_cache(maxsize=512)  # a search asks again for other engines
def _of_stages(path: str, freeze: tuple[str, ...], parallel: ParallelConfig) -> tuple[StageParameters, ...]:
    layout, frozen = ParallelLayout.from_config(parallel), _frozen(path, freeze)
    chunks = _held(path, replace(layout, data=1, context=1))
    # A tied embedding that two stages hold: Megatron keeps it in a bucket of its own.
    copies = [entry for rows in chunks.values() for entry, _ in rows if not entry.exported]
    shared = frozenset(name for entry in copies for name in entry.hf_names)
    return tuple(
        _stage(stage, [rows for (own, _), rows in chunks.items() if own == stage], frozen, shared, parallel)
        for stage in range(layout.pipeline)
    )


@functools.lru_cache(maxsize=8)
def _frozen(path: str, freeze: tuple[str, ...]) -> frozenset[str]:
    return frozenset(frozen_names(list(tensor_shapes(path)), freeze)) if freeze else frozenset()


@functools.lru_cache(maxsize=64)  # and for other numbers of replicas
def _held(path: str, layout: ParallelLayout) -> Mapping[tuple[int, int], Sequence[tuple[WeightEntry, int]]]:
    """(stage, chunk) -> its entries, and the numbers of a rank's shard of each."""
    shapes = tensor_shapes(path)
    chunks: dict[tuple[int, int], list[tuple[WeightEntry, int]]] = {}
    for stage, chunk, entry in held_parameters(path, layout):
        chunks.setdefault((stage, chunk), []).append((entry, shard_elements(entry, shapes, layout.tensor)))
    return chunks


def shard_elements(entry: WeightEntry, shapes: Mapping[str, tuple[int, ...]], tensor: int) -> int:
    """Numbers of a rank's shard of ``entry``; ``tensor``: tensor-parallel ranks."""
    whole = sum(math.prod(shapes[name]) for name in entry.hf_names)
    if isinstance(entry.rule, Replicated):
        return whole
    if isinstance(entry.rule, Vocab):
        rows = entry.rule.vocab_size
        return whole // rows * padded_vocab_size(rows, tensor) // tensor
    return whole // tensor


def parameter_bytes(
    held: StageParameters, dtype: DType, optimizer_ranks: int, *, distributed: bool = True
) -> ParameterBytes:
    """Bytes of a rank that holds ``held``; ``optimizer_ranks``: data x context, which share the optimizer state.

    weights: item x elements, and what aligns the buffers; gradients: 4 x buffers; optimizer: 8 or 12 x trained, shared.
    """
    padding = held.buffered - held.trained if distributed else 0
    state = STATE_BYTES[dtype] * held.trained
    return ParameterBytes(
        weights=ITEM_BYTES[dtype] * (held.elements + padding),
        gradients=GRADIENT_BYTES * held.buffered,
        optimizer=-(-state // optimizer_ranks) if distributed else state,
    )


def buffer_elements(sizes: Sequence[int], alone: Collection[int], *, ranks: int, bucket: int | None) -> int:
    """Numbers of one of Megatron's buffers (``param_and_grad_buffer.py``), with the distributed optimizer.

    Args:
        sizes: of the parameters, in the order of the model; the buffer has them from the last to the first.
        alone: which of them have a bucket of their own (a tied embedding on two stages).
        ranks: that divide each bucket.
        bucket: a bucket is closed once it has so many numbers; None: there is one.
    """
    start = end = 0
    for number in reversed(range(len(sizes))):
        begin = _round_up(end, _ALIGNED_ELEMENTS)
        if number in alone and begin > start:
            begin = start = _round_up(begin, math.lcm(ranks, _BUCKET_ELEMENTS))
        end = begin + sizes[number]
        if number in alone or (bucket is not None and end - start >= bucket):
            end = start = _round_up(end, math.lcm(ranks, _BUCKET_ELEMENTS))
    return _round_up(end, math.lcm(ranks, _BUCKET_ELEMENTS))


def _stage(
    stage: int,
    chunks: Sequence[Sequence[tuple[WeightEntry, int]]],
    frozen: frozenset[str],
    shared: frozenset[str],
    parallel: ParallelConfig,
) -> StageParameters:
    ranks = parallel.data_parallel_size * parallel.context_parallel_size
    trained, buffered = 0, 0
    for index, rows in enumerate(chunks):
        kept = [(entry, size) for entry, size in rows if not frozen.intersection(entry.hf_names)]
        sizes = [size for _, size in kept]
        trained += sum(sizes)
        if not parallel.use_distributed_optimizer:
            buffered += sum(sizes)
            continue
        alone = {number for number, (entry, _) in enumerate(kept) if shared.intersection(entry.hf_names)}
        bucketed = parallel.overlap_grad_reduce and index == 0  # later chunks: disable_bucketing
        bucket = max(_MIN_BUCKET, _BUCKET_PER_RANK * ranks) if bucketed else None
        buffered += buffer_elements(sizes, alone, ranks=ranks, bucket=bucket)
    every = [size for rows in chunks for _, size in rows]
    return StageParameters(
        stage=stage, elements=sum(every), trained=trained, buffered=buffered, largest=max(every, default=0)
    )


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
