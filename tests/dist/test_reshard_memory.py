"""Training in shared blocks gives the bits that training outside of them gives, and others see it happen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.config import Config
from tests.dist.launch import run_ranks
from tests.dist.policy_case import build, config_of, make_sequences

BASE = ("optim.lr=1e-2", "optim.schedule=constant", "optim.warmup_updates=0", "trainer.micro_batch_sequences=2")
OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
REPLICAS = ("parallel.data_parallel_size=2",)
CASES = {
    "float32": REPLICAS,
    "bfloat16, overlapped": (*REPLICAS, *OVERLAP, "model.dtype=bfloat16"),
    "frozen tower, overlapped": (*REPLICAS, *OVERLAP, "model.freeze=[vision]"),
    "plain optimizer, bfloat16": (*REPLICAS, "model.dtype=bfloat16", "parallel.use_distributed_optimizer=false"),
    "two chunks a stage": (
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=2",
    ),
    "bfloat16": (*REPLICAS, "model.dtype=bfloat16"),
    "float32, overlapped": (*REPLICAS, *OVERLAP),
    "plain optimizer": (*REPLICAS, "parallel.use_distributed_optimizer=false"),
    "frozen tower, plain optimizer": (
        *REPLICAS,
        "parallel.use_distributed_optimizer=false",
        "model.freeze=[vision]",
    ),
}


def trained(config: Config) -> dict[str, object]:
    """Statistics and weights (as bits) of three updates; where memory is shared, what the ranks see of each other."""
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    policy.start_optimizer(config.optim, total_updates=3)  # again: as after the supervised start
    batch = packer.pack(make_sequences(config)).batch
    before = addresses(policy)
    stats = [policy.update(batch, build_algorithm(config.algorithm).loss) for _ in range(3)]
    weights = {name: bits(tensor) for name, tensor in policy.weights()}
    assert addresses(policy) == before  # training moved nothing
    seen = None if policy.shared is None else seen_by_others(policy)
    shutdown()
    return {"stats": [(step.loss, step.grad_norm) for step in stats], "weights": weights, "seen": seen}


def addresses(policy) -> list[int]:
    return [parameter.data_ptr() for chunk in policy.chunks for parameter in chunk.parameters()]


def bits(tensor: torch.Tensor) -> np.ndarray:
    words = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.detach().contiguous().view(words).numpy().copy()


def seen_by_others(policy) -> dict[str, int]:
    """Every rank reads every parameter of every other through the blocks alone, and writes one number into one."""
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.reshard.memory import open_block, typed

    exchange, shared = Collectives(), policy.shared
    parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    spans = []
    for parameter in parameters:
        block, offset = shared.place(parameter)
        assert shared.blocks[block].tensor.data_ptr() + offset == parameter.data_ptr()
        spans.append((block, offset, offset + parameter.nbytes))
    assert all(
        one[0] != other[0] or one[2] <= other[1] for one, other in zip(sorted(spans), sorted(spans)[1:], strict=False)
    )
    own = [
        (shared.place(parameter), tuple(parameter.shape), str(parameter.dtype), bits(parameter).tobytes())
        for parameter in parameters
    ]
    everyone = exchange.all_gather(([block.handle for block in shared.blocks], own))
    handles, theirs = everyone[1 - exchange.rank]
    blocks = [open_block(handle) for handle in handles]
    for (block, offset), shape, dtype, expected in theirs:
        view = typed(blocks[block], offset, shape, getattr(torch, dtype.removeprefix("torch.")))
        assert bits(view).tobytes() == expected
    (block, offset), shape, dtype, _ = theirs[0]
    exchange.barrier()
    typed(blocks[block], offset, shape, getattr(torch, dtype.removeprefix("torch."))).fill_(7)
    exchange.barrier()
    assert bool((parameters[0] == 7).all())
    return {"parameters": len(theirs), "blocks": len(blocks)}


@pytest.mark.parametrize("name", CASES)
def test_training_in_shared_memory_is_bit_equal(model_path: Path, name: str) -> None:
    overrides = (*BASE, "algorithm.kl_coef=0", *CASES[name])
    plain = run_ranks(trained, 2, config_of(model_path, *overrides, "reshard.method=reference"))
    moved = run_ranks(trained, 2, config_of(model_path, *overrides, "reshard.method=in_place"))
    frozen = "model.freeze=[vision]" in overrides
    buffered = "parallel.use_distributed_optimizer=false" not in overrides
    chunks = 2 if "parallel.virtual_pipeline_model_parallel_size=2" in overrides else 1
    for one, other in zip(plain, moved, strict=True):
        assert one["seen"] is None
        assert other["seen"]["parameters"] > 10
        assert other["seen"]["blocks"] == (chunks if buffered else 0) + (frozen or not buffered)
        assert one["stats"] == other["stats"]
        assert one["weights"].keys() == other["weights"].keys()
        for key, words in one["weights"].items():
            assert np.array_equal(words, other["weights"][key]), key
    assert len({loss for loss, _ in plain[0]["stats"]}) == 3  # it did train
