"""From sequences to this replica's micro-batches, and per-token values from micro-batches back to sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.config.trainer import TrainerConfig
from megatron_mmrl.trainer.plan import Multiples, Plan, plan_microbatches
from megatron_mmrl.types import MicroBatch, TrainBatch, TrainSequence

PositionIds = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRules:
    """What building needs to know of the model. ``position_ids(ids [L], grid [I, 3]) -> [3, L]`` (mrope)."""

    position_ids: PositionIds
    pad_id: int
    image_token_id: int
    merge_size: int  # merge_size^2 patches are one image token

    def __post_init__(self) -> None:
        if self.pad_id == self.image_token_id:
            raise ValueError(f"pad_id={self.pad_id} is the image token: padding would be read as images")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One update's batch of this replica, and the way back to its sequences."""

    plan: Plan
    replica: int
    batch: TrainBatch

    def unpack(self, values: Sequence[NDArray[np.float32]]) -> dict[int, NDArray[np.float32]]:
        """Per-token values f32[T] of the micro-batches, back on this replica's sequences: index -> f32[L]."""
        return unpack(values, self.plan, self.replica)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packer:
    """Packs the same sequences on every rank, for the rank's own replica."""

    trainer: TrainerConfig
    num_replicas: int
    replica: int
    multiples: Multiples  # of tokens, slots and micro-batches, by the parallel sizes
    rules: InputRules
    speaks_for_replica: bool  # true on one rank of each replica: the one whose values the others take

    def pack(self, sequences: Sequence[TrainSequence]) -> Packed:
        """Plan and build. Raises ValueError: see ``plan_microbatches`` and ``build_microbatch``."""
        plan = plan_microbatches(
            [len(sequence.ids) for sequence in sequences],
            num_replicas=self.num_replicas,
            max_tokens=self.trainer.micro_batch_tokens,
            max_sequences=self.trainer.micro_batch_sequences,
            packing=self.trainer.packing,
            multiples=self.multiples,
        )
        batch = build_batch(sequences, plan, self.replica, self.rules)
        return Packed(plan=plan, replica=self.replica, batch=batch)


