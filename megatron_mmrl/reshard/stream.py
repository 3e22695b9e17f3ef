"""Numbers on their way between two nodes: messages of bounded size, both sides cut alike, two of them in flight.

A stream is what one rank sends to another, in order. Its cuts follow from the shapes of what is sent alone, so sender
and receiver need not talk about them. What lies in one piece is sent from where it is and received where it belongs;
the rest is packed into, and unpacked from, buffers that together take at most a given number of bytes per rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mmrl.config.checks import require

_IN_FLIGHT = 2
Message = tuple[Tensor, ...]  # matrices, one behind the other


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One direction between this rank and ``peer``."""

    peer: int
    sends: bool
    messages: tuple[Message, ...]

    @property
    def staging_elements(self) -> int:
        """Size of one buffer: the largest message that is not one piece."""
        return max((_elements(message) for message in self.messages if not _is_one_piece(message)), default=0)


def message_elements(bucket_bytes: int, item_bytes: int, streams: int) -> int:
    """How long a message between two ranks may be, of which the busier one has ``streams`` streams.

    Raises:
        ValueError: the bucket is too small for that many.
    """
    size = bucket_bytes // (item_bytes * _IN_FLIGHT * streams)
    require(
        size > 0,
        f"reshard.bucket_bytes={bucket_bytes} cannot hold {_IN_FLIGHT} messages for each of {streams} streams between "
        f"nodes; use at least {item_bytes * _IN_FLIGHT * streams}",
    )
    return size


def cut(views: Sequence[Tensor], limit: int) -> tuple[Message, ...]:
    """``views``, matrices, in messages of at most ``limit`` elements; a larger one is cut by rows, and a larger row."""
    messages: list[Message] = []
    current: list[Tensor] = []
    for piece in (piece for view in views for piece in _pieces(view, limit)):
        if current and _elements(current) + piece.numel() > limit:
            messages.append(tuple(current))
            current = []
        current.append(piece)
    return (*messages, tuple(current)) if current else tuple(messages)


def exchange(streams: Sequence[Stream], bucket_bytes: int) -> int:
    """Send and receive all messages; returns the bytes of staging that it took. Collective among the ranks involved.

    Message k of every stream is under way while message k + 1 is packed, and is unpacked before k + 2 is.
    """
    buffers = [_buffers(stream) for stream in streams]
    staging = sum(buffer.nbytes for pair in buffers for buffer in pair)
    require(staging <= bucket_bytes, f"{staging} bytes of staging are more than reshard.bucket_bytes={bucket_bytes}")
    posts: list[_Post] = []
    works: list[dist.Work] = []
    for number in range(max((len(stream.messages) for stream in streams), default=0)):
        next_posts = [
            _Post(stream, stream.messages[number], pair[number % _IN_FLIGHT] if pair else None)
            for stream, pair in zip(streams, buffers, strict=True)
            if number < len(stream.messages)
        ]
        next_works = dist.batch_isend_irecv([post.operation for post in next_posts])
        _finish(posts, works)
        posts, works = next_posts, next_works
    _finish(posts, works)
    return staging


class _Post:
    """A message under way: packed when made, unpacked by ``finish``."""

    def __init__(self, stream: Stream, message: Message, buffer: Tensor | None) -> None:
        staged = buffer is not None and not _is_one_piece(message)
        self._message = message if staged else ()
        self._sends, self._flat = stream.sends, buffer[: _elements(message)] if staged else message[0]
        if self._sends:
            for part, piece in self._parts():
                part.copy_(piece)
        self.operation = dist.P2POp(dist.isend if stream.sends else dist.irecv, self._flat, stream.peer)

    def finish(self) -> None:
        """Put what was received where it belongs."""
        if not self._sends:
            for part, piece in self._parts():
                piece.copy_(part)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(part of the buffer, piece of a parameter); none where the message is sent from its place."""
        first = 0
        for piece in self._message:
            yield self._flat[first : first + piece.numel()].view(piece.shape), piece
            first += piece.numel()


def _finish(posts: Sequence[_Post], works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()
    for post in posts:
        post.finish()


def _buffers(stream: Stream) -> tuple[Tensor, ...]:
    if stream.staging_elements == 0:
        return ()
    like = stream.messages[0][0]
    count = min(_IN_FLIGHT, len(stream.messages))
    return tuple(torch.empty(stream.staging_elements, dtype=like.dtype, device=like.device) for _ in range(count))


def _pieces(view: Tensor, limit: int) -> Iterator[Tensor]:
    rows, columns = view.shape
    if columns > limit:
        for row in view.split(1):
            yield from row.split(limit, dim=1)
    elif rows * columns > limit:
        yield from view.split(limit // columns)
    else:
        yield view


def _elements(message: Sequence[Tensor]) -> int:
    return sum(piece.numel() for piece in message)


def _is_one_piece(message: Message) -> bool:
    return len(message) == 1 and message[0].is_contiguous()
