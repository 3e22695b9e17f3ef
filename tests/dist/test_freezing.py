"""What is frozen stays as it was and costs no gradient buffer and no optimizer state, in every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.config import Config
from megatron_mmrl.models.parts import part_of
from tests.dist.launch import RankFailedError, run_ranks
from tests.dist.policy_case import build, config_of
from tests.dist.test_vision_spread import BASE, PATCHES, count_patches, make_sequences

TENSOR_2 = "parallel.tensor_model_parallel_size=2"
PIPELINE_2 = "parallel.pipeline_model_parallel_size=2"
FIRST_STAGE = r"[vision,merger,'re:model\.embed_tokens\.weight','re:model\.layers\.[01]\..*']"
LAST_STAGE = r"['re:model\.layers\.[23]\..*','re:model\.norm\.weight','re:lm_head\.weight']"


def update(config: Config, num_updates: int = 1) -> dict[str, object]:
    """Sizes of what training keeps, and the weights before and after ``num_updates`` updates."""
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    policy.start_optimizer(config.optim, total_updates=10)
    counts = count_patches(policy)
    before = {name: tensor.numpy().copy() for name, tensor in policy.weights()}
    batch = packer.pack(make_sequences(config)).batch
    loss = build_algorithm(config.algorithm).loss
    norms = [policy.update(batch, loss).grad_norm for _ in range(num_updates)]
    result = {
        "before": before,
        "after": {name: tensor.numpy().copy() for name, tensor in policy.weights()},
        "norms": norms,
        "patches": sum(counts),
        "groups": groups_of(policy),
        "buffered": sum(buffer.numel_unpadded for chunk in policy.chunks for buffer in chunk.buffers),
        "state": sum(
            value.numel()
            for part in policy.optimizer.chained_optimizers
            for state in part.optimizer.state.values()
            for value in state.values()
            if value.dim()
        ),
        "trained": sum(p.numel() for chunk in policy.chunks for p in chunk.module.parameters() if p.requires_grad),
    }
    shutdown()
    return result


def groups_of(policy: object) -> list[tuple[float, float, list[str]]]:
    """(rate, weight decay, checkpoint names) of each parameter group of this rank."""
    names = {
        id(parameter): chunk.module.weight_table()[name].hf_names
        for chunk in policy.chunks  # type: ignore[attr-defined]
        for name, parameter in chunk.module.named_parameters()
    }
    (part,) = policy.optimizer.chained_optimizers  # type: ignore[attr-defined]
    members: list[list[str]] = [[] for _ in part.optimizer.param_groups]
    for parameter, (group, _) in part.model_param_group_index_map.items():
        members[group] += names[id(parameter)]
    return [
        (group["lr"], group["weight_decay"], sorted(names))
        for group, names in zip(part.optimizer.param_groups, members, strict=True)
    ]


def parts_that_changed(result: dict) -> set[str]:
    changed = (name for name, tensor in result["after"].items() if not np.array_equal(tensor, result["before"][name]))
    return {part_of(name) for name in changed}


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        ("[vision]", {"merger", "language"}),
        ("[vision,merger]", {"language"}),
        ("[language]", {"vision", "merger"}),
        ("[vision,language]", {"merger"}),
    ],
)
def test_a_frozen_part_stays_and_takes_no_memory(model_path: Path, freeze: str, trained: set[str]) -> None:
    (one,) = run_ranks(update, 1, config_of(model_path, *BASE, f"model.freeze={freeze}"))
    assert parts_that_changed(one) == trained
    expected = sum(tensor.size for name, tensor in one["before"].items() if part_of(name) in trained)
    assert one["trained"] == one["buffered"] == expected
    assert one["state"] == 2 * expected  # Adam's two moments
    both = run_ranks(update, 2, config_of(model_path, *BASE, f"model.freeze={freeze}", TENSOR_2))
    for result in both:
        assert result["norms"] == pytest.approx(one["norms"], rel=1e-5)
        assert result["buffered"] == result["trained"]
        for name, tensor in result["after"].items():
            np.testing.assert_allclose(tensor, one["after"][name], atol=2e-6, err_msg=name)


@pytest.fixture(scope="module", params=[FIRST_STAGE, LAST_STAGE], ids=["first", "last"])
def frozen_stage(request: pytest.FixtureRequest, model_path: Path) -> tuple[tuple[str, ...], dict]:
    """Overrides that freeze all of one of two stages, and what a single rank makes of them."""
    overrides = (*BASE, f"model.freeze={request.param}", "trainer.micro_batch_sequences=4")
    return overrides, run_ranks(weights_after, 1, config_of(model_path, *overrides))[0]


@pytest.mark.parametrize(
    "overrides",
    [("model.recompute=full",), ("parallel.use_distributed_optimizer=false",),
     ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"),
     ("parallel.virtual_pipeline_model_parallel_size=2",)],
    ids=["recompute", "plain", "overlap", "interleaved"],
)  # fmt: skip
def test_a_whole_stage_may_be_frozen(
    frozen_stage: tuple[tuple[str, ...], dict],
    model_path: Path,
    overrides: tuple[str, ...],
) -> None:
    common, one = frozen_stage
    for result in run_ranks(weights_after, 2, config_of(model_path, *common, PIPELINE_2, *overrides)):
        assert result["norms"] == pytest.approx(one["norms"], rel=1e-5)
        for name, tensor in result["weights"].items():
            np.testing.assert_allclose(tensor, one["weights"][name], atol=2e-6, err_msg=name)


def weights_after(config: Config) -> dict[str, object]:
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    policy.start_optimizer(config.optim, total_updates=10)
    batch = packer.pack(make_sequences(config)).batch
    loss = build_algorithm(config.algorithm).loss
    norms = [policy.update(batch, loss).grad_norm for _ in range(2)]
    weights = {name: tensor.numpy().copy() for name, tensor in policy.weights()}
    shutdown()
    return {"norms": norms, "weights": weights}


SCALES = ("optim.lr_scale.vision=0.1", "optim.lr_scale.merger=0.5")
DECAY = "optim.weight_decay=0.1"


@pytest.fixture(scope="module")
def scaled(model_path: Path) -> dict:
    return run_ranks(update, 1, config_of(model_path, *BASE, *SCALES))[0]


def test_rates_by_part(scaled: dict, model_path: Path) -> None:
    """Adam's first step is lr x g / (|g| + eps) for each weight, so a part's step is its scale of the plain one."""
    (plain,) = run_ranks(update, 1, config_of(model_path, *BASE))
    assert scaled["norms"] == pytest.approx(plain["norms"], rel=1e-6)
    for name, before in plain["before"].items():
        factor = {"vision": 0.1, "merger": 0.5, "language": 1.0}[part_of(name)]
        np.testing.assert_allclose(
            scaled["after"][name] - before, factor * (plain["after"][name] - before), atol=1e-7, rtol=1e-3
        )


@pytest.mark.parametrize("layout", [TENSOR_2, PIPELINE_2, "parallel.data_parallel_size=2"])
def test_groups_are_equal_over_layouts(model_path: Path, layout: str) -> None:
    scaled = run_ranks(update, 1, config_of(model_path, *BASE, *SCALES, DECAY))[0]
    results = run_ranks(update, 2, config_of(model_path, *BASE, *SCALES, DECAY, layout))
    expected = [(rate, decay, set(names)) for rate, decay, names in scaled["groups"]]
    rates = {(round(rate / 1e-2, 6), decay, part_of(name)) for rate, decay, names in expected for name in names}
    assert rates == {
        (scale, decay, part)
        for scale, part in ((0.1, "vision"), (0.5, "merger"), (1.0, "language"))
        for decay in (0.0, 0.1)
    }
    assert {decay for _, decay, names in expected for name in names if name.endswith("bias") or "norm" in name} == {0.0}
    assert [[group[:2] for group in result["groups"]] for result in results] == [[g[:2] for g in expected]] * 2
    for number, (_, _, names) in enumerate(expected):
        assert {name for result in results for name in result["groups"][number][2]} == names


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_layers_train_above_a_frozen_input(model_path: Path, recompute: str) -> None:
    config = (*BASE, r"model.freeze=[vision,merger,'re:model\.embed_tokens\.weight']")
    (plain,) = run_ranks(weights_after, 1, config_of(model_path, *config))
    (ours,) = run_ranks(weights_after, 1, config_of(model_path, *config, f"model.recompute={recompute}"))
    assert ours["norms"] == pytest.approx(plain["norms"], rel=1e-6)
    for name, tensor in ours["weights"].items():
        np.testing.assert_allclose(tensor, plain["weights"][name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("freeze", ["[vision]", "[vision,merger]"])
def test_a_frozen_tower_encodes_an_image_once_per_run(model_path: Path, freeze: str) -> None:
    """Three updates in eight micro-batches each; what is kept gives the result that encoding anew does."""
    config = (*BASE, f"model.freeze={freeze}", "trainer.micro_batch_sequences=1")
    anew = run_ranks(update, 2, config_of(model_path, *config, TENSOR_2, "model.image_cache_bytes=0"), 3)
    kept = run_ranks(update, 2, config_of(model_path, *config, TENSOR_2), 3)
    shown = (1 + 1 + 1 + 1) * PATCHES[0]  # images 0 three times, 3 once; both have 16 patches
    assert sum(result["patches"] for result in anew) == 3 * (shown + PATCHES[1] + 2 * PATCHES[2])
    assert sum(result["patches"] for result in kept) == sum(PATCHES.values())
    for ours, theirs in zip(kept, anew, strict=True):
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
        for name, tensor in ours["after"].items():
            np.testing.assert_allclose(tensor, theirs["after"][name], atol=1e-6, err_msg=name)


def forget(config: Config) -> tuple[bool, bool]:
    """Whether log-probs change when the frozen tower's weights do, and come back when those do."""
    import torch

    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    batch = packer.pack(make_sequences(config)).batch
    first = policy.logprobs(batch)
    weight = policy.chunks[0].module.visual.patch_embed.proj.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.mul_(2)
        second = policy.logprobs(batch)
        weight.copy_(kept)
    third = policy.logprobs(batch)
    shutdown()

    def equal(ours: list, theirs: list) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))

    return equal(first, second), equal(first, third)


