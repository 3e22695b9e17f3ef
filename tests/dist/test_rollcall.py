"""Real ranks: those that agree go on, and one that differs is found before anything is read."""

from __future__ import annotations

import contextlib
import io
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mmrl.config import Config, ConfigError
from tests.dist.launch import run_ranks
from tests.dist.policy_case import CONFIG, config_of

TWO_BY_TWO = ("parallel.tensor_model_parallel_size=2", "parallel.data_parallel_size=2")


def _call(config: Config, differs: str = "", value: object = None) -> dict:
    """The roll call, in which the last rank has another ``section.key`` than the others."""
    from megatron_mmrl.cluster.rollcall.call import call_roll, require_agreement
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.parallel.state import initialize, shutdown

    if differs and int(os.environ["RANK"]) == config.parallel.world_size - 1:
        section, key = differs.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    initialize(config.parallel, seed=0)
    exchange = Collectives()
    start = time.perf_counter()
    roll = call_roll(config, exchange)
    seconds = time.perf_counter() - start
    refused = ""
    try:
        require_agreement(roll, exchange.rank)
    except ConfigError as error:
        refused = str(error)
    shutdown()
    return {"roll": roll, "refused": refused, "seconds": seconds}


def test_ranks_that_agree_measure_all_their_groups(model_path: Path, tmp_path: Path) -> None:
    config = config_of(model_path, *TWO_BY_TWO, f"run.output_dir={tmp_path}/new/run")
    ranks = run_ranks(_call, 4, config)
    assert all(each["roll"] == ranks[0]["roll"] for each in ranks)
    assert [each["refused"] for each in ranks] == [""] * 4
    roll = ranks[0]["roll"]
    assert roll.findings == []
    assert [each.rank for each in roll.facts] == [0, 1, 2, 3]
    assert {(speed.kind, speed.ranks) for speed in roll.speeds} == {
        ("tensor", (0, 1)), ("tensor", (2, 3)), ("data", (0, 2)), ("data", (1, 3)),
    }  # fmt: skip
    assert all(0 < speed.gb_per_s < 1000 for speed in roll.speeds)
    assert not any(tmp_path.iterdir())  # nothing is left behind
    print(f"roll call of 4 ranks: {max(each['seconds'] for each in ranks):.2f} s")


@pytest.mark.parametrize(
    ("differs", "value", "words"),
    [
        ("optim.lr", 0.5, ["optim.lr is 0.01 on", "(rank 0) and 0.5 on", "(rank 1); start every rank"]),
        ("model.path", "/nowhere", ["model.path cannot be read on", "(rank 1): No such file or directory: /nowhere"]),
        ("run.output_dir", "elsewhere", ["is not one writable directory", "(rank 1), what rank 0 wrote is not there"]),
        ("cluster.network_interface", "eth1", []),  # may differ
    ],
)
def test_a_rank_that_differs_is_found(
    model_path: Path, tmp_path: Path, differs: str, value: object, words: list[str]
) -> None:
    config = config_of(model_path, "parallel.data_parallel_size=2", "optim.lr=1e-2", f"run.output_dir={tmp_path}/run")
    if differs == "run.output_dir":
        value = str(tmp_path / str(value))
    first, second = run_ranks(_call, 2, config, differs, value)
    assert first["refused"] == second["refused"]
    assert bool(first["refused"]) == bool(words)
    found = "\n".join(map(str, first["roll"].findings))
    for word in words:
        assert word in found
    assert not any(tmp_path.iterdir())


def test_a_directory_that_is_a_file_is_found(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    config = config_of(model_path, "parallel.data_parallel_size=2", f"run.output_dir={tmp_path}/run")
    first, _ = run_ranks(_call, 2, config)
    assert len(first["roll"].findings) == 1
    assert "rank 0 cannot write there (Not a directory)" in first["refused"]


def _doctor(*overrides: str) -> tuple[str, str]:
    """What ``mmrl doctor cluster`` prints on this rank, and how it ends."""
    from megatron_mmrl.doctor.cluster import RollCallError, main

    end = ""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main(["--config", str(CONFIG), *overrides])
        except RollCallError as error:
            end = str(error)
    return out.getvalue(), end


def test_the_doctor_prints_it_on_one_rank_and_ends_with_a_verdict(model_path: Path, tmp_path: Path) -> None:
    keys = (f"model.path={model_path}", "parallel.tensor_model_parallel_size=2")
    (text, end), (other, _) = run_ranks(_doctor, 2, *keys, f"run.output_dir={tmp_path}/run")
    assert (other, end) == ("", "")
    assert "tensor" in text
    assert "GB/s" in text
    assert text.splitlines()[-1] == "2 ranks on 1 host: ready"
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["logs"]
    (tmp_path / "file").touch()
    (text, end), (_, other_end) = run_ranks(
        _doctor, 2, *keys, f"run.output_dir={tmp_path}/file", env={"MMRL_FAILURE_DIR": str(tmp_path)}
    )
    assert end == other_end == "1 of the findings would end a run"
    assert text.splitlines()[-1] == "2 ranks on 1 host: they cannot work together"
    assert "error: run.output_dir=" in text
