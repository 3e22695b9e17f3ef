"""A place on a Ray cluster: room reserved on one node, and an actor there that holds one process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_mmrl.cluster.ray_child import Child, Report
from megatron_mmrl.cluster.ray_plan import ClusterNode, Demand, ShortageError
from megatron_mmrl.cluster.ray_watch import LostNodeError
from megatron_mmrl.config import ConfigError

_NODE_ID = "ray.io/node-id"  # Ray's own label
_ROOM_S = 20.0
_START_S = 120.0  # imports, on a machine where everything starts at once
_ANSWERS_S = 2.0
_LOST_S = 10.0  # an actor that does not answer for so long is gone; Ray itself needs 15 s to say so of a node


def cluster_nodes() -> list[ClusterNode]:
    """Nodes that are up, and what is free there now."""
    free = available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            has, left = node["Resources"], free.get(node["NodeID"], {})
            nodes.append(
                ClusterNode(
                    id=node["NodeID"],
                    address=node["NodeManagerAddress"],
                    name=node["NodeManagerHostname"],
                    gpus=int(has.get("GPU", 0)),
                    cpus=int(has.get("CPU", 0)),
                    free_gpus=int(left.get("GPU", 0)),
                    free_cpus=int(left.get("CPU", 0)),
                )
            )
    return nodes


class Place:
    """Reserves room on a node and starts an actor there; ``close`` gives both back, and ends what the actor holds.

    Args:
        node: where.
        what: for messages: "node 3".
        demand: how much room.
        environment: variables that the actor's Python is to find at its start.

    Raises:
        ShortageError: somebody else was faster.
    """

    def __init__(self, node: ClusterNode, what: str, demand: Demand, environment: Mapping[str, str]) -> None:
        self.node, self.what = node, what
        self.is_lost = False
        self._group = placement_group(
            [demand.bundle], strategy="STRICT_PACK", bundle_label_selector=[{_NODE_ID: node.id}]
        )
        if not self._group.wait(_ROOM_S):
            remove_placement_group(self._group)
            raise ShortageError(f"{node} had {demand.bundle} free, but does not reserve it; is another job faster?")
        where = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=0)
        options = {"num_cpus": demand.cpus, "num_gpus": demand.gpus, "scheduling_strategy": where}
        if environment:
            options["runtime_env"] = {"env_vars": dict(environment)}
        self._actor: Any = ray.remote(Child).options(**options).remote()
        self._seen = 0  # bytes of output
        self._heard_s = time.monotonic()
        self._asked: ray.ObjectRef | None = None

    def close(self) -> None:
        ray.kill(self._actor)  # the kernel ends the process that it holds
        remove_placement_group(self._group)

    def free_port(self) -> int:
        """See ``Child.free_port``."""
        port: int = self._call("free_port", self.node.address)
        return port

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], directory: str, errors: Path) -> None:
        """See ``Child.start``."""
        self._call("start", list(arguments), dict(environment), directory, errors)
        self._heard_s = time.monotonic()

    def signal(self, number: int) -> None:
        """Send the process a signal; returns at once, also when the node is lost."""
        self._actor.signal.remote(int(number))

    def ask(self) -> ray.ObjectRef:
        """Have it report; ``answer`` collects."""
        if self._asked is None:
            self._asked = self._actor.poll.remote(self._seen)
        return self._asked

    def answer(self) -> Report | LostNodeError | None:
        """What came of ``ask``; None: no answer yet."""
        try:
            report: Report = ray.get(self.ask(), timeout=0)
        except GetTimeoutError as error:
            return self._silent(error)
        except ActorUnavailableError as error:
            self._asked = None
            return self._silent(error)
        except RayActorError as error:
            return self._lost(error)
        self._asked = None
        self._seen += len(report.output)
        self._heard_s = time.monotonic()
        return report

    def _call(self, method: str, *arguments: object) -> Any:  # whatever the method returns
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=_START_S)
        except RayTaskError as error:
            raise ConfigError(f"{self.what}, {self.node}, cannot run its share: {error.cause}") from error
        except (RayActorError, GetTimeoutError) as error:
            raise self._lost(error) from error

    def _silent(self, error: Exception) -> LostNodeError | None:
        return self._lost(error) if time.monotonic() > self._heard_s + _LOST_S else None

    def _lost(self, error: Exception) -> LostNodeError:
        self.is_lost = True
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return LostNodeError(f"{self.what}, {self.node}, was lost: {lines[-1] if lines else type(error).__name__}")


def poll(places: Sequence[Place]) -> list[Report | LostNodeError | None]:
    """Ask all that are not lost, and wait a moment for their answers."""
    alive = [place for place in places if not place.is_lost]
    if alive:
        asked = [place.ask() for place in alive]
        ray.wait(asked, num_returns=len(asked), timeout=_ANSWERS_S)
    return [place.answer() for place in places]