def test_other_weights_empty_the_cache(model_path: Path) -> None:
    assert run_ranks(forget, 1, config_of(model_path, "model.freeze=[vision,merger]")) == [(False, True)]


def save(config: Config, directory: Path) -> dict[str, np.ndarray]:
    """One update, a checkpoint, one more update -> weights."""
    from megatron_mmrl.checkpoint.state import save_training_state
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    policy.start_optimizer(config.optim, total_updates=10)
    batch = packer.pack(make_sequences(config)).batch
    loss = build_algorithm(config.algorithm).loss
    policy.update(batch, loss)
    save_training_state(directory, policy.chunks, policy.optimizer, {})
    policy.update(batch, loss)
    weights = {name: tensor.numpy().copy() for name, tensor in policy.weights()}
    shutdown()
    return weights


def resume(config: Config, directory: Path) -> dict[str, np.ndarray]:
    """The checkpoint, one more update -> weights."""
    from megatron_mmrl.checkpoint.state import load_training_state
    from megatron_mmrl.parallel.state import shutdown

    policy, packer = build(config)
    policy.start_optimizer(config.optim, total_updates=10)
    load_training_state(directory, policy.chunks, policy.optimizer)
    policy.num_updates = 1
    policy.update(packer.pack(make_sequences(config)).batch, build_algorithm(config.algorithm).loss)
    weights = {name: tensor.numpy().copy() for name, tensor in policy.weights()}
    shutdown()
    return weights


