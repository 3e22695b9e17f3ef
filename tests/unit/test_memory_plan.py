"""``mmrl plan`` as a user sees it, and the search for layouts that fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mmrl.cli import main
from megatron_mmrl.config import Config, load_config
from megatron_mmrl.memory.estimate import Machine, estimate
from megatron_mmrl.memory.search import KV_SEQUENCES, cost, nearest, problems, wanted_kv_tokens
from megatron_mmrl.models.known import config_dir

RECIPES = Path(__file__).parents[2] / "configs"
SEVEN = str(RECIPES / "qwen2_5_vl_7b.yaml")


@pytest.fixture
def seven() -> Iterator[Config]:
    with config_dir("qwen2_5_vl_7b") as path:
        yield load_config(SEVEN, [f"model.path={path}"])


def of_model(config: Config, *overrides: str) -> Config:
    return load_config(SEVEN, [f"model.path={config.model.path}", *overrides])


def machine(gpus: int, memory: float = 80, per_node: int = 8) -> Machine:
    return Machine(gpus=gpus, gpus_per_node=per_node, gpu_memory_gib=memory)


def test_what_fits_is_its_own_nearest(seven: Config) -> None:
    found = nearest(seven, machine(8))
    assert found is not None
    assert found.overrides == ()
    assert found.config == seven


def test_more_gpus_become_replicas_and_engines(seven: Config) -> None:
    found = nearest(seven, machine(32))
    assert found is not None
    assert found.overrides == ("parallel.data_parallel_size=16", "rollout.num_engines=16")
    assert problems(found.config, found.estimate) == []


def test_one_change_is_nearer_than_two(seven: Config) -> None:
    crowded = of_model(seven, "trainer.micro_batch_tokens=16384")
    assert any("training needs" in line for line in problems(crowded, estimate(crowded, machine(8))))
    found = nearest(crowded, machine(8))
    assert found is not None
    sizes = [text for text in found.overrides if "data_parallel_size" not in text and "num_engines" not in text]
    assert len(sizes) == 1, found.overrides
    assert problems(found.config, estimate(found.config, machine(8))) == []


def test_the_engines_share_is_made_to_fit(seven: Config) -> None:
    greedy = of_model(seven, "rollout.mem_fraction_static=0.9")
    assert any("the start needs" in line for line in problems(greedy, estimate(greedy, machine(8))))
    found = nearest(greedy, machine(8))
    assert found is not None
    assert found.overrides == ("rollout.mem_fraction_static=0.53",)
    more = of_model(seven, "rollout.mem_fraction_static=0.54")
    assert problems(more, estimate(more, machine(8)))  # the largest that fits


def test_a_cache_that_is_too_small_does_not_fit(seven: Config) -> None:
    small = of_model(seven, "rollout.max_total_tokens=50000")
    assert wanted_kv_tokens(small) == KV_SEQUENCES * 6144
    (line,) = problems(small, estimate(small, machine(8)))
    assert "holds 50,000 tokens, fewer than 98,304" in line


def test_engines_stay_on_their_nodes(seven: Config) -> None:
    found = nearest(seven, machine(8, 141, per_node=1), keep=False)
    assert found is not None
    assert found.config.rollout.tensor_parallel_size == 1
    assert found.config.parallel.tensor_model_parallel_size == 1


def test_cost_prefers_what_computes_less(seven: Config) -> None:
    assert cost(of_model(seven, "model.recompute=full")) > cost(seven)
    deep = of_model(seven, "parallel.pipeline_model_parallel_size=2", "parallel.data_parallel_size=2")
    assert cost(deep) > cost(of_model(deep, "parallel.data_parallel_size=4"))
    assert cost(of_model(seven, "rollout.tensor_parallel_size=1", "rollout.num_engines=8")) > cost(seven)


def test_nothing_fits(seven: Config) -> None:
    assert nearest(seven, machine(8, 16)) is None


def plan(*arguments: str) -> tuple[str, ...]:
    return ("plan", "--config", SEVEN, *arguments)


def test_a_plan_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan("--gpus", "8", "--gpu-memory", "80")) == 0
    out = capsys.readouterr().out
    assert "tensor 2 x pipeline 1 x context 1 x data 4 = 8 GPUs; 4 engines of 2" in out
    assert "KV cache of an engine" in out
    assert out.splitlines()[-1].startswith("fits: ")


def test_a_plan_for_other_gpus_says_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan("--gpus", "16", "--gpu-memory", "80")) == 1
    out = capsys.readouterr().out
    assert "does not fit: the configuration's parallel sizes make 8 GPUs, not --gpus 16" in out
    assert "  parallel.data_parallel_size=8 rollout.num_engines=8" in out
    assert (
        main(plan("--gpus", "16", "--gpu-memory", "80", "parallel.data_parallel_size=8", "rollout.num_engines=8")) == 0
    )


def test_a_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan("--gpus", "8", "--gpu-memory", "80", "--json", "trainer.micro_batch_tokens=16384")) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is False
    assert "training needs" in report["problems"][0]
    (stage,) = report["estimate"]["stages"]
    assert sum(stage["training"].values()) > report["estimate"]["limit_bytes"]
    near = report["nearest"]
    assert near["estimate"]["margin_bytes"] >= 0
    assert near["overrides"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "12", "--gpu-memory", "80"), "--gpus 12 is no multiple of --gpus-per-node 8"),
        (("--gpus", "0", "--gpu-memory", "80"), "give whole nodes"),
        (("--gpus", "8", "--gpu-memory", "0"), "--gpu-memory 0"),
        (("--gpus", "8", "--gpu-memory", "80", "model.path=nowhere"), "is not named after one of qwen2_5_vl_32b"),
        (("--gpus", "8", "--gpu-memory", "80", "model.freeze=[re:nothing]"), "matches no tensor"),
        (("--gpus", "8", "--gpu-memory", "80", "model.freze=[]"), "did you mean model.freeze"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan(*arguments)) == 2
    assert message in capsys.readouterr().err


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys; from megatron_mmrl.cli import main; "
        f"main({[*plan('--gpus', '16', '--gpu-memory', '141')]}); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'transformers', 'sglang')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
