"""What one rank of a real policy on the CPU takes, by part: the other side of the estimate in ``benchmarks/memory.py``.

Weights, gradients and optimizer state are the bytes of the real tensors. Activations are counted by watching every
tensor that torch makes during forward and backward passes (``TorchDispatchMode``), until the last one that uses its
memory is gone; what existed before does not count.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mmrl.config import Config
from megatron_mmrl.types import TrainSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A layout, and the sequences of one update."""

    name: str
    overrides: Sequence[str]
    lengths: Sequence[int]
    """Tokens of each sequence; the second half of each is the response."""
    image_side: int = 8
    """Patches of the side of each sequence's image; 0: no images."""

    @property
    def world_size(self) -> int:
        """Ranks that it takes."""
        sizes = [text.split("=") for text in self.overrides if "_parallel_size=" in text and "virtual" not in text]
        return int(np.prod([int(size) for _, size in sizes]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Bytes of one rank, and what it had to do."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    """At the peak of an update's forward and backward passes."""
    parked: int
    """That went to the host when the engine got the device."""
    tokens: int
    loss_tokens: int
    microbatches: int
    patches: int


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made while this is active and still exist, and the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in _all_tensors()}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes or not storage.nbytes():
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def measure(config: Config, case: Case) -> Measured:
    """One rank's numbers; to be called on every rank of the case's layout."""
    from megatron_mmrl.algorithms.registry import build_algorithm
    from megatron_mmrl.build import packer_for
    from megatron_mmrl.models.registry import model_facts
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.parallel.state import initialize, shutdown
    from megatron_mmrl.trainer.forward import TokenDistribution
    from megatron_mmrl.trainer.memory import gradient_buffers, optimizer_tensors
    from megatron_mmrl.trainer.policy import MegatronPolicy

    facts, layout = model_facts(config.model.path), initialize(config.parallel, seed=0)
    exchange = Collectives()
    distribution = TokenDistribution(
        temperature=1.0,
        banned=torch.tensor([facts.image_token_id]),
        vocab_size=facts.vocab_size,
        chunk_tokens=config.trainer.logprob_chunk_tokens,
    )
    policy = MegatronPolicy(config, distribution, exchange)
    policy.start_optimizer(config.optim, total_updates=4)
    packed = packer_for(config, layout, pad_id=0, rank=exchange.rank).pack(sequences(case, facts.image_token_id))
    if config.algorithm.kl_coef > 0:
        policy.keep_reference(Path(config.model.path))
    loss = build_algorithm(config.algorithm, max_response_tokens=config.rollout.max_response_tokens).loss
    batch = packed.batch
    if config.algorithm.kl_coef > 0:
        zeros = np.zeros(len(batch.microbatches[0].input_ids), np.float32)
        batch = replace(batch, microbatches=tuple(replace(micro, ref_logprobs=zeros) for micro in batch.microbatches))
    policy.update(batch, loss)  # makes Adam's moments
    with LiveBytes() as watched:
        policy.update(batch, loss)
    own = _bytes_of(parameter for chunk in policy.chunks for parameter in chunk.parameters())
    first = batch.microbatches[0]
    result = Measured(
        weights=own,
        gradients=_bytes_of(gradient_buffers(policy.chunks)),
        # A float32 model is its own master copy: what the optimizer has besides are the moments.
        optimizer=sum(tensor.nbytes for tensor in optimizer_tensors(policy.chunks, policy.optimizer)),
        reference=_bytes_of(parameter for chunk in policy.reference for parameter in chunk.parameters()),
        activations=watched.peak,
        parked=policy.park(),
        tokens=len(first.input_ids),
        loss_tokens=max(int(micro.loss_mask.sum()) for micro in batch.microbatches),
        microbatches=len(batch.microbatches),
        patches=max(int(micro.image_grid_thw.prod(axis=1).sum()) for micro in batch.microbatches),
    )
    shutdown()
    return result


def sequences(case: Case, image_token_id: int) -> list[TrainSequence]:
    """Random tokens, each sequence with an image of its own at its begin."""
    rng = np.random.default_rng(0)
    made = []
    for length in case.lengths:
        ids = rng.integers(0, 200, length)
        patches = case.image_side**2
        ids[1 : 1 + patches // 4] = image_token_id
        mask = np.arange(length) >= length // 2
        made.append(
            TrainSequence(
                ids=ids,
                loss_mask=mask,
                advantages=np.where(mask, rng.normal(size=length), 0).astype(np.float32),
                rollout_logprobs=np.where(mask, -5.0, 0).astype(np.float32),
                pixel_values=rng.normal(size=(patches, 1176)).astype(np.float32),
                image_grid_thw=np.array(
                    [[1, case.image_side, case.image_side]] if patches else np.zeros((0, 3)), np.int64
                ),
            )
        )
    return made


def _bytes_of(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _all_tensors() -> list[torch.Tensor]:
    return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
