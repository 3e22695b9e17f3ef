"""Gradient clipping moves the weights as far as it says; the reference model moves only when it is told to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.config import Config
from tests.dist.launch import run_ranks
from tests.dist.policy_case import build, config_of, make_sequences

LR, EPS = 10.0, 1000.0  # Adam's first step is lr x g / (|g| + eps): 0.01 x g to a thousandth


def clip_and_refresh(config: Config, directory: Path) -> dict[str, list]:
    """How far updates move at two clips, and log-probs of policy and reference around a refresh."""
    from megatron_mmrl.checkpoint.state import load_reference, save_reference
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    batch = packer.pack(make_sequences(config)).batch
    loss = build_algorithm(config.algorithm).loss
    policy.keep_reference(Path(config.model.path))
    moves = []
    for clip in (0.0, 0.1):
        before = {name: tensor.numpy().astype(np.float64) for name, tensor in policy.weights()}
        policy.start_optimizer(replace(config.optim, clip_grad=clip), total_updates=1)
        norm = policy.update(batch, loss).grad_norm
        squares = sum(((tensor.numpy() - before[name]) ** 2).sum() for name, tensor in policy.weights())
        moves.append((norm, float(np.sqrt(squares))))

    def distance() -> float:
        pairs = zip(policy.logprobs(batch), policy.reference_logprobs(batch), strict=True)
        return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)

    distances = [distance()]
    policy.refresh_reference()
    distances.append(distance())
    save_reference(directory, policy.reference)
    torch.distributed.barrier()
    policy.update(batch, loss)
    distances.append(distance())
    kept = [values.copy() for values in policy.reference_logprobs(batch)]
    policy.refresh_reference()
    load_reference(directory, policy.reference)
    same = all((old == new).all() for old, new in zip(kept, policy.reference_logprobs(batch), strict=True))
    shutdown()
    return {"moves": moves, "distances": distances, "restored": same}


def test_clipping_and_reference(model_path: Path, tmp_path: Path) -> None:
    config = config_of(
        model_path,
        *(f"optim.{key}" for key in (f"lr={LR}", f"eps={EPS}", "schedule=constant", "warmup_updates=0")),
        "parallel.data_parallel_size=2",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    )
    for result in run_ranks(clip_and_refresh, 2, config, tmp_path):
        (free_norm, free_move), (clipped_norm, clipped_move) = result["moves"]
        assert min(free_norm, clipped_norm) > 0.1
        assert free_move == pytest.approx(LR / EPS * free_norm, rel=5e-3)
        assert clipped_move == pytest.approx(LR / EPS * 0.1, rel=5e-3)
        before, refreshed, after = result["distances"]
        assert refreshed == 0 < min(before, after)
        assert result["restored"]


def without_reference(config: Config) -> str:
    from megatron_mmrl.parallel.state import shutdown

    policy, _ = build(config)
    with pytest.raises(RuntimeError) as error:
        policy.refresh_reference()
    assert not policy.reference
    shutdown()
    return str(error.value)


def test_a_reference_that_is_not_kept_cannot_move(model_path: Path) -> None:
    (message,) = run_ranks(without_reference, 1, config_of(model_path))
    assert "no reference model is kept" in message
