"""The one task that writes to a connection, and the queue in front of it."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import anyio
import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._request import Request
    from ._transports import Transport, Waker

__all__ = ["Outgoing", "Writer"]

_WRITE_SIZE: Final = 64 * 1024
_QUEUE_SIZE: Final = 1024 * 1024
"""How many bytes may wait to be written before no further request joins them."""


class Outgoing(msgspec.Struct, eq=False):
    """A message that waits for the writer; `taken` is set once the writer has taken it, or never will."""

    data: bytes
    request: Request | None = None
    taken: anyio.Event | None = None

    def __repr__(self) -> str:
        return "<Outgoing>"  # without the prompt


class Writer:
    """Callers only queue, so a cancelled caller cannot cut a frame in two (only the task in `run` writes).

    What is ready together is written together. `flushed` waits until everything has been written that was
    queued, by callers or by the transport itself. `on_room` is called when the queue is not `full` any more.
    """

    def __init__(self, transport: Transport, waker: Waker, on_room: Callable[[], object]) -> None:
        self._transport = transport
        self._on_room = on_room
        self._size = 0
        self._waker = waker
        self._queue: OrderedDict[Outgoing, None] = OrderedDict()
        self._has_work = False
        self._writing = False
        self._ended = False
        self._flushed = anyio.Event()
        transport.output_ready = self.wake

    @property
    def full(self) -> bool:
        """Whether so much waits that no further request should be added."""
        return self._size >= _QUEUE_SIZE

    def queue(self, outgoing: Outgoing) -> None:
        self._queue[outgoing] = None
        self._size += len(outgoing.data)
        if outgoing.request is not None:
            outgoing.request.queued.append(outgoing)
        self.wake()

    def withdraw(self, outgoing: Outgoing) -> None:
        """Take a message out of the queue, if it is still there."""
        if outgoing in self._queue:
            del self._queue[outgoing]
            _release(outgoing)
            self._shrink(len(outgoing.data))

    async def flushed(self) -> None:
        """Wait until nothing is left to write, or nothing can be written any more. For one task at a time."""
        if (self._has_work or self._writing) and not self._ended:
            self._flushed = anyio.Event()
            await self._flushed.wait()

    async def run(self) -> None:
        """Write what is queued, for ever. Raises `anyio.BrokenResourceError` when the connection is gone."""
        try:
            while True:
                if not self._has_work:
                    await self._waker.wait()
                self._writing = True
                while self._has_work:
                    self._has_work = False
                    await self._transport.send(self._take())
                self._writing = False
                self._flushed.set()
        finally:
            self._ended = True
            self._flushed.set()

    def wake(self) -> None:
        """There may be something to write."""
        self._has_work = True
        self._waker.wake()

    def _take(self) -> list[bytes]:
        """The messages to write together: a segment or two, so that those behind can still be withdrawn."""
        writes: list[bytes] = []
        size = 0
        now = anyio.current_time()
        while self._queue and size < _WRITE_SIZE:
            outgoing = next(iter(self._queue))
            request = outgoing.request
            if request is not None and not request.claimed:
                break  # `wake` is called as soon as it is, which is in the next turn of the event loop
            del self._queue[outgoing]
            _release(outgoing)
            if request is not None and request.phase == "not_sent":
                request.phase = "sent"
                request.message = None
                request.stats.sent = now
            writes.append(outgoing.data)
            size += len(outgoing.data)
        else:
            self._has_work = self._has_work or bool(self._queue)
        self._shrink(size)
        return writes

    def _shrink(self, size: int) -> None:
        was_full = self.full
        self._size -= size
        if was_full and not self.full:
            self._on_room()


def _release(outgoing: Outgoing) -> None:
    if outgoing.request is not None:
        outgoing.request.queued.remove(outgoing)
    if outgoing.taken is not None:
        outgoing.taken.set()
