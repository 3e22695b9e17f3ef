"""Megatron's shards -> full Hugging Face tensors, the plain way: gather, merge, broadcast, one weight at a time.

Slow and obviously right; what a faster path is tested against, and how checkpoints are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_mmrl import pulse
from megatron_mmrl.models.hf_io import NameScheme, to_scheme
from megatron_mmrl.parallel.device import device
from megatron_mmrl.parallel.sharding import Replicated, WeightEntry

if TYPE_CHECKING:
    from megatron_mmrl.models.qwen2_5_vl.model import Qwen25VL


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meta:
    """What a rank of another stage has to know to receive a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@torch.no_grad()
def export_hf(chunks: Sequence[Qwen25VL], *, scheme: NameScheme = "original") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model under its Hugging Face name, full, on every rank, in the same order.

    Collective: every rank must exhaust the iterator. With one rank per group a tensor may share the parameter's
    memory, so use or copy it before the next optimizer step.

    Args:
        chunks: what ``build_model`` returned (parameters are shared with any wrapper around them).
        scheme: naming of the result.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    own_stage = parallel_state.get_pipeline_model_parallel_rank()
    for stage, metas in enumerate(_metas_of_stages(chunks, pipeline)):
        own = _merged(chunks) if stage == own_stage else None
        for meta in metas:
            pulse.beat()
            tensor = next(own)[1] if own else torch.empty(meta.shape, dtype=meta.dtype, device=device())
            if pipeline.size() > 1:
                tensor = tensor.contiguous()
                dist.broadcast(tensor, group=pipeline, group_src=stage)
            yield to_scheme(meta.name, scheme), tensor


def _metas_of_stages(chunks: Sequence[Qwen25VL], pipeline: dist.ProcessGroup) -> list[list[_Meta]]:
    own = [
        _Meta(name=name, shape=tuple(shape), dtype=parameter.dtype)
        for entry, parameter in _exported(chunks)
        for name, shape in zip(entry.hf_names, _full_shapes(entry, parameter), strict=True)
    ]
    gathered: list[list[_Meta]] = [[] for _ in range(pipeline.size())]
    dist.all_gather_object(gathered, own, group=pipeline)
    return gathered


def _full_shapes(entry: WeightEntry, parameter: Tensor) -> list[torch.Size]:
    shards = [torch.empty_like(parameter, device="meta")] * parallel_state.get_tensor_model_parallel_world_size()
    return [tensor.shape for tensor in entry.rule.merge(shards)]


def _merged(chunks: Sequence[Qwen25VL]) -> Iterator[tuple[str, Tensor]]:
    """Full tensors of this stage."""
    for entry, parameter in _exported(chunks):
        shards = [parameter.data] if isinstance(entry.rule, Replicated) else _gather(parameter.data)
        yield from zip(entry.hf_names, entry.rule.merge(shards), strict=True)


def _exported(chunks: Sequence[Qwen25VL]) -> Iterator[tuple[WeightEntry, Tensor]]:
    for chunk in chunks:
        table = chunk.weight_table()
        for name, parameter in chunk.named_parameters():
            if table[name].exported:
                yield table[name], parameter


def _gather(shard: Tensor) -> list[Tensor]:
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards
