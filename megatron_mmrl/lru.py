"""A least-recently-used cache bounded by bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")


class LruBytes(Generic[V]):
    """Keeps values while their sizes sum to at most ``max_bytes``; a larger value is not kept at all."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[V, int]] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> V | None:
        """The value, now the most recently used one; None where it is not kept."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: str, value: V, nbytes: int) -> None:
        """Keep ``value`` and give up the longest unused ones for it."""
        if key in self._entries:
            self.nbytes -= self._entries.pop(key)[1]
        if nbytes > self._max_bytes:
            return
        self._entries[key] = (value, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self._max_bytes:
            self.nbytes -= self._entries.popitem(last=False)[1][1]
