"""The layout doctor's bytes are those that Megatron's buffers and optimizer really take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mmrl.doctor.layout_memory import rank_bytes
from tests.dist.launch import run_ranks


def bytes_of_a_rank(path: Path, dtype: str) -> tuple[int, int, int, int]:
    """Parameters, then bytes of weights, gradients and optimizer state after one step of one of two replicas."""
    from megatron_mmrl.config.model import ModelConfig
    from megatron_mmrl.config.optim import OptimConfig
    from megatron_mmrl.config.parallel import ParallelConfig
    from megatron_mmrl.models.registry import build_model
    from megatron_mmrl.parallel.state import initialize, shutdown
    from megatron_mmrl.trainer.optim import build_optimizer, wrap_data_parallel

    layout = ParallelConfig(data_parallel_size=2)
    initialize(layout, 0)
    model = ModelConfig(path=str(path), dtype=dtype)  # type: ignore[arg-type]
    wrapped = wrap_data_parallel(build_model(path, parallel=layout, model=model), layout)
    optimizer = build_optimizer(wrapped, OptimConfig(), layout, getattr(torch, dtype))
    optimizer.step()  # makes the moments
    (inner,) = optimizer.chained_optimizers
    state = [value for values in inner.optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    if dtype == "bfloat16":
        state += [master for group in inner.shard_fp32_from_float16_groups for master in group]
    parameters = [parameter for chunk in wrapped for parameter in chunk.parameters()]
    result = (
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        sum(buffer.grad_data.nbytes for chunk in wrapped for buffer in chunk.buffers),
        sum(tensor.nbytes for tensor in state),
    )
    shutdown()
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_buffers_and_optimizer(tmp_path: Path, dtype: str) -> None:
    from megatron_mmrl.models.tiny import make_tiny_checkpoint

    make_tiny_checkpoint(tmp_path)
    ranks = run_ranks(bytes_of_a_rank, 2, tmp_path, dtype)
    for parameters, weights, gradients, _ in ranks:
        expected = rank_bytes(parameters, parameters, dtype, optimizer_ranks=2)  # type: ignore[arg-type]
        assert weights == expected.weights
        assert gradients == pytest.approx(expected.gradients, rel=0.01)  # Megatron rounds buffers up
    # The last bucket's rounding makes one replica's share a little smaller.
    assert sum(rank[3] for rank in ranks) == pytest.approx(2 * expected.optimizer, rel=0.01)
