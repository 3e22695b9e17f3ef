"""Optimizer state that went to the host and came back trains on, to the bit; meanwhile its memory is free."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.config import Config
from tests.dist.launch import run_ranks
from tests.dist.policy_case import BASE, build, config_of, make_sequences


def train(config: Config, *, parked: bool) -> dict[str, object]:
    """Three updates, between which the optimizer state is away or not."""
    from megatron_mmrl.parallel.state import shutdown
    from megatron_mmrl.trainer.memory import gradient_buffers, optimizer_tensors

    policy, packer = build(config)
    policy.start_optimizer(config.optim, total_updates=4)
    batch = packer.pack(make_sequences(config)).batch
    went = []
    for _ in range(3):
        if parked:
            tensors = list(optimizer_tensors(policy.chunks, policy.optimizer))
            size = sum(tensor.nbytes for tensor in tensors)
            moved = policy.park()
            gradients = list(gradient_buffers(policy.chunks))
            assert all(tensor.untyped_storage().nbytes() == 0 for tensor in (*tensors, *gradients))
            went.append((moved, size))
            weights = {name: tensor.clone() for name, tensor in policy.weights()}  # those stay
            assert all(tensor.isfinite().all() for tensor in weights.values())
            with pytest.raises(RuntimeError, match="parked already"):
                policy.park()
            assert policy.onload() == moved
            assert policy.onload() == 0
        policy.update(batch, build_algorithm(config.algorithm).loss)
    weights = {name: tensor.float().numpy().copy() for name, tensor in policy.weights()}
    shutdown()
    return {"weights": weights, "went": went}


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.data_parallel_size=2", "model.dtype=bfloat16"),
        ("parallel.data_parallel_size=2",),
        ("parallel.tensor_model_parallel_size=2", "model.dtype=bfloat16", "parallel.use_distributed_optimizer=false"),
    ],
    ids=" ".join,
)
def test_training_goes_on_to_the_bit(model_path: Path, overrides: tuple[str, ...]) -> None:
    config = config_of(model_path, *BASE, "algorithm.kl_coef=0", *overrides)
    plain, parked = (run_ranks(train_parked if away else train_plain, 2, config) for away in (False, True))
    for ours, theirs in zip(parked, plain, strict=True):
        assert all(np.array_equal(ours["weights"][name], theirs["weights"][name]) for name in theirs["weights"])
        first, *later = ours["went"]
        assert all(moved >= size > 0 for moved, size in later)  # both moments, and with bfloat16 the float32 weights
        assert later[0][1] > first[1]  # before the first update there are no moments


def train_plain(config: Config) -> dict[str, object]:
    return train(config, parked=False)


def train_parked(config: Config) -> dict[str, object]:
    return train(config, parked=True)


def test_what_is_dropped_comes_back_as_zeros_and_what_is_kept_as_it_was() -> None:
    from megatron_mmrl.trainer.memory import Parking

    parking, base = Parking(), torch.arange(10.0)
    view, gradient = base[2:6], torch.ones(7)
    for _ in range(2):
        gradient.fill_(3)
        assert parking.park([view, base[:1]], [gradient[1:3]]) == 40  # one storage, once
        assert base.untyped_storage().nbytes() == gradient.untyped_storage().nbytes() == 0
        assert parking.restore() == 40
        assert view.tolist() == [2, 3, 4, 5]
        assert base.tolist() == list(range(10))
        assert gradient.tolist() == [0] * 7
