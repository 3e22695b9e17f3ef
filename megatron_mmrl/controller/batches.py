"""From a step's sequences to this replica's batches, and back: old and reference log-probs by sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.trainer.packing import split_minibatches
from megatron_mmrl.types import TrainBatch, TrainSequence

if TYPE_CHECKING:
    from megatron_mmrl.controller.parts import Parts


def minibatches(parts: Parts, sequences: Sequence[TrainSequence], *, whole: bool = False) -> Iterator[TrainBatch]:
    """This replica's batch of each optimizer update; ``whole``: all sequences in one update."""
    size = None if whole else parts.config.trainer.mini_batch_sequences
    for chunk in split_minibatches(sequences, size):
        yield parts.packer.pack(chunk).batch


def with_logprobs(parts: Parts, sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
    """Attach what the loss needs and the update cannot know: log pi_old where more than one update follows (with one,
    pi_old is the policy itself) or the KL is taken off the rewards, and log pi_ref where the KL counts."""
    algorithm, mini_batch = parts.config.algorithm, parts.config.trainer.mini_batch_sequences
    several_updates = algorithm.num_iterations > 1 or (mini_batch is not None and mini_batch < len(sequences))
    in_reward = algorithm.kl_coef > 0 and algorithm.kl_in == "reward"
    result = list(sequences)
    if not sequences:
        return result
    if several_updates or in_reward:
        old = _logprobs(parts, result, parts.policy.logprobs)
        result = [replace(seq, old_logprobs=values) for seq, values in zip(result, old, strict=True)]
    if algorithm.kl_coef > 0:
        ref = _logprobs(parts, result, parts.policy.reference_logprobs)
        result = [replace(seq, ref_logprobs=values) for seq, values in zip(result, ref, strict=True)]
    return result


def _logprobs(
    parts: Parts,
    sequences: Sequence[TrainSequence],
    forward: Callable[[TrainBatch], list[NDArray[np.float32]]],
) -> list[NDArray[np.float32]]:
    """Per-sequence [L] arrays on every rank: each replica computes its share, then all exchange."""
    packed = parts.packer.pack(sequences)
    mine = packed.unpack(forward(packed.batch))  # {sequence index: [L]}
    merged: dict[int, NDArray[np.float32]] = {}
    for share in parts.exchange.all_gather(mine if parts.packer.speaks_for_replica else {}):
        merged.update(share)
    return [merged[index] for index in range(len(sequences))]
