"""What each rank says of itself, where all ranks can read it: rows in the store at which the ranks met.

The store's client of the main thread may not be shared, so this one has its own connection. A call to a store whose
host is stopped may never return (seen with torch 2.13): all calls are made by a thread of their own, and what is known
here only grows old.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

Row = Mapping[str, object]
_CONNECT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where the ranks of this process's world met."""

    host: str
    port: int
    rank: int
    world_size: int
    rank_zero_serves: bool  # else a launcher does
    attempt: str

    @classmethod
    def from_environment(cls) -> Meeting | None:
        """From torchrun's variables; None for a process that is a world of its own."""
        if "RANK" not in os.environ:
            return None
        return cls(
            host=os.environ["MASTER_ADDR"],
            port=int(os.environ["MASTER_PORT"]),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            rank_zero_serves=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True),
            attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


class Board:
    """The rows of all ranks, renewed every ``interval_s`` by a thread of its own; ``post`` changes this rank's."""

    def __init__(self, meeting: Meeting, row: Row, interval_s: float) -> None:
        self._meeting, self._interval_s = meeting, interval_s
        self._own = row
        self._posts = 0
        self._rows: dict[int, tuple[Row, float]] = {}  # with the time at which it was seen to be new
        self._wake = threading.Event()
        self._closing = False
        self._reached = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="watchdog-board", daemon=True)
        self._thread.start()

    def post(self, row: Row) -> None:
        """Say ``row`` from the next round on."""
        self._own = row
        self._posts += 1

    def refresh(self) -> None:
        """Begin a round now."""
        self._wake.set()

    def rows(self) -> dict[int, tuple[Row, float]]:
        """The last row of each rank that has said anything, and the seconds since it was seen to be new."""
        now = time.monotonic()
        return {rank: (row, now - heard) for rank, (row, heard) in self._rows.items()}

    @property
    def age_s(self) -> float:
        """Seconds since the store last answered."""
        return time.monotonic() - self._reached

    def forgive(self, seconds: float) -> None:
        """This process was stopped for so long and could not have heard anything."""
        self._rows = {rank: (row, heard + seconds) for rank, (row, heard) in self._rows.items()}
        self._reached += seconds

    def close(self, timeout_s: float = 1.0) -> None:
        """Say the last row and end the thread, if the store answers in time."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _serve(self) -> None:
        store = None
        while True:
            closing = self._closing
            try:
                store = store or self._connect()
                self._exchange(store)
            except RuntimeError:  # torch's for a store that is gone: what is known grows old, and that is noticed
                store = None
            if closing:
                return
            self._wake.wait(self._interval_s)
            self._wake.clear()

    def _connect(self) -> dist.Store:
        import torch.distributed as dist

        client = dist.TCPStore(
            self._meeting.host,
            self._meeting.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_CONNECT_S),
        )
        return dist.PrefixStore(f"mmrl-watch/{self._meeting.attempt}", client)

    def _exchange(self, store: dist.Store) -> None:
        store.set(str(self._meeting.rank), json.dumps({**self._own, "post": self._posts}))
        ranks = list(range(self._meeting.world_size))
        if not store.check([str(rank) for rank in ranks]):  # reading a missing one would wait for it
            ranks = [rank for rank in ranks if store.check([str(rank)])]
        self._take(ranks, store.multi_get([str(rank) for rank in ranks]))

    def _take(self, ranks: Sequence[int], values: Sequence[bytes]) -> None:
        self._reached = now = time.monotonic()
        rows = dict(self._rows)
        for rank, value in zip(ranks, values, strict=True):
            row = json.loads(value)
            if rank not in rows or rows[rank][0] != row:
                rows[rank] = (row, now)
        self._rows = rows
