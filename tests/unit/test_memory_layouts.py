"""The shipped recipes and their tables of layouts: what stands there is what the estimator says, and it fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.memory_layouts import CONFIGS, MACHINES, machine, parse, printed, sized
from megatron_mmrl.config import load_config
from megatron_mmrl.memory.estimate import estimate
from megatron_mmrl.memory.search import nearest, problems, value_of


@pytest.fixture(params=CONFIGS, ids=lambda file: file.stem)
def recipe(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_is_a_recipe_for_each_size() -> None:
    assert [file.stem.removeprefix("qwen2_5_vl_") for file in CONFIGS] == ["32b", "3b", "72b", "7b"]


def test_every_layout_of_the_table_fits_and_needs_what_is_printed(recipe: Path) -> None:
    rows = parse(recipe.read_text())
    assert [(row.gpus, row.memory) for row in rows] == MACHINES
    with sized(recipe) as config:
        for row in rows:
            if not row.overrides:
                assert nearest(config, machine(row.gpus, row.memory)) is None
                continue
            chosen = load_config(recipe, [f"model.path={config.model.path}", *row.overrides])
            assert chosen.parallel.world_size == row.gpus
            # Raises where the trainer's own check or the reshard planner refuses: an engine over two nodes of 8, ...
            plan = estimate(chosen, machine(row.gpus, row.memory))
            assert problems(chosen, plan) == [], row
            assert printed(plan) == row.gib, row


def test_the_recipe_itself_is_the_first_row_that_fits(recipe: Path) -> None:
    first = next(row for row in parse(recipe.read_text()) if row.overrides)
    config = load_config(recipe)
    assert config.parallel.world_size == first.gpus
    chosen = load_config(recipe, first.overrides)
    assert {key: value_of(config, key) for key in _keys(first.overrides)} == {
        key: value_of(chosen, key) for key in _keys(first.overrides)
    }


def test_a_row_that_needs_more_than_there_is_would_be_found() -> None:
    (recipe,) = (file for file in CONFIGS if file.stem == "qwen2_5_vl_32b")
    with sized(recipe) as config:
        crowded = replace(config, trainer=replace(config.trainer, micro_batch_tokens=65536))
        found = problems(crowded, estimate(crowded, machine(16, 80)))
    assert len(found) == 1
    assert "training needs" in found[0]
    assert "activations" in found[0]


def _keys(overrides: tuple[str, ...]) -> list[str]:
    return [text.split("=")[0] for text in overrides]
