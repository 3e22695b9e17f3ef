"""One optimizer step does not depend on how its sequences are spread over replicas, micro-batches and ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.config import Config, load_config
from megatron_mmrl.types import TrainSequence, UpdateStats
from tests.dist.launch import RankFailedError, run_ranks
from tests.dist.policy_case import BASE, build, config_of, make_sequences


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
        (2, ("parallel.context_parallel_size=2", "trainer.micro_batch_sequences=3")),
        (2, ("parallel.context_parallel_size=2", "trainer.packing=false", "parallel.overlap_grad_reduce=true")),
        (2, ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2",
             "trainer.micro_batch_sequences=3")),
        (4, ("parallel.context_parallel_size=2", "parallel.tensor_model_parallel_size=2")),
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


def update_of_three(config: Config) -> UpdateStats:
    """An update of three sequences."""
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    batch = packer.pack(make_sequences(config)[:3]).batch
    stats = policy.update(batch, build_algorithm(config.algorithm).loss)
    shutdown()
    return stats


def test_a_micro_batch_of_nothing_but_padding_adds_nothing(model_path: Path) -> None:
    """Two stages of two chunks take micro-batches by the pair: three sequences, one each, leave one without any."""
    base = (*BASE, "algorithm.kl_coef=0", "trainer.micro_batch_sequences=1")
    (alone,) = run_ranks(update_of_three, 1, config_of(model_path, *base))
    sizes = ("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "context_parallel_size")
    config = config_of(model_path, *base, *(f"parallel.{size}=2" for size in sizes))
    for stats in run_ranks(update_of_three, 4, config):
        assert stats.loss == pytest.approx(alone.loss, rel=1e-5, abs=1e-6)
        assert stats.grad_norm == pytest.approx(alone.grad_norm, rel=2e-5)
        assert stats.metrics == pytest.approx(alone.metrics, rel=1e-4, abs=1e-6)


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
    with pytest.raises(RankFailedError, match=r"WORLD_SIZE=2 .* need 1"):
        run_ranks(two_updates, 2, config_of(model_path))


def three_updates(config: Config) -> dict[str, object]:
    """Gradient norms, weights under their names, and this rank's own copies of the embedding, after three updates."""
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    policy.start_optimizer(config.optim, total_updates=3)
    batch = packer.pack(make_sequences(config)).batch
    stats = [policy.update(batch, build_algorithm(config.algorithm).loss) for _ in range(3)]
    copies = [chunk.module.shared_embedding_or_output_weight() for chunk in policy.chunks if holds_embedding(chunk)]
    result = {
        "grad_norms": [step.grad_norm for step in stats],
        "weights": [(name, tensor.numpy().copy()) for name, tensor in policy.weights()],
        "copies": [copy.detach().numpy().copy() for copy in copies],
    }
    shutdown()
    return result


def holds_embedding(chunk: torch.nn.Module) -> bool:
    return chunk.module.pre_process or chunk.module.post_process


def test_tied_embeddings_stay_one_weight(tmp_path: Path) -> None:
    """On two stages there are two copies: equal after updates, exported once, counted once in the gradient norm."""
    from megatron_mmrl.models.tiny import make_tiny_checkpoint

    make_tiny_checkpoint(tmp_path, tied=True)
    base = (*BASE, "algorithm.kl_coef=0", "trainer.micro_batch_sequences=2")
    (alone,) = run_ranks(three_updates, 1, config_of(tmp_path, *base))
    pipeline = ("parallel.pipeline_model_parallel_size=2",)
    for overrides in (pipeline, (*pipeline, "parallel.virtual_pipeline_model_parallel_size=2")):
        stages = run_ranks(three_updates, 2, config_of(tmp_path, *base, *overrides))
        first, last = [copy for stage in stages for copy in stage["copies"]]
        assert (first == last).all()
        for stage in stages:
            assert stage["grad_norms"] == pytest.approx(alone["grad_norms"], rel=2e-5)
            names = [name for name, _ in stage["weights"]]
            assert sorted(names) == sorted(name for name, _ in alone["weights"])
            expected = dict(alone["weights"])
            for name, tensor in stage["weights"]:
                np.testing.assert_allclose(tensor, expected[name], atol=5e-6, err_msg=name)
        assert (dict(stages[0]["weights"])["model.embed_tokens.weight"] == first).all()


def stop_and_resume(config: Config, directory: Path) -> tuple[list[float], list[float]]:
    """Losses of updates 2 and 3, unbroken and after loading what was saved after update 1."""
    from megatron_mmrl.checkpoint.state import load_training_state, save_training_state
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    batch = packer.pack(make_sequences(config)).batch
    loss = build_algorithm(config.algorithm).loss
    policy.start_optimizer(config.optim, total_updates=3)
    policy.update(batch, loss)
    save_training_state(directory, policy.chunks, policy.optimizer, {})
    torch.distributed.barrier()
    unbroken = [policy.update(batch, loss).loss for _ in range(2)]
    load_training_state(directory, policy.chunks, policy.optimizer)
    policy.num_updates = 1
    resumed = [policy.update(batch, loss).loss for _ in range(2)]
    shutdown()
    return unbroken, resumed


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"),
        ("parallel.context_parallel_size=2",),
    ],
    ids=["several chunks", "context ranks"],
)
def test_a_layout_resumes_bit_for_bit(model_path: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    for unbroken, resumed in run_ranks(
        stop_and_resume, 2, config_of(model_path, *BASE, *overrides, "algorithm.kl_coef=0"), tmp_path
    ):
        assert unbroken == resumed
        assert unbroken[0] != unbroken[1]


def refusals(config: Config) -> list[str]:
    """What the model says to inputs that Megatron would take, and compute something else from."""
    from megatron_mmrl.parallel.attention import pack
    from megatron_mmrl.parallel.state import shutdown
    from megatron_mmrl.trainer.forward import model_inputs

    policy, packer = build(config)
    batch = packer.pack(make_sequences(config)[:2]).batch.microbatches[0]
    good = model_inputs(batch)
    length = len(batch.input_ids)
    outside = pack(torch.from_numpy(batch.cu_seqlens[:-1]), torch.device("cpu"), rank=0, size=2)
    planted = (
        {"position_ids": good["position_ids"][:, :, : length - 1]},
        {"position_ids": torch.cat([good["position_ids"], good["position_ids"][:, :, :1]], dim=2)},
        {"packed_seq_params": outside},
        {"packed_seq_params": pack(torch.from_numpy(batch.cu_seqlens), torch.device("cpu"))},
    )
    messages = []
    for fault in planted:
        with pytest.raises(ValueError, match=r".") as caught:
            policy.chunks[0](**{**good, **fault})
        messages.append(str(caught.value))
    shutdown()
    return messages


def test_packs_that_do_not_fit_their_positions_or_ranks_are_refused(model_path: Path) -> None:
    fewer, more, outside, alone = run_ranks(refusals, 2, config_of(model_path, "parallel.context_parallel_size=2"))[0]
    assert "position_ids have shape (3, 1, 31), input_ids (1, 32)" in fewer
    assert "position_ids have shape (3, 1, 33), input_ids (1, 32)" in more
    assert "cu_seqlens cover" in outside
    assert "of a pack of shape 1 x 32; they must cover all of one row, padding included" in outside
    assert "described for 1 context-parallel ranks, there are 2" in alone
