"""Every planted difference between ranks is found, named with its hosts and both values; equal ranks find nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from megatron_mmrl.cluster.rollcall.bandwidth import GroupSpeed
from megatron_mmrl.cluster.rollcall.facts import Facts, Place
from megatron_mmrl.cluster.rollcall.findings import Finding, find, whose
from megatron_mmrl.cluster.rollcall.needs import Needs

GIB = 1 << 30
NEEDS = Needs(
    parameters=40 * GIB, shared_weights=0, checkpoint=100 * GIB, export=10 * GIB, kept_checkpoints=2,
    gpu_peak=70 * GIB, host=300 * GIB,
)  # fmt: skip


def make_facts(rank: int) -> Facts:
    return Facts(
        rank=rank,
        host="ab"[rank // 2],
        node=rank // 2,
        local_rank=rank % 2,
        local_world_size=2,
        versions={"torch": "2.13.0", "sglang": "0.5.20"},
        config_hash="c0",
        model="m0",
        model_is_read=True,
        device="NVIDIA H200",
        device_id=f"GPU-{rank}",
        device_memory=Place(total=80 * GIB, free=79 * GIB),
        memory=Place(total=500 * GIB, free=400 * GIB),
        shm=Place(total=200 * GIB, free=200 * GIB),
        disk=Place(total=1000 * GIB, free=900 * GIB),
        shared="",
        port="",
        clock_s=1e9 + 0.001 * rank,
        environment={"NCCL_DEBUG": "WARN"},
    )


FACTS = [make_facts(rank) for rank in range(4)]


def changed(*ranks: int, **values: object) -> list[Facts]:
    return [replace(each, **values) if each.rank in ranks else each for each in FACTS]


def messages(
    facts: list[Facts],
    needs: Needs | None = NEEDS,
    settings: Sequence[Mapping[str, str]] = (),
    speeds: Sequence[GroupSpeed] = (),
) -> list[Finding]:
    return find(facts, output_dir="runs/x", needs=needs, settings=settings, speeds=speeds)


def test_ranks_that_agree_find_nothing() -> None:
    assert messages(FACTS) == []
    assert whose(FACTS) == "a (ranks 0-1), b (ranks 2-3)"


@pytest.mark.parametrize(
    ("ranks", "values", "level", "words"),
    [
        ((2, 3), {"versions": {"torch": "2.12.1", "sglang": "0.5.20"}}, "error",
         ["torch is 2.13.0 on a (ranks 0-1) and 2.12.1 on b (ranks 2-3)", "install the same"]),
        ((3,), {"versions": {"torch": "2.13.0"}}, "error", ["sglang is 0.5.20 on", "not set on b (rank 3)"]),
        ((2, 3), {"shared": "what rank 0 wrote is not there (No such file)"}, "error",
         ["run.output_dir=runs/x", "on b (ranks 2-3), what rank 0 wrote is not there", "rank 0 is on a", "mount"]),
        ((1,), {"shared": "rank 1 cannot write there (Permission denied)"}, "error", ["a (rank 1)", "Permission"]),
        ((2, 3), {"model": "No such file: /m/config.json", "model_is_read": False}, "error",
         ["model.path cannot be read on b (ranks 2-3): No such file"]),
        ((3,), {"model": "m1"}, "error", ["m0 on a (ranks 0-1), b (rank 2) and m1 on b (rank 3)", "same checkpoint"]),
        ((1,), {"port": "Permission denied"}, "error", ["loopback on a (rank 1): Permission denied"]),
        ((0, 1), {"local_world_size": 4}, "error", ["node 0 has 2 ranks on a (ranks 0-1), but LOCAL_WORLD_SIZE=4"]),
        ((2,), {"local_rank": 1}, "error", ["LOCAL_RANK is 1, 1 on b (ranks 2-3)"]),
        ((1,), {"device_id": "GPU-0"}, "error", ["GPU GPU-0 is used by a (ranks 0-1)", "CUDA_VISIBLE_DEVICES"]),
        ((0,), {"disk": Place(total=500 * GIB, free=90 * GIB)}, "error",
         ["90.0 GiB are free at run.output_dir=runs/x (on a), but at least 110.0 GiB are needed"]),
        ((0,), {"disk": Place(total=500 * GIB, free=250 * GIB)}, "warning",
         ["run.keep_checkpoints=2", "take 310.0 GiB", "keep fewer"]),
        ((3,), {"device_memory": Place(total=24 * GIB, free=24 * GIB)}, "error",
         ["the GPU of b (rank 3) has 24.0 GiB, but at least 40.0 GiB are needed", "mmrl plan"]),
        ((3,), {"device_memory": Place(total=64 * GIB, free=64 * GIB)}, "warning",
         ["the GPU of b (rank 3) has 64.0 GiB, but about 70.0 GiB are needed", "mmrl plan"]),
        ((0, 1), {"memory": Place(total=500 * GIB, free=200 * GIB)}, "warning",
         ["200.0 GiB are free in memory of a (ranks 0-1), but about 300.0 GiB are needed"]),
        ((3,), {"device_memory": Place(total=80 * GIB, free=50 * GIB)}, "warning",
         ["only 50.0 GiB of 80.0 GiB are free on the GPU of b (rank 3)", "nvidia-smi"]),
        ((2, 3), {"shm": Place(total=64 << 20, free=64 << 20)}, "warning", ["64 MiB on b (ranks 2-3)", "--shm-size"]),
        ((2, 3), {"device": "NVIDIA A100"}, "warning", ["H200 on a (ranks 0-1) and NVIDIA A100 on b (ranks 2-3)"]),
        ((2, 3), {"clock_s": 1e9 - 40}, "warning", ["the clock of", "off by", "NTP"]),
        ((1,), {"environment": {}}, "warning", ["NCCL_DEBUG is WARN on", "not set on a (rank 1)"]),
    ],
)  # fmt: skip
def test_a_planted_difference_is_found(
    ranks: tuple[int, ...], values: dict[str, object], level: str, words: list[str]
) -> None:
    (finding,) = messages(changed(*ranks, **values))
    assert finding.level == level
    for word in words:
        assert word in finding.message


def test_of_two_configurations_every_key_that_differs_is_named() -> None:
    settings = [{"optim.lr": "0.001", "run.seed": "0"}] * 3 + [{"optim.lr": "0.002", "run.seed": "0"}]
    (finding,) = messages(changed(3, config_hash="c1"), settings=settings)
    assert finding.level == "error"
    assert finding.message.startswith("optim.lr is 0.001 on a (ranks 0-1), b (rank 2) and 0.002 on b (rank 3);")


def test_without_gpus_memory_and_shared_memory_are_those_of_all_ranks_of_a_host() -> None:
    facts = changed(0, 1, 2, 3, device="CPU", device_id="", device_memory=None, shm=Place(total=9 * GIB, free=9 * GIB))
    facts[2] = replace(facts[2], memory=Place(total=100 * GIB, free=79 * GIB))
    needs = replace(NEEDS, shared_weights=5 * GIB)
    found = [finding.message for finding in messages(facts, needs)]
    assert found[0].startswith("9.0 GiB are free in /dev/shm of a (ranks 0-1), but at least 10.0 GiB are needed")
    assert found[1].startswith("79.0 GiB are free in memory of b (ranks 2-3), but at least 80.0 GiB are needed")
    assert len(found) == 3


def test_a_group_much_slower_than_its_like_is_named() -> None:
    speeds = [
        GroupSpeed(kind="data", ranks=(rank,), num_bytes=10**9, seconds=0.5 if rank == 3 else 0.1) for rank in range(4)
    ]
    (finding,) = messages(FACTS, speeds=speeds)
    assert finding.level == "warning"
    assert "the data group of b (rank 3) runs at 2 GB/s, the median of such groups at 10 GB/s" in finding.message
    assert messages(FACTS, speeds=speeds[2:]) == []  # too few to say what is usual


def test_errors_come_first() -> None:
    facts = changed(1, port="no", environment={})
    assert [finding.level for finding in messages(facts)] == ["error", "warning"]
