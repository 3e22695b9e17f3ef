"""The roll call alone: ``torchrun ... -m megatron_mmrl.doctor.cluster --config F [key=value ...]`` on every node."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megatron_mmrl.checkpoint.output_dir import LOG_DIR
from megatron_mmrl.cluster.failure import FAILURE_DIR, failure_recorded, run_rank
from megatron_mmrl.config import Config, load_config

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_mmrl.cluster.rollcall.bandwidth import GroupSpeed
    from megatron_mmrl.cluster.rollcall.call import RollCall
    from megatron_mmrl.cluster.rollcall.facts import Facts, Place

_WIDTH = 120  # of a table that goes to a file
_GIB = 1 << 30


class RollCallError(RuntimeError):
    """The ranks cannot work together; what was printed says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """One rank. Rank 0 prints; raises RollCallError on every rank when there are errors."""
    parser = argparse.ArgumentParser(prog="megatron_mmrl.doctor.cluster", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, metavar="F", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set")
    options = parser.parse_args(argv)
    roll, rank = call(load_config(options.config, options.overrides))
    if rank == 0:
        print_roll(roll, sys.stdout)
    if roll.errors:
        raise RollCallError(f"{len(roll.errors)} of the findings would end a run")
    return 0


def call(config: Config) -> tuple[RollCall, int]:
    """Join the world, call the roll, leave; the result and this process's rank."""
    from megatron_mmrl.cluster.rollcall.call import call_roll
    from megatron_mmrl.cluster.watchdog import watched
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.parallel.state import initialize, shutdown

    log_dir = Path(os.environ.get(FAILURE_DIR, Path(config.run.output_dir) / LOG_DIR))
    with ExitStack() as stack, failure_recorded():
        stack.callback(shutdown)
        stack.enter_context(watched(config.cluster.timeout_s, log_dir))
        initialize(config.parallel, config.run.seed, config.cluster.network_interface)
        exchange = Collectives()
        return call_roll(config, exchange), exchange.rank


def print_roll(roll: RollCall, stream: TextIO) -> None:
    """Hosts, groups, findings, and as the last line the verdict."""
    from rich.console import Console

    console = Console(file=stream, width=None if stream.isatty() else _WIDTH, highlight=False, soft_wrap=True)
    console.print(_hosts(roll.facts))
    if roll.speeds:
        console.print(_groups(roll.facts, roll.speeds))
    versions = ", ".join(f"{name} {version}" for name, version in roll.facts[0].versions.items())
    console.print(f"rank 0 runs {versions}", markup=False)
    for finding in roll.findings:
        console.print(str(finding), markup=False)
    hosts = len({each.host for each in roll.facts})
    ranks = len(roll.facts)
    verdict = f"{ranks} rank{'s' * (ranks > 1)} on {hosts} host{'s' * (hosts > 1)}"
    console.print(f"{verdict}: {'they cannot work together' if roll.errors else 'ready'}", markup=False)


def _hosts(facts: Sequence[Facts]) -> Table:
    from rich.table import Table

    from megatron_mmrl.cluster.rollcall.findings import whose

    table = Table(title="free GiB, and the clock against the median")
    for column in ("ranks", "device", "GPU memory", "memory", "/dev/shm", "disk", "clock"):
        table.add_column(column, justify="left" if column in ("ranks", "device") else "right")
    hosts: dict[str, list[Facts]] = defaultdict(list)
    for each in facts:
        hosts[each.host].append(each)
    middle = statistics.median(each.clock_s for each in facts)
    for those in hosts.values():
        first = those[0]
        devices = [each.device_memory for each in those if each.device_memory]
        fullest = min(devices, key=lambda place: place.free, default=None)
        places = (fullest, first.memory, first.shm, first.disk)
        table.add_row(whose(those), first.device, *map(_free, places), f"{first.clock_s - middle:+.3f} s")
    return table


def _free(place: Place | None) -> str:
    return f"{place.free / _GIB:.1f} of {place.total / _GIB:.1f}" if place else "-"


def _groups(facts: Sequence[Facts], speeds: Sequence[GroupSpeed]) -> Table:
    from rich.table import Table

    from megatron_mmrl.cluster.rollcall.bandwidth import by_kind
    from megatron_mmrl.cluster.rollcall.findings import size, whose

    table = Table(title="all-reduce, bytes of the tensor over time")
    for column in ("groups", "number", "of ranks", "tensor", "median GB/s", "slowest GB/s", "slowest group"):
        table.add_column(column, justify="left" if column in ("groups", "slowest group") else "right")
    for kind in by_kind(speeds):
        slowest = kind.slowest
        numbers = (str(kind.num_groups), str(len(slowest.ranks)), size(slowest.num_bytes))
        rates = (f"{kind.median_gb_per_s:.3g}", f"{slowest.gb_per_s:.3g}")
        table.add_row(kind.kind, *numbers, *rates, whose([facts[rank] for rank in slowest.ranks]))
    return table


if __name__ == "__main__":
    run_rank(main)
