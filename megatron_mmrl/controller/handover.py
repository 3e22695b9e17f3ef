"""Who owns the device when: the only place that knows trainer and engine may share one.

Weights are published after the last optimizer step and before the next request; in between the engine computes
nothing. Around generation the trainer's optimizer state leaves the device and the engine's KV cache comes back; on
a CPU, where nothing is scarce, those calls have no effect, but they are made in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mmrl.controller.parts import Fleet, Policy


class Handover:
    """Moves the device, and the weights' version, between policy and engines."""

    def __init__(self, policy: Policy, fleet: Fleet) -> None:
        self._policy, self._fleet = policy, fleet

    def publish(self, version: int) -> None:
        """Give the engines the policy's weights; from here on they sample version ``version``."""
        self._fleet.update_weights(self._policy.weights, version)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The engines own the device inside this block."""
        self._policy.offload()
        self._fleet.resume_kv_cache()
        try:
            yield
        finally:
            self._fleet.release_kv_cache()
            self._policy.onload()
