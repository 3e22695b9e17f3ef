"""Images spread over ranks: each is encoded once, and training the tower gives one set of weights everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.config import Config
from megatron_mmrl.types import TrainSequence
from tests.dist.launch import run_ranks
from tests.dist.policy_case import arbitrary_sequence, build, config_of

# Images of each sequence, by number; several sequences show the same one, as the responses to one prompt do.
GRIDS = {0: (4, 4), 1: (4, 12), 2: (10, 6), 3: (4, 4)}
SHOWN = ((0,), (), (1, 2), (), (0,), (3, 0), (2,), ())
PATCHES = {number: height * width for number, (height, width) in GRIDS.items()}
# Adam's step is proportional to small gradients with a large eps; with a small one it would blow up their rounding.
BASE = ("optim.lr=1e-2", "optim.eps=1e-2", "optim.schedule=constant", "optim.warmup_updates=0")
NUM_UPDATES = 20


def make_sequences(config: Config, shown: tuple[tuple[int, ...], ...] = SHOWN) -> list[TrainSequence]:
    """Each begins with its images; 5 tokens of text, 4 of response with arbitrary advantages."""
    from megatron_mmrl.models.registry import model_facts

    facts = model_facts(config.model.path)
    rng = np.random.default_rng(0)
    pixels = {number: rng.normal(size=(patches, 1176)).astype(np.float32) for number, patches in PATCHES.items()}
    sequences = []
    for images in shown:
        pads = np.full(sum(PATCHES[number] // 4 for number in images), facts.image_token_id)
        ids = np.concatenate([rng.integers(0, 200, 2), pads, rng.integers(0, 200, 7)])
        shown_pixels = np.concatenate([np.zeros((0, 1176), np.float32), *(pixels[n] for n in images)])
        grid = np.array([(1, *GRIDS[n]) for n in images], np.int64).reshape(-1, 3)
        sequences.append(replace(arbitrary_sequence(rng, ids, 4), pixel_values=shown_pixels, image_grid_thw=grid))
    return sequences


def count_patches(policy: object) -> list[int]:
    """Rows that the real tower is given from now on, one entry per call."""
    counts: list[int] = []
    for chunk in policy.chunks:  # type: ignore[attr-defined]
        if chunk.module.visual is not None:
            chunk.module.visual.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
    return counts


def train(config: Config) -> dict[str, object]:
    """Patches encoded in one forward pass, and the weights after some updates."""
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    policy.start_optimizer(config.optim, total_updates=NUM_UPDATES)
    batch = packer.pack(make_sequences(config)).batch
    counts = count_patches(policy)
    policy.logprobs(batch)
    patches = sum(counts)
    loss = build_algorithm(config.algorithm).loss
    stats = [policy.update(batch, loss) for _ in range(NUM_UPDATES)]
    full = {
        name: tensor.numpy().copy() for name, tensor in policy.weights()
    }  # gathers them too, where that was put off
    own = {
        name: parameter.detach().numpy().copy()
        for chunk in policy.chunks
        for name, parameter in chunk.module.named_parameters()
        if name.startswith("visual.")
    }
    shutdown()
    return {"patches": patches, "stats": stats, "vision": own, "weights": full}


@pytest.fixture(scope="module")
def alone(model_path: Path) -> dict:
    return run_ranks(train, 1, config_of(model_path, *BASE))[0]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ("parallel.tensor_model_parallel_size=2",)),
        (2, ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=false",
             "trainer.micro_batch_sequences=2", "parallel.overlap_grad_reduce=true")),
        (2, ("parallel.context_parallel_size=2", "trainer.micro_batch_sequences=2")),
        (2, ("parallel.data_parallel_size=2", "trainer.micro_batch_sequences=2",
             "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")),
        (4, ("parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=2",
             "trainer.micro_batch_sequences=3", "parallel.overlap_grad_reduce=true")),
        pytest.param(
            4, ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
                "trainer.micro_batch_sequences=2"), marks=pytest.mark.full),
    ],
    ids=("tp2-sp", "tp2-overlap", "cp2", "dp2-overlap", "tp2-cp2", "tp2-pp2"),
)  # fmt: skip
def test_vision_trains_alike_on_every_rank(
    alone: dict, model_path: Path, ranks: int, overrides: tuple[str, ...]
) -> None:
    results = run_ranks(train, ranks, config_of(model_path, *BASE, *overrides))
    for result in results:
        for ours, theirs in zip(result["stats"], alone["stats"], strict=True):
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        for name, tensor in result["weights"].items():
            np.testing.assert_allclose(tensor, alone["weights"][name], atol=1e-5, err_msg=name)
    copies = [result["vision"] for result in results if result["vision"]]
    assert len(copies) == (2 if "parallel.pipeline_model_parallel_size=2" in overrides else ranks)
    for copy in copies[1:]:
        assert all(np.array_equal(copy[name], tensor) for name, tensor in copies[0].items())


def test_each_image_is_encoded_once_per_forward(alone: dict) -> None:
    """All eight sequences are one micro-batch, with four distinct images."""
    assert alone["patches"] == sum(PATCHES.values())


def patches_by_rank(config: Config) -> list[int]:
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    counts = count_patches(policy)
    policy.logprobs(packer.pack(make_sequences(config)).batch)
    shutdown()
    return counts


def test_the_tensor_parallel_ranks_share_the_images(model_path: Path) -> None:
    """60 | 48 + 16, of 16, 48, 60, 16 patches: longest first, then 60 + 16."""
    counts = run_ranks(patches_by_rank, 2, config_of(model_path, "parallel.tensor_model_parallel_size=2"))
    assert counts == [[60 + 16], [48 + 16]]


def without_images(config: Config) -> dict[str, object]:
    """An update on text alone: norm of its gradient, and whether the tower stayed as it was."""
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    policy.start_optimizer(config.optim, total_updates=2)
    before = {name: tensor.numpy().copy() for name, tensor in policy.weights()}
    batch = packer.pack(make_sequences(config, ((), (), ()))).batch
    stats = policy.update(batch, build_algorithm(config.algorithm).loss)
    changed = [name for name, tensor in policy.weights() if not np.array_equal(tensor.numpy(), before[name])]
    shutdown()
    return {"norm": stats.grad_norm, "changed": changed}


def test_text_alone_changes_nothing_in_the_tower_and_nothing_else_because_of_it(model_path: Path) -> None:
    tensor = ("parallel.tensor_model_parallel_size=2", "parallel.overlap_grad_reduce=true")
    trained = run_ranks(without_images, 2, config_of(model_path, *BASE, *tensor))
    frozen = run_ranks(without_images, 2, config_of(model_path, *BASE, *tensor, "model.freeze=[vision,merger]"))
    for ours, theirs in zip(trained, frozen, strict=True):
        assert ours == theirs
        assert not any(name.startswith("visual.") for name in ours["changed"])
        assert any(name.startswith("model.layers.") for name in ours["changed"])


def features_alone_and_together(model_path: Path) -> float:
    """Largest difference of an image's features when the tower reads it alone or among others."""
    from megatron_mmrl.config.model import ModelConfig
    from megatron_mmrl.config.parallel import ParallelConfig
    from megatron_mmrl.models.registry import build_model, load_checkpoint, open_checkpoint
    from megatron_mmrl.parallel.state import initialize, shutdown

    initialize(ParallelConfig(), seed=0)
    (chunk,) = build_model(model_path, parallel=ParallelConfig(), model=ModelConfig(path=str(model_path)))
    load_checkpoint([chunk], open_checkpoint(model_path))
    grids = torch.tensor([(1, *grid) for grid in GRIDS.values()])
    images = torch.randn(sum(PATCHES.values()), 1176).split(list(PATCHES.values()))
    with torch.no_grad():
        joint = chunk.visual(torch.cat(images), grid_thw=grids).pooler_output
        single = [
            chunk.visual(image, grid_thw=grid[None]).pooler_output for image, grid in zip(images, grids, strict=True)
        ]
        ours = chunk._encode_images(torch.cat([*images, images[1]]), torch.cat([grids, grids[1:2]]))
    assert torch.equal(ours[: len(joint)], joint)
    assert torch.equal(ours[len(joint) :], joint.split([p // 4 for p in PATCHES.values()])[1])
    shutdown()
    return float((joint - torch.cat(single)).abs().max() / joint.abs().max())


def test_the_tower_keeps_images_apart(model_path: Path) -> None:
    assert run_ranks(features_alone_and_together, 1, model_path)[0] <= 1e-6


def train_in_small_buckets(config: Config) -> list[dict[str, np.ndarray]]:
    """Weights after each of three updates in which one replica reads images and the other text."""
    from functools import partial

    from megatron_mmrl.parallel.state import shutdown
    from megatron_mmrl.trainer import optim

    optim.DistributedDataParallelConfig = partial(optim.DistributedDataParallelConfig, bucket_size=20_000)
    policy, packer = build(config)
    if config.parallel.overlap_param_gather:
        assert len(policy.chunks[0].bucket_groups) > 10
    policy.start_optimizer(config.optim, total_updates=4)
    batch = packer.pack(make_sequences(config, ((1, 2), ()))).batch
    loss, weights = build_algorithm(config.algorithm).loss, []
    for _ in range(3):
        policy.update(batch, loss)
        weights.append({name: tensor.numpy().copy() for name, tensor in policy.weights()})
    shutdown()
    return weights


def test_replicas_with_and_without_images_exchange_buckets_in_one_order(model_path: Path) -> None:
    overlap = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
    (alone,) = run_ranks(train_in_small_buckets, 1, config_of(model_path, *BASE))
    config = config_of(model_path, *BASE, "parallel.data_parallel_size=2", *overlap)
    for result in run_ranks(train_in_small_buckets, 2, config, timeout_s=60.0):
        for ours, theirs in zip(result, alone, strict=True):
            for name, tensor in ours.items():
                np.testing.assert_allclose(tensor, theirs[name], atol=5e-6, err_msg=name)
