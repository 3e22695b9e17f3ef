"""Bytes of host memory that a node needs: parked optimizer state, caches, processes, and what a checkpoint writes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mmrl.config import Config

GIB = 1 << 30
_RANK_BYTES = 4 * GIB  # assumed: a trainer process with torch, Megatron and CUDA's libraries
_ENGINE_BYTES = 4 * GIB  # assumed: a scheduler process of SGLang
_ENGINE_MAIN_BYTES = 2 * GIB  # assumed: an engine's launcher, tokenizer and image workers
_REWARD_BYTES = GIB // 2  # assumed: a worker with math_verify


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBytes:
    """Of one node."""

    optimizer: int
    """Pinned, and kept for the whole run: what leaves the GPUs while the engines have them."""
    caches: int
    """Processed prompts with their pixels, and features of images under a frozen tower."""
    checkpoint: int
    """The tensors that the ranks have on the host at once while they write."""
    processes: int

    @property
    def total(self) -> int:
        return self.optimizer + self.caches + self.checkpoint + self.processes


def host_bytes(config: Config, *, ranks: int, engines: int, optimizer: int, largest: int) -> HostBytes:
    """Of a node with so many trainer ranks and engines.

    Args:
        optimizer: bytes of a rank's optimizer state.
        largest: bytes of a rank's largest tensor in float32: ``checkpoint/tensors.py`` writes one after the other.
    """
    data, model = config.data.cache_bytes, config.model
    keeps_features = "vision" in model.freeze
    features = model.image_cache_bytes * (keeps_features + (config.algorithm.kl_coef > 0))
    engine_ranks = engines * config.rollout.tensor_parallel_size
    return HostBytes(
        optimizer=ranks * optimizer,
        caches=ranks * (data + features),
        checkpoint=ranks * largest,
        processes=ranks * (_RANK_BYTES + config.reward.num_workers * _REWARD_BYTES)
        + engine_ranks * _ENGINE_BYTES
        + engines * _ENGINE_MAIN_BYTES,
    )
