"""Joining the world, telling each other objects, and the CPU stand-ins' reach."""

import os
import socket
import time

import pytest
import torch

from megatron_mmrl.config.parallel import ParallelConfig
from tests.dist.launch import RankFailedError, run_ranks

TWO = ParallelConfig(data_parallel_size=2)


def _exchange() -> dict[str, object]:
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.parallel.state import initialize, shutdown

    layout = initialize(TWO, seed=3)
    ranks = Collectives()
    try:
        ranks.sum({"a" if ranks.rank else "b": 1.0})
    except ValueError as error:
        refused = str(error)
    said = {
        "layout": layout.world_size,
        "gathered": ranks.all_gather({"rank": ranks.rank}),
        "broadcast": ranks.broadcast(f"from {ranks.rank}", src=1),
        "sum": ranks.sum({"x": 0.1 * (1 + ranks.rank), "y": 1.0}),
        "refused": refused,
        "draw": torch.rand(1).item(),
    }
    ranks.barrier()
    shutdown()
    shutdown()
    return said


def test_objects_travel_between_ranks() -> None:
    first, second = run_ranks(_exchange, 2)
    assert first == second
    assert first["layout"] == 2
    assert first["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert first["broadcast"] == "from 1"
    assert first["sum"] == {"x": pytest.approx(0.3), "y": 2.0}
    assert first["refused"] == "rank 0 sums ['b'], rank 1 sums ['a']"


def _join_as(parallel: ParallelConfig) -> str:
    from megatron_mmrl.parallel.state import initialize

    try:
        initialize(parallel, seed=0)
    except ValueError as error:
        return str(error)
    raise AssertionError("joined a world of another size")


def test_a_world_of_another_size_is_refused_with_both_numbers() -> None:
    messages = run_ranks(_join_as, 2, ParallelConfig(tensor_model_parallel_size=3))
    assert all("WORLD_SIZE=2 processes were started, but the parallel sizes need 3" in message for message in messages)


def _join_unlike_the_others(parallel: ParallelConfig, others: ParallelConfig) -> str:
    return _join_as(parallel if os.environ["RANK"] == "2" else others)


def test_ranks_with_other_parallel_sizes_are_named_before_they_wait_for_each_other() -> None:
    pairs = ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=2)
    stages = ParallelConfig(pipeline_model_parallel_size=2, data_parallel_size=2)
    messages = run_ranks(_join_unlike_the_others, 4, stages, pairs)
    assert len(set(messages)) == 1
    host = socket.gethostname()
    assert messages[0] == (
        f"the parallel sizes are tensor 2 x pipeline 1 x context 1 x data 2 on rank 0 ({host}), "
        f"but tensor 1 x pipeline 2 x context 1 x data 2 on rank 2 ({host}); "
        "start every rank with the same configuration"
    )


def _stand_ins() -> None:
    from megatron.core.tensor_parallel import layers, random

    from megatron_mmrl.parallel.state import initialize, shutdown

    real = dict(vars(torch)), dict(vars(torch.cuda))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # a world of its own needs no environment
    initialize(ParallelConfig(), seed=0)
    assert layers.torch.cuda.current_device() == torch.device("cpu")
    assert layers.torch.zeros(1, device="cuda").device.type == "cpu"
    before = torch.get_rng_state()
    with random.get_cuda_rng_tracker().fork():
        assert not torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)
    assert (dict(vars(torch)), dict(vars(torch.cuda))) == real
    shutdown()


@pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for the CPU")
def test_stand_ins_reach_megatron_and_leave_torch_alone() -> None:
    run_ranks(_stand_ins, 1)


def _fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise RuntimeError("planted")
    time.sleep(60)


def _vanish() -> None:
    os._exit(3)


def test_launcher_reports_a_rank_that_fails_or_vanishes() -> None:
    with pytest.raises(RankFailedError, match="RuntimeError: planted"):
        run_ranks(_fail_on_rank_one, 2)
    with pytest.raises(RankFailedError, match="rank 0 ended with exit code 3 and no result"):
        run_ranks(_vanish, 1)