def split_minibatches(
    items: Sequence[Item], mini_batch_sequences: int | None, rng: np.random.Generator | None = None
) -> list[list[Item]]:
    """Cut into the fewest parts of at most ``mini_batch_sequences``, sizes differing by at most one.

    The order is kept, or drawn from ``rng``. ``None``: one part.
    """
    if not items:
        return []
    num_parts = 1 if mini_batch_sequences is None else -(-len(items) // mini_batch_sequences)
    order = np.arange(len(items)) if rng is None else rng.permutation(len(items))
    return [[items[index] for index in part] for part in np.array_split(order, num_parts)]


def build_batch(sequences: Sequence[TrainSequence], plan: Plan, replica: int, rules: InputRules) -> TrainBatch:
    """The micro-batches of one replica, with the denominators of all of them.

    ``sequences`` are the ones the plan was made for, on every replica, so the denominators need no communication.
    """
    lengths = tuple(len(sequence.ids) for sequence in sequences)
    if lengths != plan.lengths:
        raise ValueError(
            f"the plan was made for {len(plan.lengths)} sequences of {sum(plan.lengths)} tokens, "
            f"got {len(lengths)} of {sum(lengths)} tokens"
        )
    return TrainBatch(
        microbatches=tuple(build_microbatch(sequences, indices, plan, rules) for indices in plan.microbatches[replica]),
        num_loss_tokens=sum(int(sequence.loss_mask.sum()) for sequence in sequences),
        num_sequences=sum(bool(sequence.loss_mask.any()) for sequence in sequences),
    )


def build_microbatch(
    sequences: Sequence[TrainSequence], indices: Sequence[int], plan: Plan, rules: InputRules
) -> MicroBatch:
    """Lay the chosen sequences out as one micro-batch of the plan's shape (see ``MicroBatch`` for both layouts).

    Padding holds ``pad_id`` and is never in the loss mask. Padded rows without a sequence are all padding.

    Raises:
        ValueError: image tokens, grids and pixels of a sequence disagree, or some of the sequences carry old or
            reference log-probs and others do not.
    """
    chosen = [sequences[index] for index in indices]
    for index, sequence in zip(indices, chosen, strict=True):
        _check_images(index, sequence, rules)
    bounds, starts = _layout(plan, indices)

    def spread(name: str, fill: float, dtype: type) -> NDArray:
        out: NDArray = np.full(plan.num_tokens, fill, dtype)
        for start, sequence in zip(starts, chosen, strict=True):
            out[start : start + len(sequence.ids)] = getattr(sequence, name)
        return out

    def spread_optional(name: str) -> NDArray[np.float32] | None:
        present = [getattr(sequence, name) is not None for sequence in sequences]
        if any(present) and not all(present):
            raise ValueError(f"{sum(present)} of {len(sequences)} sequences carry {name}; give it to all or to none")
        return spread(name, 0.0, np.float32) if any(present) else None

    return MicroBatch(
        input_ids=spread("ids", rules.pad_id, np.int64),
        position_ids=_position_ids(chosen, starts, bounds, rules.position_ids),
        cu_seqlens=bounds.astype(np.int32),
        num_rows=plan.num_rows,
        loss_mask=spread("loss_mask", False, np.bool_),
        advantages=spread("advantages", 0.0, np.float32),
        rollout_logprobs=spread("rollout_logprobs", 0.0, np.float32),
        old_logprobs=spread_optional("old_logprobs"),
        ref_logprobs=spread_optional("ref_logprobs"),
        pixel_values=_stack([sequence.pixel_values for sequence in chosen], sequences[0].pixel_values),
        image_grid_thw=_stack([sequence.image_grid_thw for sequence in chosen], sequences[0].image_grid_thw),
    )


def unpack(values: Sequence[NDArray[np.float32]], plan: Plan, replica: int) -> dict[int, NDArray[np.float32]]:
    """Per-token values f32[T] of one replica's micro-batches, back on its sequences: index -> f32[L]."""
    planned = plan.microbatches[replica]
    if len(values) != len(planned):
        raise ValueError(f"{len(values)} arrays of values but replica {replica} has {len(planned)} micro-batches")
    result = {}
    for array, indices in zip(values, planned, strict=True):
        if array.shape != (plan.num_tokens,):
            raise ValueError(f"values have shape {array.shape} but micro-batches have {plan.num_tokens} tokens")
        _, starts = _layout(plan, indices)
        for index, start in zip(indices, starts, strict=True):
            result[index] = array[start : start + plan.lengths[index]]
    return result


def _layout(plan: Plan, indices: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bounds of slots or rows i64[S + 1], dummies included, and where each of the real sequences starts."""
    if plan.num_rows is not None:
        bounds = np.arange(plan.num_rows + 1) * (plan.num_tokens // plan.num_rows)
    else:
        bounds = np.concatenate([[0], np.cumsum(plan.slots(indices), dtype=np.int64)]).astype(np.int64)
        if bounds[-1] < plan.num_tokens:
            bounds = np.append(bounds, plan.num_tokens)
    return bounds, bounds[: len(indices)]


def _position_ids(
    chosen: Sequence[TrainSequence], starts: NDArray[np.int64], bounds: NDArray[np.int64], position_ids: PositionIds
) -> NDArray[np.int64]:
    """mrope rows i64[3, T]; padding just counts on from the nearest bound before it, nothing real ever sees it."""
    counting = np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))
    out = np.tile(counting, (3, 1))
    for start, sequence in zip(starts, chosen, strict=True):
        out[:, start : start + len(sequence.ids)] = position_ids(sequence.ids, sequence.image_grid_thw)
    return out


def _stack(arrays: Sequence[NDArray], like: NDArray) -> NDArray:
    """Concatenated along the first axis; of no arrays, an empty one shaped and typed like ``like``."""
    return np.concatenate(arrays) if arrays else like[:0]


def _check_images(index: int, sequence: TrainSequence, rules: InputRules) -> None:
    """Refuse a sequence whose image tokens, grids and pixels do not belong together."""
    patches = int(sequence.image_grid_thw.prod(axis=1).sum())
    expected = patches // rules.merge_size**2
    found = int((sequence.ids == rules.image_token_id).sum())
    if found != expected:
        raise ValueError(
            f"sequence {index} has {found} image tokens but its grids {sequence.image_grid_thw.tolist()} make "
            f"{expected}; a response may have drawn the image token {rules.image_token_id}, which must be banned"
        )
    if len(sequence.pixel_values) != patches:
        raise ValueError(
            f"sequence {index} has {len(sequence.pixel_values)} rows of pixels but its grids "
            f"{sequence.image_grid_thw.tolist()} make {patches}"
        )
