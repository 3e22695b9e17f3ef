"""The roll call: every rank says what it has and sees, all learn all of it, and each comes to the same findings."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mmrl import pulse
from megatron_mmrl.cluster.rollcall.bandwidth import GroupSpeed, by_kind, measure_groups
from megatron_mmrl.cluster.rollcall.facts import Facts, compared_settings, own_facts
from megatron_mmrl.cluster.rollcall.findings import Finding, find, whose
from megatron_mmrl.cluster.rollcall.needs import Needs, needs_of
from megatron_mmrl.cluster.rollcall.shared_dir import shared_problem
from megatron_mmrl.config import Config, ConfigError
from megatron_mmrl.parallel.collectives import Collectives


@dataclass(frozen=True, slots=True, kw_only=True)
class RollCall:
    """What came of it, equal on every rank."""

    facts: Sequence[Facts]
    speeds: Sequence[GroupSpeed]
    findings: Sequence[Finding]

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]


@pulse.phase("roll call")
def call_roll(config: Config, exchange: Collectives) -> RollCall:
    """Compare all ranks and measure their connections. Collective; reads no weights, starts nothing."""
    shared = shared_problem(Path(config.run.output_dir), exchange)
    exchange.barrier()
    facts = exchange.all_gather(own_facts(config, rank=exchange.rank, shared=shared, clock_s=time.time()))
    alike = len({each.config_hash for each in facts}) == 1
    settings = [] if alike else exchange.all_gather(compared_settings(config))
    speeds = measure_groups(exchange)
    needs = _needs(config, facts) if all(each.model_is_read for each in facts) else None
    found = find(facts, output_dir=config.run.output_dir, needs=needs, settings=settings, speeds=speeds)
    return RollCall(facts=facts, speeds=speeds, findings=exchange.broadcast(found))


def _needs(config: Config, facts: Sequence[Facts]) -> Needs:
    memory = facts[0].device_memory
    return needs_of(config, gpu_bytes=memory.total if memory else None, ranks_per_node=facts[0].local_world_size)


def require_agreement(roll: RollCall, rank: int) -> None:
    """Rank 0 prints the findings, and to its log how fast the groups are. Raises ConfigError when one is an error."""
    if rank == 0:
        for finding in roll.findings:
            print(finding, flush=True)
        for kind in by_kind(roll.speeds):
            hosts = whose([roll.facts[each] for each in kind.slowest.ranks])
            slowest = f"{kind.slowest.gb_per_s:.3g} GB/s in the slowest, {hosts}"
            print(f"all-reduce in {kind.num_groups} {kind.kind} group(s): {slowest}", file=sys.stderr, flush=True)
    if roll.errors:
        more = f" (and {len(roll.errors) - 1} more, above)" if len(roll.errors) > 1 else ""
        raise ConfigError(f"{roll.errors[0].message}{more}")
