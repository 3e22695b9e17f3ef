"""What is wrong with the facts that all ranks gave. Pure: the same facts give the same findings on every rank."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_mmrl.cluster.rollcall.bandwidth import GroupSpeed, by_kind
from megatron_mmrl.cluster.rollcall.facts import Facts, Place
from megatron_mmrl.cluster.rollcall.needs import Needs
from megatron_mmrl.cluster.stall import numbers

_GIB = 1 << 30
_MIN_SHM = _GIB  # NCCL and torch exchange data there; containers have 64 MB of it unless told otherwise
_BUSY_SHARE = 0.85  # of a device's memory; less is free: something else runs there
_CLOCK_S = 5.0
_SLOW_SHARE = 0.5  # of the median of groups of a kind
_MIN_GROUPS = 3
_NOT_SET = "not set"
_SPLIT = "split the model over more ranks (mmrl plan)"
_ENLARGE = "enlarge it (mount -o remount,size=..., --shm-size in a container)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong; an error ends the run."""

    level: Literal["error", "warning"]
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.message}"


def find(
    facts: Sequence[Facts],
    *,
    output_dir: str,
    needs: Needs | None = None,
    settings: Sequence[Mapping[str, str]] = (),
    speeds: Sequence[GroupSpeed] = (),
) -> list[Finding]:
    """Everything that is wrong, errors first.

    Args:
        facts: of every rank, in rank order.
        output_dir: ``run.output_dir``.
        needs: what the run needs; None when the model cannot be read.
        settings: of every rank, where their hashes differ.
        speeds: of the groups.
    """
    errors = [*_software(facts), *_configuration(facts, settings), *_paths(facts, output_dir), *_ranks(facts)]
    warnings = [*_environment(facts), *_clocks(facts), *_devices(facts), *_slow_groups(facts, speeds)]
    room = list(_room(facts, needs, output_dir)) if needs else []
    found = [Finding(level="error", message=text) for text in errors]
    found += [Finding(level="warning", message=text) for text in warnings]
    return sorted([*found, *room], key=lambda finding: finding.level != "error")