@pytest.mark.parametrize(
    ("freeze", "layout"),
    [("[vision]", TENSOR_2), (FIRST_STAGE, PIPELINE_2), ("[vision]", "parallel.use_distributed_optimizer=false")],
    ids=["vision-tp2", "first-stage-pp2", "vision-plain"],
)
def test_a_run_with_frozen_parts_resumes_bit_for_bit(
    model_path: Path,
    tmp_path: Path,
    freeze: str,
    layout: str,
) -> None:
    ranks = 1 if "optimizer" in layout else 2
    config = config_of(model_path, *BASE, *SCALES[1:], f"model.freeze={freeze}", layout)
    went_on = run_ranks(save, ranks, config, tmp_path)
    resumed = run_ranks(resume, ranks, config, tmp_path)
    for ours, theirs in zip(resumed, went_on, strict=True):
        assert all(np.array_equal(tensor, theirs[name]) for name, tensor in ours.items())
    if freeze == "[vision]":
        other = config_of(model_path, *BASE, *SCALES[1:], "model.freeze=[merger]", layout)
        with pytest.raises(RankFailedError, match="visual"):
            run_ranks(resume, ranks, other, tmp_path)


def test_half_of_a_fused_tensor_cannot_be_frozen(model_path: Path) -> None:
    config = config_of(model_path, r"model.freeze=['re:model\.layers\.0\.self_attn\.q_proj\..*']")
    with pytest.raises(RankFailedError, match=r"q_proj\.weight, but Megatron keeps .*q_proj\.weight, .*k_proj\."):
        run_ranks(update, 1, config)
