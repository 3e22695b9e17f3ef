"""A run on a Ray cluster: a place for each node's share, servers on spare CPUs, and another attempt after a loss.

Ray only reserves the places and starts one process on each, ``mmrl launch torchrun``; the ranks know nothing of it.
"""

from __future__ import annotations

import math
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from megatron_mmrl.cluster.job import Job
from megatron_mmrl.cluster.ray_child import Report
from megatron_mmrl.cluster.ray_place import Place, cluster_nodes, poll
from megatron_mmrl.cluster.ray_plan import (
    ClusterNode,
    Demand,
    Service,
    ShortageError,
    choose_nodes,
    choose_spare_cpus,
    node_arguments,
)
from megatron_mmrl.cluster.ray_watch import End, LostNodeError, Watch, interrupted
from megatron_mmrl.cluster.stop import EXIT_REQUEUE
from megatron_mmrl.cluster.torchrun import Requests
from megatron_mmrl.config import ConfigError

_WAIT_FOR_ROOM_S = 20.0  # what other jobs hold may become free
_WAIT_FOR_NODES_S = 300.0  # after a loss: a node in its stead may join
_WAIT_FOR_SERVER_S = 60.0
_DOUBTED_S = 30.0  # after a loss: for so long Ray may take a dead node for alive


@dataclass(frozen=True, slots=True, kw_only=True)
class RayRun:
    """A job, and what is asked of the cluster for it."""

    job: Job
    demand: Demand
    environment: Mapping[str, str]  # added to that of the nodes
    service: Service | None
    max_restarts: int


def run_on_ray(run: RayRun) -> int:
    """Run a job to its end on the cluster that this process has joined; no process of it is left then.

    To be called from the main thread, after ``connect``. SIGTERM or SIGUSR1 asks all ranks to save and leave; a second
    one, or SIGINT, ends them at once.

    Returns:
        As ``mmrl train``: 0; EXIT_REQUEUE when saved as asked; 128 + signal number when interrupted; else the exit
        code of the cause, which is the last line on standard error.

    Raises:
        ConfigError: the cluster has no room for the job, or one of its nodes cannot run it.
    """
    requests = Requests(once=True)
    lost: dict[str, float] = {}  # when, by id of the node
    first = _first_free_attempt(run.job)
    for number in range(first, first + run.max_restarts + 1):
        if number > first:
            print(f"starting again from the newest whole checkpoint: attempt_{number}", file=sys.stderr)
        with ExitStack() as stack:
            attempt = Attempt(stack=stack, run=run, number=number, again=number > first)
            end = attempt.until_end(requests, lost)
            lost |= dict.fromkeys(attempt.lost_nodes(), time.monotonic())
        if end.message:
            logs = run.job.log_dir(number)
            print(f"logs of the ranks: {logs}/rank*.log, of the nodes: {logs}/node*.log", file=sys.stderr)
            print(end.message, file=sys.stderr, flush=True)
        if not end.may_start_again or requests.to_stop:
            break
    return end.code


def _first_free_attempt(job: Job) -> int:
    """Logs of earlier runs in the same directory stay."""
    number = 0
    while job.log_dir(number).exists():
        number += 1
    return number


