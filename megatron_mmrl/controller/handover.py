"""Who owns the device when: the only place that knows trainer and engine may share one.

Weights are published after the last optimizer step and before the next request. From the end of one generation to the
end of that, the engines are paused: where they read the trainer's own memory, nothing may be computed from weights
that are half updated. Around generation the trainer's optimizer state leaves the device and the engine's KV cache comes
back; on a CPU, where nothing is scarce, those calls have no effect, but they are made in the same order.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from megatron_mmrl import pulse

if TYPE_CHECKING:
    from megatron_mmrl.controller.parts import Fleet, Policy


class WeightPath(Protocol):
    """A way for the policy's weights to the engines; every call is collective."""

    def publish(self, version: int) -> None:
        """Give every engine the policy's weights, as ``version``. Pauses the engines and has them compute again."""
        ...

    def restore(self) -> None:
        """Give what was published last to engines that were started again since."""
        ...

    def counters(self) -> Mapping[str, float]:
        """What the hand-overs since the last call took; seconds under ``time/``."""
        ...


class ByName:
    """Full tensors under Hugging Face names, one list after the other (``reshard.method=reference``)."""

    def __init__(self, policy: Policy, fleet: Fleet) -> None:
        self._policy, self._fleet = policy, fleet
        self._version: int | None = None

    def publish(self, version: int) -> None:
        """See ``WeightPath``."""
        self._fleet.pause()
        self._fleet.update_weights(self._policy.weights, version)
        self._version = version

    def restore(self) -> None:
        """See ``WeightPath``; the other engines are sent the same weights again."""
        if self._version is not None:
            self.publish(self._version)

    def counters(self) -> Mapping[str, float]:
        """Nothing is counted."""
        return {}


class Handover:
    """Moves the device, and the weights' version, between policy and engines."""

    def __init__(self, policy: Policy, fleet: Fleet, weights: WeightPath) -> None:
        self._policy, self._fleet, self._weights = policy, fleet, weights
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._bytes: defaultdict[str, float] = defaultdict(float)
        fleet.restore = weights.restore

    def publish(self, version: int) -> None:
        """Give the engines the policy's weights; from here on they sample version ``version``."""
        self._weights.publish(version)

    def counters(self) -> dict[str, float]:
        """Numbers of the hand-overs since the last call."""
        row = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        row |= {f"handover/{name}_bytes": moved for name, moved in self._bytes.items()}
        self._seconds.clear()
        self._bytes.clear()
        return {**row, **self._weights.counters(), "rollout/engine_restarts": float(self._fleet.restarts)}

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The engines own the device inside this block."""
        with self._timed("offload"):
            self._bytes["offload"] += self._policy.offload()
        with self._timed("kv_cache"):
            self._fleet.resume_kv_cache()
        self._fleet.resume()
        try:
            yield
        finally:
            self._fleet.pause()
            with self._timed("kv_cache"):
                self._fleet.release_kv_cache()
            with self._timed("onload"):
                self._bytes["onload"] += self._policy.onload()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with pulse.phase(name):
            yield
        self._seconds[name] += time.perf_counter() - start
