"""Which data-parallel replica reads which sequences in which micro-batch: a pure function of the lengths.

Every micro-batch of one plan has the same number of tokens T and every replica equally many of them, so pipeline
stages exchange tensors of one known shape, and ranks agree on the plan without talking.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mmrl.config.parallel import ParallelConfig

_SEARCH_STEPS = 6  # halvings of the interval in which the smallest T is searched


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiples:
    """What every size has to be a multiple of, so that each rank gets an equal part."""

    tokens: int = 1  # T of a pack, or the length of a padded row: tensor size under sequence parallelism x slot
    slot: int = 1  # what a packed sequence takes up, its padding included: 2 x context size
    microbatches: int = 1  # micro-batches per replica: pipeline size under the interleaved schedule

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Multiples:
        """Those of a run's parallel sizes."""
        context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
        slot = 2 * context if context > 1 else 1
        interleaved = parallel.virtual_pipeline_model_parallel_size is not None
        return cls(
            tokens=slot * tensor if parallel.sequence_parallel else slot,
            slot=slot,
            microbatches=parallel.pipeline_model_parallel_size if interleaved else 1,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who reads what. ``num_rows`` is None for packed micro-batches, else the rows B of each (T = B x row length)."""

    lengths: tuple[int, ...]  # tokens of every sequence
    microbatches: tuple[tuple[tuple[int, ...], ...], ...]  # [replica][micro-batch] -> sequence indices
    num_tokens: int  # T
    num_rows: int | None
    slot_multiple: int = 1  # a packed sequence takes up its length, rounded up to a multiple of this

    @property
    def utilisation(self) -> float:
        """Real tokens / computed tokens, over all replicas."""
        return sum(self.lengths) / (self.num_tokens * sum(len(replica) for replica in self.microbatches))

    def slots(self, indices: Sequence[int]) -> list[int]:
        """Tokens that packed sequences take up, padding at their ends included."""
        return [_round_up(self.lengths[index], self.slot_multiple) for index in indices]


def plan_microbatches(
    lengths: Sequence[int],
    *,
    num_replicas: int,
    max_tokens: int,
    max_sequences: int | None,
    packing: bool,
    multiples: Multiples = Multiples(),
) -> Plan:
    """Assign sequences to data-parallel replicas and micro-batches: every one once, the fewest micro-batches.

    Args:
        lengths: tokens of each sequence.
        num_replicas: data-parallel size.
        max_tokens: budget of one micro-batch, padding included.
        max_sequences: at most so many sequences in one micro-batch; None: only the budget binds.
        packing: sequences end to end; false: one row each, padded to the longest.
        multiples: of tokens, slots and micro-batches.

    Raises:
        ValueError: no sequences, or one that is longer than the budget.
    """
    lengths = [int(length) for length in lengths]
    budget = max_tokens // multiples.tokens * multiples.tokens
    if not lengths:
        raise ValueError("no sequences to plan; skip the update when a rollout leaves none")
    longest = max(lengths)
    if longest > budget:
        raise ValueError(
            f"sequence {lengths.index(longest)} has {longest} tokens but a micro-batch holds {budget} "
            f"(trainer.micro_batch_tokens={max_tokens}, in multiples of {multiples.tokens}); raise the budget or "
            "lower data.max_prompt_tokens or rollout.max_response_tokens"
        )
    limit, bins_multiple = max_sequences or len(lengths), num_replicas * multiples.microbatches
    slots = [_round_up(length, multiples.slot) for length in lengths] if packing else lengths
    if packing:
        bins = _pack(slots, bins_multiple, budget, limit, multiples.tokens)
        num_tokens = _round_up(_tallest(bins, slots), multiples.tokens)
        num_rows = None
    else:
        row_length = _round_up(longest, multiples.tokens)
        bins, num_rows = _rows(len(lengths), bins_multiple, min(budget // row_length, limit))
        num_tokens = num_rows * row_length
    return Plan(
        lengths=tuple(lengths),
        microbatches=_deal_to_replicas(bins, slots, num_replicas, num_tokens),
        num_tokens=num_tokens,
        num_rows=num_rows,
        slot_multiple=multiples.slot,
    )


def _pack(lengths: Sequence[int], bins_multiple: int, budget: int, limit: int, multiple_of: int) -> list[list[int]]:
    """The fewest bins that hold everything, rounded up to a multiple, filled so that the tallest is low."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    bins = _first_fit(lengths, order, capacity=budget, num_bins=len(lengths), limit=limit)
    num_bins = _round_up(sum(map(bool, bins)), bins_multiple)
    bins = [*bins, *([] for _ in range(num_bins))][:num_bins]
    level = _least_loaded(lengths, order, num_bins=num_bins, limit=limit)
    bins = min(bins, level, key=lambda candidate: _tallest(candidate, lengths))  # at most the budget: bins is
    # MULTIFIT: first-fit-decreasing at ever smaller capacities (Coffman, Garey, Johnson 1978)
    low = _round_up(max(lengths[order[0]], -(-sum(lengths) // num_bins)), multiple_of)
    for _ in range(_SEARCH_STEPS):
        high = _round_up(_tallest(bins, lengths), multiple_of)
        if low >= high:
            break
        capacity = (low + high) // 2 // multiple_of * multiple_of
        tighter = _first_fit(lengths, order, capacity=capacity, num_bins=num_bins, limit=limit)
        if tighter:
            bins = tighter
        else:
            low = capacity + multiple_of
    return bins


def _first_fit(
    lengths: Sequence[int], order: Sequence[int], *, capacity: int, num_bins: int, limit: int
) -> list[list[int]]:
    """Each sequence into the first bin with room for it; an empty list when ``num_bins`` do not suffice."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = np.full(num_bins, capacity)
    for index in order:
        fits = room >= lengths[index]
        first = int(fits.argmax())
        if not fits[first]:
            return []
        bins[first].append(index)
        room[first] = room[first] - lengths[index] if len(bins[first]) < limit else -1
    return bins


def _least_loaded(lengths: Sequence[int], order: Sequence[int], *, num_bins: int, limit: int) -> list[list[int]]:
    """Each sequence into the bin with the fewest tokens so far (longest processing time first), at any height."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]
    for index in order:
        load, number = heapq.heappop(loads)
        bins[number].append(index)
        if len(bins[number]) < limit:
            heapq.heappush(loads, (load + lengths[index], number))
    return bins


def _tallest(bins: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return max(sum(lengths[index] for index in indices) for indices in bins)


def _rows(num_sequences: int, bins_multiple: int, most: int) -> tuple[list[list[int]], int]:
    """Sequences in their order as rows of equally many micro-batches, the fewest and a multiple; and rows of each."""
    num_bins = _round_up(-(-num_sequences // most), bins_multiple)
    bins = [part.tolist() for part in np.array_split(np.arange(num_sequences), num_bins)]
    return bins, max(map(len, bins))


def _deal_to_replicas(
    bins: Sequence[Sequence[int]], lengths: Sequence[int], num_replicas: int, num_tokens: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Equally many bins to each replica. All have T tokens; what differs is attention, the sum of squared lengths."""

    def attention_cost(indices: Sequence[int]) -> int:
        filled = [lengths[index] for index in indices]
        return sum(length**2 for length in filled) + (num_tokens - sum(filled)) ** 2

    costs = [attention_cost(indices) for indices in bins]
    replicas: list[list[tuple[int, ...]]] = [[] for _ in range(num_replicas)]
    loads = [(0, replica) for replica in range(num_replicas)]
    for number in sorted(range(len(bins)), key=lambda number: (-costs[number], number)):
        load, replica = heapq.heappop(loads)
        replicas[replica].append(tuple(sorted(bins[number])))
        if len(replicas[replica]) < len(bins) // num_replicas:
            heapq.heappush(loads, (load + costs[number], replica))
    return tuple(tuple(replica) for replica in replicas)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
