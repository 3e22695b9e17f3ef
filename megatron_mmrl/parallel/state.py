"""Start and end of the process groups, from torchrun's environment or as a single process."""

from __future__ import annotations

import os
import random
import socket
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from megatron_mmrl.config import ConfigError
from megatron_mmrl.config.checks import require
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.parallel import cpu_stand_ins
from megatron_mmrl.parallel.collectives import Collectives
from megatron_mmrl.parallel.device import backend, device, on_cuda
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.parallel.network import interface_towards, only_meant_here


def initialize(parallel: ParallelConfig, seed: int, network_interface: str | None = None) -> ParallelLayout:
    """Join the world, build Megatron's groups, seed every generator.

    Reads ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``; without them this process is a world of its
    own and opens no port. ``seed`` is the run's seed, equal on every rank. ``network_interface`` is for connections
    between nodes; unset: the one that leads to ``MASTER_ADDR``. ``GLOO_SOCKET_IFNAME`` and ``NCCL_SOCKET_IFNAME`` win.

    Raises:
        ValueError: ``WORLD_SIZE`` is not the product of the parallel sizes, these are not the same on every rank, or
            nothing leads to ``MASTER_ADDR``.
    """
    layout = ParallelLayout.from_config(parallel)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    require(
        world == layout.world_size,
        f"WORLD_SIZE={world} processes were started, but the parallel sizes need {layout.world_size} ({layout}); start "
        f"{layout.world_size} processes or change parallel.data_parallel_size",
    )
    if on_cuda():
        torch.cuda.set_device(device())
    timeout = timedelta(seconds=parallel.timeout_s)
    _join_world(world, timeout, network_interface)
    _require_one_layout(layout)
    cpu_stand_ins.install()
    _build_megatron_groups(parallel, timeout)
    _seed(seed)
    return layout


def initialize_alone(parallel: ParallelConfig, rank: int) -> None:
    """Be rank ``rank`` of a world whose other ranks do not exist: groups are there, collectives move nothing.

    For looking at a rank's part of a model; ``shutdown`` ends it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    cpu_stand_ins.install()
    _build_megatron_groups(parallel, timedelta(seconds=parallel.timeout_s), gloo_groups=False)
    _seed(0)


def communication_groups() -> dict[str, dist.ProcessGroup]:
    """This rank's groups by the name of what they share, those of one rank left out."""
    from megatron.core import parallel_state

    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
    }
    return {name: group for name, group in groups.items() if group.size() > 1}


def shutdown() -> None:
    """Leave the world; safe to call twice. A gloo process that ends without this may abort."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _join_world(world: int, timeout: timedelta, network_interface: str | None) -> None:
    if "RANK" not in os.environ:
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=world, timeout=timeout)
        return
    # By itself gloo asks what this host's name stands for, which other hosts may not reach, or all the world may.
    interface = network_interface or os.environ.get("GLOO_SOCKET_IFNAME") or _interface_to_master(world)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # NCCL takes a bare name for a prefix
    dist.init_process_group(backend(), timeout=timeout)


def _interface_to_master(world: int) -> str:
    master = os.environ["MASTER_ADDR"]
    interface = interface_towards(master)
    require(
        world == int(os.environ.get("LOCAL_WORLD_SIZE", world)) or not only_meant_here(master),
        f"MASTER_ADDR={master} stands for loopback on {socket.gethostname()} (/etc/hosts), where other nodes reach "
        "nothing; give node 0's address, or name its interface in cluster.network_interface",
    )
    return interface


def _require_one_layout(layout: ParallelLayout) -> None:
    """Ranks with other sizes would build other groups, each waiting for the others for ever."""
    ranks = Collectives().all_gather((layout, socket.gethostname()))
    others = [rank for rank, (theirs, _) in enumerate(ranks) if theirs != ranks[0][0]]
    if others:
        (first, host), (other, other_host) = ranks[0], ranks[others[0]]
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        raise ConfigError(
            f"the parallel sizes are {first} on rank 0 ({host}), but {other} on rank {others[0]} ({other_host}){more}; "
            "start every rank with the same configuration"
        )


def _build_megatron_groups(parallel: ParallelConfig, timeout: timedelta, *, gloo_groups: bool = True) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
        create_gloo_process_groups=gloo_groups,
    )


def _seed(seed: int) -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
