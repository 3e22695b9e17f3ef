"""One optimizer step does not depend on how its sequences are spread over replicas, micro-batches and ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.config import Config, load_config
from megatron_mmrl.types import TrainSequence
from tests.dist.launch import RankFailedError, run_ranks

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
LENGTHS = ((9, 4), (7, 6), (12, 3), (5, 5), (8, 1), (6, 7), (10, 4), (4, 2))  # prompt and response tokens


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_mmrl.models.tiny import make_tiny_checkpoint

    path = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(path)
    return path


def config_of(model_path: Path, *overrides: str) -> Config:
    return load_config(CONFIG, [f"model.path={model_path}", "parallel.tensor_model_parallel_size=1", *overrides])


def make_sequences(config: Config) -> list[TrainSequence]:
    """Every other sequence has an image (4 tokens of a 4 x 4 grid); log-probs and advantages are arbitrary."""
    from megatron_mmrl.models.registry import model_facts

    facts = model_facts(config.model.path)
    rng = np.random.default_rng(0)
    sequences = []
    for number, (prompt, response) in enumerate(LENGTHS):
        ids = rng.integers(0, 200, prompt + response)
        grid = np.zeros((0, 3), np.int64)
        if number % 2 and prompt >= 5:
            ids[1:5] = facts.image_token_id
            grid = np.array([[1, 4, 4]])
        mask = np.arange(prompt + response) >= prompt
        sequences.append(
            TrainSequence(
                ids=ids,
                loss_mask=mask,
                advantages=np.where(mask, rng.normal(), 0).astype(np.float32),
                rollout_logprobs=np.where(mask, rng.normal(-5, 0.1, len(ids)), 0).astype(np.float32),
                pixel_values=rng.normal(size=(int(grid.prod(axis=1).sum()), 1176)).astype(np.float32),
                image_grid_thw=grid,
            )
        )
    return sequences


def build(config: Config):
    """This rank's policy and packer, as the composition root makes them."""
    from megatron_mmrl.models.registry import model_facts, position_ids_function
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.parallel.state import initialize
    from megatron_mmrl.trainer.forward import TokenDistribution
    from megatron_mmrl.trainer.packing import InputRules, Packer
    from megatron_mmrl.trainer.policy import MegatronPolicy

    layout = initialize(config.parallel, seed=0)
    exchange = Collectives()
    facts = model_facts(config.model.path)
    distribution = TokenDistribution(
        temperature=0.7, banned=torch.tensor([facts.image_token_id]), vocab_size=facts.vocab_size, chunk_tokens=5
    )
    at = layout.coordinates(exchange.rank)
    packer = Packer(
        trainer=config.trainer,
        num_replicas=layout.data,
        replica=at.data,
        multiple_of=layout.tensor,
        rules=InputRules(
            position_ids=position_ids_function(facts), pad_id=0, image_token_id=facts.image_token_id, merge_size=2
        ),
        speaks_for_replica=at.tensor == at.pipeline == 0,
    )
    return MegatronPolicy(config, distribution, exchange), packer


def two_updates(config: Config) -> dict[str, object]:
    """Log-probs before, statistics of two updates, and the weights after them."""
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    policy.start_optimizer(config.optim, total_updates=4)
    sequences = make_sequences(config)
    packed = packer.pack(sequences)
    logprobs = packed.unpack(policy.logprobs(packed.batch))
    sequences = [replace(seq, ref_logprobs=seq.rollout_logprobs - 0.1) for seq in sequences]
    batch = packer.pack(sequences).batch
    stats = [policy.update(batch, build_algorithm(config.algorithm).loss) for _ in range(2)]
    weights = {name: tensor.numpy().copy() for name, tensor in policy.weights()}
    shutdown()
    return {"logprobs": logprobs, "stats": stats, "weights": weights, "microbatches": len(batch.microbatches)}


# A large eps keeps Adam's update proportional to small gradients: it would blow their rounding up to lr otherwise.
BASE = ("algorithm.kl_coef=0.1", "optim.lr=1e-2", "optim.eps=1e-2", "optim.schedule=constant",
        "optim.warmup_updates=0")  # fmt: skip


@pytest.fixture(scope="module", params=["token_mean", "seq_mean"])
def reference(request: pytest.FixtureRequest, model_path: Path) -> tuple[str, dict]:
    aggregation = f"algorithm.aggregation={request.param}"
    return aggregation, run_ranks(two_updates, 1, config_of(model_path, *BASE, aggregation))[0]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ("trainer.micro_batch_sequences=2",)),
        (1, ("trainer.packing=false", "trainer.micro_batch_sequences=3")),
        (2, ("parallel.data_parallel_size=2",)),
        (2, ("parallel.data_parallel_size=2", "trainer.micro_batch_sequences=1", "parallel.overlap_grad_reduce=true",
             "parallel.overlap_param_gather=true")),
        (2, ("parallel.tensor_model_parallel_size=2", "trainer.packing=false")),
        (2, ("parallel.pipeline_model_parallel_size=2", "trainer.micro_batch_sequences=2")),
        (4, ("parallel.tensor_model_parallel_size=2", "parallel.data_parallel_size=2")),
    ],
    ids=lambda value: "-".join(part.split(".")[-1] for part in value) if isinstance(value, tuple) else f"{value}ranks",
)  # fmt: skip
def test_updates_are_equal(
    reference: tuple[str, dict], model_path: Path, ranks: int, overrides: tuple[str, ...]
) -> None:
    aggregation, expected = reference
    results = run_ranks(two_updates, ranks, config_of(model_path, *BASE, aggregation, *overrides))
    merged: dict[int, np.ndarray] = {}
    for result in results:
        merged.update(result["logprobs"])
        for ours, theirs in zip(result["stats"], expected["stats"], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-6)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-5)
            assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-4, abs=1e-6)
        for name, tensor in result["weights"].items():
            np.testing.assert_allclose(tensor, expected["weights"][name], atol=2e-6, err_msg=name)
    assert merged.keys() == expected["logprobs"].keys()
    for index, values in merged.items():
        np.testing.assert_allclose(values, expected["logprobs"][index], atol=1e-5)


def nan_update(config: Config) -> bool:
    """Whether the weights are untouched after a loss that is not a number."""
    from megatron_mmrl.parallel.state import shutdown
    from megatron_mmrl.trainer.policy import NonFiniteError

    policy, packer = build(config)
    before = {name: tensor.numpy().copy() for name, tensor in policy.weights()}
    sequences = make_sequences(config)
    poisoned = replace(sequences[0], advantages=np.where(sequences[0].loss_mask, np.nan, 0).astype(np.float32))
    with pytest.raises(NonFiniteError, match="no rank has stepped"):
        policy.update(packer.pack([poisoned, *sequences[1:]]).batch, build_algorithm(config.algorithm).loss)
    untouched = all((tensor.numpy() == before[name]).all() for name, tensor in policy.weights())
    shutdown()
    return untouched


def test_no_rank_steps_on_nan(model_path: Path) -> None:
    assert run_ranks(nan_update, 2, config_of(model_path, "parallel.data_parallel_size=2")) == [True, True]


def test_world_size_must_fit(model_path: Path) -> None:
    with pytest.raises(RankFailedError, match="WORLD_SIZE=2 .* need 1"):
        run_ranks(two_updates, 2, config_of(model_path))
