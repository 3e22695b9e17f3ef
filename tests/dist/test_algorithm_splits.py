"""No loss, nor a repetition penalty, depends on how sequences are spread over replicas, ranks and micro-batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.config import Config
from megatron_mmrl.types import UpdateStats
from tests.dist.launch import run_ranks
from tests.dist.policy_case import build, config_of, make_sequences
from tests.unit.loss_case import VARIANTS

BASE = ("optim.lr=1e-12", "optim.min_lr=0", "optim.schedule=constant", "optim.warmup_updates=0")


def all_variants(config: Config) -> dict[str, UpdateStats]:
    """Each variant's first update, of weights that hardly move; log-probs are near the policy's, so bounds are met."""
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config, banned=[3], repetition_penalty=1.3)
    policy.start_optimizer(config.optim, total_updates=len(VARIANTS))
    sequences = make_sequences(config)
    packed = packer.pack(sequences)
    own = packed.unpack(policy.logprobs(packed.batch))
    logprobs = {}
    for part in Collectives().all_gather(own if packer.speaks_for_replica else {}):
        logprobs.update(part)
    rng = np.random.default_rng(1)
    moved = [
        replace(
            each,
            old_logprobs=logprobs[i]
            + np.where(each.loss_mask, rng.normal(0, 0.3, len(each.ids)), 0).astype(np.float32),
            rollout_logprobs=logprobs[i] + np.where(each.loss_mask, rng.normal(0, 0.3), 0).astype(np.float32),
            ref_logprobs=logprobs[i] + np.where(each.loss_mask, 0.2, 0).astype(np.float32),
        )
        for i, each in enumerate(sequences)
    ]
    batch = packer.pack(moved).batch
    stats = {name: policy.update(batch, build_algorithm(variant).loss) for name, variant in VARIANTS.items()}
    shutdown()
    return stats


@pytest.fixture(scope="module")
def alone(model_path: Path) -> dict[str, UpdateStats]:
    return run_ranks(all_variants, 1, config_of(model_path, *BASE))[0]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ("trainer.micro_batch_sequences=2",)),
        (2, ("parallel.data_parallel_size=2", "trainer.micro_batch_sequences=1")),
        (2, ("parallel.tensor_model_parallel_size=2", "trainer.packing=false")),
        (2, ("parallel.context_parallel_size=2",)),
    ],
    ids=["micro-batches", "data", "tensor", "context"],
)
def test_losses_and_gradients_are_equal(
    alone: dict[str, UpdateStats], model_path: Path, ranks: int, overrides: tuple[str, ...]
) -> None:
    for stats in run_ranks(all_variants, ranks, config_of(model_path, *BASE, *overrides)):
        for name, ours in stats.items():
            assert ours.loss == pytest.approx(alone[name].loss, rel=1e-5, abs=2e-6), name
            assert ours.grad_norm == pytest.approx(alone[name].grad_norm, rel=1e-4), name
            assert ours.metrics == pytest.approx(alone[name].metrics, rel=1e-4, abs=2e-6), name


def test_the_variants_differ(alone: dict[str, UpdateStats]) -> None:
    """Otherwise the comparison above would compare one loss many times."""
    assert len({round(stats.grad_norm, 5) for stats in alone.values()}) >= len(VARIANTS) - 3
    assert alone["clip"].metrics["clip_fraction"] > 0
    assert 0 < alone["token mask"].metrics["mismatch/masked"] < 1
    assert 0 < alone["sequence mask"].metrics["mismatch/masked"] < 1
