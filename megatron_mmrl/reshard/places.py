"""Where something stands in memory that another process maps: names and offsets, no memory itself. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Handle = Mapping[str, Any]
"""How another process of the same user on the same machine finds a block; can be written as JSON."""

Place = tuple[int, int]
"""Number of a block, and the byte in it at which something begins."""

ALIGNMENT = 256
"""Bytes; what begins at a multiple of it suits every kernel."""


def packed(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Byte offsets of things of these sizes one behind the other, each aligned, and the bytes they take together."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end
