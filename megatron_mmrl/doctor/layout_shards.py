"""A rank's shards without the rank and without memory: the trainer's own model, built on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.doctor.coverage import RankShards, Shard
from megatron_mmrl.doctor.layout_trace import trace
from megatron_mmrl.models.parts import freeze_parameters
from megatron_mmrl.models.registry import build_model
from megatron_mmrl.parallel.state import initialize_alone, shutdown

_META = torch.device("meta")


def build_rank(
    model: ModelConfig, parallel: ParallelConfig, rank: int, shapes: Mapping[str, tuple[int, ...]]
) -> RankShards:
    """What ``rank`` holds, at the place in the groups where Megatron puts it.

    The process must not have joined a world: it is that rank, alone, while this runs.

    Args:
        model: its path is a directory with a ``config.json``; no weights are read.
        shapes: of every tensor of the checkpoint, by its original name.

    Raises:
        ValueError: the weight table names a tensor that the checkpoint has not, the model cannot be cut so, or
            ``model.freeze`` matches nothing.
    """
    from megatron.core import parallel_state

    with _alone(parallel, rank), _OnMeta(), _META:
        tensor = parallel_state.get_tensor_model_parallel_rank()
        pipeline = parallel_state.get_pipeline_model_parallel_rank()
        chunks = build_model(model.path, parallel=parallel, model=model)
        if model.freeze:
            freeze_parameters(chunks, model.freeze, list(shapes))
    size = parallel.tensor_model_parallel_size
    return RankShards(
        tensor=tensor,
        pipeline=pipeline,
        chunks=tuple(tuple(_shards(chunk, shapes, tensor, size)) for chunk in chunks),
    )


def _shards(chunk: Any, shapes: Mapping[str, tuple[int, ...]], rank: int, size: int) -> Iterator[Shard]:
    table = chunk.weight_table()
    for name, parameter in chunk.named_parameters():
        role, pieces, padding = trace(table[name], shapes, rank, size)
        yield Shard(
            parameter=name,
            shape=tuple(parameter.shape),
            pieces=pieces,
            padding=padding,
            role=role,
            trained=parameter.requires_grad,
        )


@contextmanager
def _alone(parallel: ParallelConfig, rank: int) -> Iterator[None]:
    initialize_alone(parallel, rank)
    try:
        yield
    finally:
        shutdown()


class _OnMeta(TorchFunctionMode):
    """Whatever device a module asks for, its tensors are meta tensors: shapes without memory."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.cuda, Tensor.cpu):
            return args[0]
        if func is Tensor.to:
            args = [_META if isinstance(value, str | torch.device) else value for value in args]
        moved = {"device": _META} if kwargs and kwargs.get("device") is not None else {}
        return func(*args, **{**(kwargs or {}), **moved})