@dataclass(slots=True, kw_only=True)
class Attempt:
    """Reserves room and starts what belongs there; ``stack`` gives all of it back."""

    stack: ExitStack
    run: RayRun
    number: int
    again: bool  # continue from the newest checkpoint
    places: list[Place] = field(default_factory=list)  # all of them
    ranks: list[Place] = field(default_factory=list)
    servers: list[Place] = field(default_factory=list)  # those that are there

    def until_end(self, requests: Requests, lost: Mapping[str, float]) -> End:
        """Run to the end. ``lost``: when nodes were, by their ids, on the monotonic clock."""
        try:
            room = self._wait_for_room(requests, lost)
            if room is None:  # nothing has begun
                return interrupted(requests.to_end) if requests.to_end else End(code=EXIT_REQUEUE)
            self._start(dict(self.run.environment) | self._reserve(*room))
        except LostNodeError as error:
            return End(code=1, message=f"error: {error}")
        except ShortageError as error:
            raise ConfigError(str(error)) from error
        return Watch(self.ranks, self._poll, requests, self.run.job.log_dir(self.number)).until_end()

    def lost_nodes(self) -> set[str]:
        """Ids of nodes that were lost on the way."""
        return {place.node.id for place in self.places if place.is_lost}

    def _wait_for_room(
        self, requests: Requests, lost: Mapping[str, float]
    ) -> tuple[list[ClusterNode], list[ClusterNode]] | None:
        """All nodes, and those for the ranks; None when asked to stop. Raises ShortageError if there is no room."""
        demand, count = self.run.demand, self.run.job.topology.num_nodes
        deadline = time.monotonic() + (_WAIT_FOR_NODES_S if self.again else _WAIT_FOR_ROOM_S)
        while not requests.to_stop and requests.to_end is None:
            now = time.monotonic()
            nodes = [node for node in cluster_nodes() if now - lost.get(node.id, -math.inf) > _DOUBTED_S]
            try:
                return nodes, choose_nodes(nodes, demand, count)
            except ShortageError:
                could = sum(node.gpus >= demand.gpus and node.cpus >= demand.cpus for node in nodes) >= count
                if now > deadline or not (could or self.again):
                    raise
            time.sleep(0.5)
        return None

    def _reserve(self, nodes: Sequence[ClusterNode], chosen: Sequence[ClusterNode]) -> dict[str, str]:
        """Take the places, start the servers; what the ranks need to know of these."""
        demand, service = self.run.demand, self.run.service
        for index, node in enumerate(chosen):
            self.ranks.append(self._place(node, f"node {index}", demand))
        if service is None:
            return {}
        spare = choose_spare_cpus(nodes, {node.id for node in chosen}, demand, service.cpus)
        found = sum(cpus for _, cpus in spare)
        if found < service.cpus:
            print(f"{found} of the {service.cpus} CPUs asked for besides the ranks' are free", file=sys.stderr)
        key = {service.key: secrets.token_hex(32)}
        ports = []
        for node, cpus in spare:
            place = self._place(node, "server", Demand(gpus=0, cpus=cpus))
            self.servers.append(place)
            arguments = ["-m", service.module, "--address", node.address]
            errors = self.run.job.log_dir(self.number) / f"server-{node.address}.log"
            place.start(arguments, dict(self.run.environment) | key, os.getcwd(), errors)
            ports.append(f"{node.address}:{_port_of(place)}:{cpus}")
        return key | {service.endpoints: ",".join(ports)}

    def _start(self, environment: Mapping[str, str]) -> None:
        job = self.run.job
        master = (self.ranks[0].node.address, self.ranks[0].free_port())
        for index, place in enumerate(self.ranks):
            arguments = node_arguments(job, index, master, self.number, again=self.again)
            place.start(arguments, environment, os.getcwd(), job.log_dir(self.number) / f"node{index}.log")

    def _place(self, node: ClusterNode, what: str, demand: Demand) -> Place:
        python_path = {name: value for name, value in self.run.environment.items() if name == "PYTHONPATH"}
        place = Place(node, what, demand, python_path)
        self.stack.callback(place.close)
        self.places.append(place)
        return place

    def _poll(self) -> list[Report | LostNodeError | None]:
        answers = poll([*self.ranks, *self.servers])
        for place, answer in zip(list(self.servers), answers[len(self.ranks) :], strict=True):
            if isinstance(answer, LostNodeError):
                print(f"warning: {answer}; the run goes on without it", file=sys.stderr)
                self.servers.remove(place)
        return answers[: len(self.ranks)]


def _port_of(place: Place) -> int:
    """The first line of a server's output."""
    deadline = time.monotonic() + _WAIT_FOR_SERVER_S
    printed = b""
    while not printed.endswith(b"\n"):
        (report,) = poll([place])
        if isinstance(report, LostNodeError):
            raise report
        if report is not None:
            printed += report.output
            if report.code is not None:
                raise ConfigError(f"the server on {place.node} ended with code {report.code}: {report.last_error}")
        if time.monotonic() > deadline:
            raise ConfigError(f"the server on {place.node} was not up after {_WAIT_FOR_SERVER_S:.0f} s")
        time.sleep(0.05)
    return int(printed)
