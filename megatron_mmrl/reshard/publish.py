"""A hand-over of shared weights, from the forced gather of the last update to the engine that computes again.

    pause -> all ranks' weights final -> barrier -> plan -> barrier -> (attach) -> compare checksums -> new version

Engines are attached at the first hand-over, and again when they have been started again; after that a hand-over sends
them no weights, only the news that they have changed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_mmrl.parallel.device import synchronize
from megatron_mmrl.reshard.attach import Answer, read_answers
from megatron_mmrl.reshard.session import Exchange, WeightSession
from megatron_mmrl.reshard.spec import AttachSpec, ChecksumRequest
from megatron_mmrl.rollout.engine import EngineError, LoaderName, RolloutEngine

_SHOWN = 10


class Fleet(Protocol):
    """The engines of all ranks; every call is collective."""

    def everywhere(self, work: Callable[[int, RolloutEngine], None]) -> None:
        """Do ``work`` with each leader's engine; a failure is raised on every rank."""
        ...

    def pause(self) -> None: ...


class SharedWeights:
    """Engines read the trainer's memory. Every call is collective.

    Args:
        finish_updates: makes every rank's weights final, whatever is still under way.
    """

    def __init__(
        self, session: WeightSession, fleet: Fleet, exchange: Exchange, finish_updates: Callable[[], None]
    ) -> None:
        self._session, self._fleet, self._exchange = session, fleet, exchange
        self._finish_updates = finish_updates
        self._attached: RolloutEngine | None = None
        self._version: int | None = None
        self._seconds: dict[str, float] = {}

    def publish(self, version: int) -> None:
        """Give every engine the policy's weights, as ``version``.

        Raises:
            EngineError: on every rank: an engine failed, could not be attached, or holds other weights than the
                trainer (``WeightsDifferError``).
        """
        first = self._version is None
        self._fleet.pause()
        self._finish_updates()
        began = time.perf_counter()
        self._move(everything=first)
        moved = time.perf_counter()
        entries = self._session.to_verify(version, everything=first)
        supplied = self._exchange.all_gather(self._session.verifier.supplied(entries))
        self._seconds = {"reshard": moved - began}

        def hand_over(number: int, engine: RolloutEngine) -> None:
            self._attach(number, engine)
            reported = self._checksums(engine, self._session.names(entries))
            self._session.verifier.compare(number, entries, supplied, reported)
            self._seconds["verify"] = time.perf_counter() - moved
            engine.set_version(version)

        self._fleet.everywhere(hand_over)
        self._version = version

    def restore(self) -> None:
        """Attach engines that were started again, to the weights as they are."""

        def attach(number: int, engine: RolloutEngine) -> None:
            if self._version is not None and engine is not self._attached:
                self._attach(number, engine)
                engine.set_version(self._version)

        self._fleet.everywhere(attach)

    def counters(self) -> Mapping[str, float]:
        """Seconds of the last hand-over on this rank, and bytes over all ranks by kind."""
        times = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        return {**times, **{f"reshard/{kind}_bytes": float(n) for kind, n in self._session.traffic_bytes.items()}}

    def _move(self, *, everything: bool) -> None:
        """No rank reads another's memory before its weights are final, or changes its own while others still read."""
        synchronize()
        self._exchange.barrier()
        self._session.executor.run(everything=everything)
        synchronize()
        self._exchange.barrier()

    def _attach(self, number: int, engine: RolloutEngine) -> None:
        if engine is self._attached:
            return
        engine.pause()  # waits for an engine that is starting

        specs: list[AttachSpec] = []

        def messages(directory: Path) -> list[str]:
            specs.extend(self._session.attach_specs(number, directory))
            return [spec.to_json() for spec in specs]

        answers = self._ask(engine, "attach", messages)
        if problems := answers[0].problems:
            more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise EngineError(
                f"engine {number} refuses to share the trainer's memory:\n  " + "\n  ".join(problems[:_SHOWN]) + more
            )
        others = [rank for rank, spec in enumerate(specs) if answers[rank].digest != spec.digest]
        if others:
            raise EngineError(f"engine {number}: ranks {others} attached something else than they were sent")
        self._attached = engine

    def _checksums(self, engine: RolloutEngine, names: tuple[str, ...]) -> list[Mapping[str, int]]:
        size = self._session.planner.engine.tensor
        answers = self._ask(
            engine, "checksums", lambda where: [ChecksumRequest(answer_dir=str(where), names=names).to_json()] * size
        )
        return [answer.checksums or {} for answer in answers]

    def _ask(self, engine: RolloutEngine, what: LoaderName, messages: Callable[[Path], Sequence[str]]) -> list[Answer]:
        """What each rank of the engine answers. Raises EngineError when one does not."""
        directory = Path(tempfile.mkdtemp(prefix="mmrl-answers-"))
        try:
            engine.tell_ranks(what, messages(directory))
            return read_answers(directory, self._session.planner.engine.tensor)
        except FileNotFoundError as error:
            raise EngineError(f"a rank of the engine did not answer about {what}; its log says why") from error
        finally:
            shutil.rmtree(directory)
