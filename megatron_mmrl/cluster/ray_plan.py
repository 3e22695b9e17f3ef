"""Which nodes of a Ray cluster do what, decided from a list of what they have, and in words. Pure: no ray here."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_mmrl.cluster.job import Job, shell_line

_LISTED = 20  # nodes in a message
# What the ranks get of the environment of `mmrl launch ray`. The nodes' own variables are those that Ray was started
# with; names that look like a secret are left out, as Ray's connections are not encrypted.
PASSED_PREFIXES = ("GLOO_", "HF_", "NCCL_", "NVTE_", "SGLANG_", "TORCH_", "UCX_")
PASSED_NAMES = ("OMP_NUM_THREADS", "PYTHONPATH")
_SECRET_SIGNS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


class ShortageError(Exception):
    """The cluster does not have, or not free, what a job needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one node's ranks reserve."""

    gpus: int
    cpus: int

    @property
    def bundle(self) -> dict[str, float]:
        """As Ray's placement groups take it."""
        return {name: float(number) for name, number in (("GPU", self.gpus), ("CPU", self.cpus)) if number}

    def fits(self, node: ClusterNode) -> bool:
        """Whether the node has so much free."""
        return node.free_gpus >= self.gpus and node.free_cpus >= self.cpus


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNode:
    """A node that is up, and what is free on it."""

    id: str  # Ray's
    address: str
    name: str  # of the host
    gpus: int
    cpus: int
    free_gpus: int
    free_cpus: int

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Processes for the ranks on CPUs that no rank needs: a server on each of some nodes.

    ``python -m module --address A`` prints its port and serves until it is killed. Ranks find the servers as
    ``address:port:cpus``, with commas between, in the variable ``endpoints``; ``key`` is the variable in which ranks
    and servers get the same random text.
    """

    module: str
    cpus: int
    endpoints: str
    key: str


def demand_of(ranks_per_node: int, cpus_per_rank: int | None) -> Demand:
    """One GPU and one CPU for each rank; with ``cpus_per_rank`` no GPU and so many CPUs."""
    if cpus_per_rank is None:
        return Demand(gpus=ranks_per_node, cpus=ranks_per_node)
    return Demand(gpus=0, cpus=ranks_per_node * cpus_per_rank)


def choose_nodes(nodes: Sequence[ClusterNode], demand: Demand, count: int) -> list[ClusterNode]:
    """``count`` nodes that fit, those with the least to spare, in the order of their addresses.

    Raises:
        ShortageError: there are fewer; lists what the cluster has.
    """
    fitting = sorted(
        (node for node in nodes if demand.fits(node)),
        key=lambda node: (node.free_gpus, node.free_cpus, _by_address(node)),
    )
    if len(fitting) < count:
        wanted = " and ".join(f"{number:.0f} {name}" for name, number in demand.bundle.items())
        raise ShortageError(
            f"{count} nodes with {wanted} free are needed, {len(fitting)} found; the cluster has {_listed(nodes)}"
        )
    return sorted(fitting[:count], key=_by_address)


def choose_spare_cpus(
    nodes: Sequence[ClusterNode], ranks_on: Collection[str], demand: Demand, cpus: int
) -> list[tuple[ClusterNode, int]]:
    """Up to ``cpus`` CPUs: of nodes without ranks first, the largest first, then what ranks leave of theirs.

    Args:
        nodes: all nodes, before the ranks reserved anything.
        ranks_on: ids of the nodes that ranks run on.
        demand: what they reserve there.
        cpus: how many are wanted.
    """
    spare = [(node, node.free_cpus - (demand.cpus if node.id in ranks_on else 0)) for node in nodes]
    spare.sort(key=lambda item: (item[0].id in ranks_on, -item[1], _by_address(item[0])))
    chosen = []
    for node, free in spare:
        share = min(free, cpus)
        if share > 0:
            chosen.append((node, share))
            cpus -= share
    return chosen


def passed_on(environment: Mapping[str, str], names: Collection[str] = ()) -> dict[str, str]:
    """What the ranks get of ``environment``: known prefixes and names, and ``names`` that the user asked for."""
    known = {
        name: value
        for name, value in environment.items()
        if (name in PASSED_NAMES or name.startswith(PASSED_PREFIXES))
        and not any(sign in name for sign in _SECRET_SIGNS)
    }
    asked = {name: environment[name] for name in names if name in environment}
    return dict(sorted((known | asked).items()))


def node_arguments(job: Job, node: int, master: tuple[str, int | str], attempt: int | str, *, again: bool) -> list[str]:
    """Python's arguments for one node's share; ``again``: continue from the newest whole checkpoint."""
    address, port = master
    resume = ["run.resume=auto"] if again else []
    return [
        *("-m", "megatron_mmrl.cli", "launch", "torchrun"),
        *job.arguments([f"cluster.master_port={port}", *resume]),
        *("--nodes", str(job.topology.num_nodes), "--gpus-per-node", str(job.topology.ranks_per_node)),
        *("--node", str(node), "--master-addr", address, "--log-dir", str(job.log_dir(attempt))),
    ]


def describe_launch(
    job: Job, demand: Demand, environment: Mapping[str, str], directory: str, service: Service | None
) -> str:
    """What would be asked of Ray and run, as YAML comments; equal for equal input. Ends with a line break."""
    bundle = ", ".join(f"{name}: {number:g}" for name, number in demand.bundle.items())
    lines = [f"in the directory {directory} of every node, with the variables of its Ray and"]
    lines += [f"  {shell_line([f'{name}={value}'])}" for name, value in environment.items()]
    if service is not None:
        lines += [f"  {service.key}=(random)  {service.endpoints}=(address:port:cpus of the servers below)"]
    for node in range(job.topology.num_nodes):
        command = ["python", *node_arguments(job, node, ("NODE0", "PORT"), "N", again=False)]
        lines += ["", f"node {node}: placement group STRICT_PACK [{{{bundle}}}], one actor, which runs"]
        lines += [f"  {shell_line(command)}"]
    if service is not None:
        command = ["python", "-m", service.module, "--address", "NODE"]
        lines += ["", f"on up to {service.cpus} CPUs that no rank needs, one actor on each node, which runs"]
        lines += [f"  {shell_line(command)}"]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _by_address(node: ClusterNode) -> tuple[int, str]:
    try:
        return int(ipaddress.ip_address(node.address)), node.id
    except ValueError:
        return 0, node.address


def _listed(nodes: Sequence[ClusterNode]) -> str:
    lines = [
        f"{node}: {node.free_gpus} of {node.gpus} GPUs and {node.free_cpus} of {node.cpus} CPUs free"
        for node in sorted(nodes, key=_by_address)
    ]
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "; ".join([*lines[:_LISTED], *more]) or "no node that is up"