def whose(facts: Iterable[Facts]) -> str:
    """``a (ranks 0-7), b (ranks 8-15)``."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for each in facts:
        by_host[each.host].append(each.rank)
    return ", ".join(f"{host} ({numbers(ranks)})" for host, ranks in by_host.items())


def size(num_bytes: int) -> str:
    """``1.5 GiB``, ``20 MiB``."""
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / (1 << 20):.0f} MiB"


def _differing(facts: Sequence[Facts], values: Iterable[str]) -> str | None:
    """``X on a (rank 0) and Y on b (rank 1)``, of one value for each of ``facts``; None when all are equal."""
    ranks: dict[str, list[Facts]] = defaultdict(list)
    for each, value in zip(facts, values, strict=True):
        ranks[value].append(each)
    if len(ranks) <= 1:
        return None
    return " and ".join(f"{found} on {whose(those)}" for found, those in ranks.items())


def _software(facts: Sequence[Facts]) -> Iterator[str]:
    for name in dict.fromkeys(name for each in facts for name in each.versions):
        differing = _differing(facts, [each.versions.get(name, _NOT_SET) for each in facts])
        if differing:
            yield f"{name} is {differing}; install the same everywhere"


def _configuration(facts: Sequence[Facts], settings: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for key in dict.fromkeys(key for values in settings for key in values):
        differing = _differing(facts, [values.get(key, _NOT_SET) for values in settings])
        if differing:
            yield f"{key} is {differing}; start every rank with the same configuration"


def _paths(facts: Sequence[Facts], output_dir: str) -> Iterator[str]:
    problems: dict[str, list[Facts]] = defaultdict(list)
    for each in facts:
        problems[each.shared].append(each)
    for problem, those in problems.items():
        if problem:
            yield (
                f"run.output_dir={output_dir} is not one writable directory for all: on {whose(those)}, {problem}; "
                f"rank 0 is on {facts[0].host}; name a directory on a file system that all nodes mount"
            )
    unread = [each for each in facts if not each.model_is_read]
    if unread:
        yield f"model.path cannot be read on {whose(unread)}: {unread[0].model}; copy or mount it there"
    read = [each for each in facts if each.model_is_read]
    differing = _differing(read, [each.model for each in read])
    if differing:
        yield f"config.json under model.path has hash {differing}; give all nodes the same checkpoint"
    for each in facts:
        if each.port:
            yield f"no port can be opened on loopback on {whose([each])}: {each.port}; engines need one"


def _ranks(facts: Sequence[Facts]) -> Iterator[str]:
    nodes: dict[int, list[Facts]] = defaultdict(list)
    for each in facts:
        nodes[each.node].append(each)
    for node, those in nodes.items():
        claimed = {each.local_world_size for each in those}
        if claimed != {len(those)}:
            sizes = ", ".join(map(str, sorted(claimed)))
            yield (
                f"node {node} has {len(those)} ranks on {whose(those)}, but LOCAL_WORLD_SIZE={sizes} there; "
                "start the same number of ranks on every node and give each node its own GROUP_RANK"
            )
        elif len({each.local_rank for each in those}) < len(those):
            local = ", ".join(str(each.local_rank) for each in those)
            yield f"node {node}: LOCAL_RANK is {local} on {whose(those)}; each rank of a node needs its own"
    devices: dict[str, list[Facts]] = defaultdict(list)
    for each in facts:
        devices[each.device_id].append(each)
    for device, those in devices.items():
        if device and len(those) > 1:
            yield f"GPU {device} is used by {whose(those)}; start one rank per GPU, and look at CUDA_VISIBLE_DEVICES"


def _environment(facts: Sequence[Facts]) -> Iterator[str]:
    for name in sorted({name for each in facts for name in each.environment}):
        differing = _differing(facts, [each.environment.get(name, _NOT_SET) for each in facts])
        if differing:
            yield f"the variable {name} is {differing}; set it alike"


def _clocks(facts: Sequence[Facts]) -> Iterator[str]:
    middle = statistics.median(each.clock_s for each in facts)
    off = [each for each in facts if abs(each.clock_s - middle) > _CLOCK_S]
    if off:
        seconds = max((each.clock_s - middle for each in off), key=abs)
        yield (
            f"the clock of {whose(off)} is off by {seconds:+.0f} s; logs and the order of failures over nodes will be "
            "wrong: synchronise it (NTP)"
        )


def _devices(facts: Sequence[Facts]) -> Iterator[str]:
    differing = _differing(facts, [each.device for each in facts])
    if differing:
        yield f"the device is {differing}; all ranks go as slow as the slowest"
    for each in facts:
        memory = each.device_memory
        if memory and memory.free < _BUSY_SHARE * memory.total:
            yield (
                f"only {size(memory.free)} of {size(memory.total)} are free on the GPU of {whose([each])}; "
                "end what else runs there (nvidia-smi)"
            )
    small = [each for each in facts if each.device_memory and each.shm.total < _MIN_SHM and each.local_world_size > 1]
    if small:
        yield (
            f"/dev/shm has {size(small[0].shm.total)} on {whose(small)}; ranks of a node exchange data there: give the "
            "container more (--shm-size=16g, or --ipc=host)"
        )


def _slow_groups(facts: Sequence[Facts], speeds: Sequence[GroupSpeed]) -> Iterator[str]:
    for kind in by_kind(speeds):
        slowest, median = kind.slowest, kind.median_gb_per_s
        if kind.num_groups >= _MIN_GROUPS and slowest.gb_per_s < _SLOW_SHARE * median:
            yield (
                f"all-reduce in the {kind.kind} group of {whose([facts[rank] for rank in slowest.ranks])} runs at "
                f"{slowest.gb_per_s:.2g} GB/s, the median of such groups at {median:.2g} GB/s; look at cables, NICs "
                "and NCCL_SOCKET_IFNAME of these hosts"
            )


def _room(facts: Sequence[Facts], needs: Needs, output_dir: str) -> Iterator[Finding]:
    yield from _room_on_disk(facts[0], needs, output_dir)
    hosts: dict[str, list[Facts]] = defaultdict(list)
    for each in facts:
        hosts[each.host].append(each)
        if each.device_memory:
            yield from _room_on_gpu(each, each.device_memory, needs)
    for those in hosts.values():
        what = f"{size(those[0].memory.free)} are free in memory of {whose(those)}"
        if those[0].device_memory:
            if those[0].memory.free < needs.host:
                yield _probably_too_small(what, needs.host)
            continue
        if those[0].memory.free < needs.parameters * len(those):
            yield _too_small(what, needs.parameters * len(those), _SPLIT)
        if those[0].shm.free < needs.shared_weights * len(those):
            what = f"{size(those[0].shm.free)} are free in /dev/shm of {whose(those)}"
            yield _too_small(what, needs.shared_weights * len(those), _ENLARGE)


def _room_on_gpu(each: Facts, memory: Place, needs: Needs) -> Iterator[Finding]:
    what = f"the GPU of {whose([each])} has {size(memory.total)}"
    if memory.total < needs.parameters:
        yield _too_small(what, needs.parameters, _SPLIT)
    elif memory.total < needs.gpu_peak:
        yield _probably_too_small(what, needs.gpu_peak)


def _room_on_disk(first: Facts, needs: Needs, output_dir: str) -> Iterator[Finding]:
    disk: Place | None = first.disk
    if disk is None:
        return
    once, all_kept = needs.checkpoint + needs.export, needs.checkpoint * (needs.kept_checkpoints + 1) + needs.export
    what = f"{size(disk.free)} are free at run.output_dir={output_dir} (on {first.host})"
    if disk.free < once:
        yield _too_small(what, once, "free some, or name another directory")
    elif disk.free < all_kept:
        kept = f"run.keep_checkpoints={needs.kept_checkpoints} and one in the making take {size(all_kept)}"
        yield Finding(level="warning", message=f"{what}, but {kept}; free some, or keep fewer")


def _too_small(what: str, needed: int, advice: str) -> Finding:
    return Finding(level="error", message=f"{what}, but at least {size(needed)} are needed; {advice}")


def _probably_too_small(what: str, needed: int) -> Finding:
    return Finding(level="warning", message=f"{what}, but about {size(needed)} are needed; see mmrl plan")
