"""Who waits for a lane, and which connection has one for them."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.lowlevel

from . import _observation
from ._request import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from . import im
    from ._stats import AgentStats
    from ._transports import Waker
    from .config import Limits

__all__ = ["Connection", "Dispatcher"]


class Connection(Protocol):
    """What a `Dispatcher` needs of a connection; a `Session` is one."""

    @property
    def ready(self) -> bool:
        """Whether it can take a request now."""

    @property
    def in_flight(self) -> int:
        """How many requests hold a lane of it."""

    def start(self, request: Request) -> None:
        """Give a lane to `request` and queue its message; the request is settled if it has no encoding."""

    def claim(self, request: Request) -> None:
        """The caller of `request` knows of it, so that its message may be written."""

    def leave(self, request: Request) -> None:
        """The consumer of `request` leaves."""

    async def send_tool_result(self, request: Request, call_id: str, output: str) -> None:
        """Send a result of a tool; wait until it is being written."""


class Dispatcher:
    """Gives every request to the connection with the fewest, first come, first served.

    `connections` is its owner's list of them. At most ``limits.in_flight`` are in flight at once. One that a
    connection gives back, because it could not write it, comes first. `on_demand` is called for every request
    that is made.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        limits: Limits,
        stats: AgentStats,
        new_waker: Callable[[], Waker],
        address: tuple[str, int],
    ) -> None:
        self._connections = connections
        self.on_demand: Callable[[], object] | None = None
        self._limits = limits
        self._stats = stats
        self._new_waker = new_waker
        self._address = address
        self._waiting: OrderedDict[Request, None] = OrderedDict()
        self._closed: Callable[[], Exception] | None = None

    @property
    def waiting(self) -> int:
        """How many requests wait for a lane."""
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """How many requests hold a lane."""
        return sum(connection.in_flight for connection in self._connections)

    async def open_request(self, message: im.UserMessage) -> Request:
        """Wait for a lane; then the message is queued. Cancelled: nothing is sent.

        Raises what `close` was given, and what encoding the message raises.
        """
        await anyio.lowlevel.checkpoint()
        request = Request(message, self._limits, self._stats, self._new_waker())
        if _observation.observer is not None:
            host, port = self._address
            watched = _observation.ObservedRequest(host, port, message.conversation)
            request.observe(_observation.observer(watched), anyio.current_time())
        if self._closed is not None:
            request.settle(self._closed(), anyio.current_time())
        else:
            self._waiting[request] = None
            self.serve()
            if self.on_demand is not None:
                self.on_demand()
        try:
            while request.connection is None and not request.settled:
                await request.assignment()
        except BaseException:
            self.leave(request)
            raise
        if request.connection is None or request.settled:
            assert request.error is not None, "nobody else can leave it"
            raise request.error
        request.connection.claim(request)
        return request

    def serve(self) -> None:
        """Give lanes to those who wait; to be called whenever one may have become free."""
        while self._waiting and (connection := self._least_loaded()) is not None:
            request, _ = self._waiting.popitem(last=False)
            connection.start(request)

    def take_back(self, requests: Iterable[Request]) -> bool:
        """Let `requests`, of which nothing was written, wait again, before all others; not once closed."""
        if self._closed is not None:
            return False
        for request in reversed(list(requests)):
            request.connection = None
            self._waiting[request] = None
            self._waiting.move_to_end(request, last=False)
        return True

    def leave(self, request: Request) -> None:
        """The consumer of `request` leaves, or never came."""
        if request.connection is not None:
            request.connection.leave(request)
        elif not request.settled:
            del self._waiting[request]
            self._stats.cancelled += request.claimed
            request.settle(None, anyio.current_time())
        request.discard()

    def close(self, error: Callable[[], Exception]) -> None:
        """Whoever waits, and whoever comes, gets ``error()`` raised. Idempotent."""
        if self._closed is None:
            self._closed = error
            waiting, self._waiting = self._waiting, OrderedDict()
            for request in waiting:
                self._stats.failed += request.claimed
                request.settle(error(), anyio.current_time())

    def _least_loaded(self) -> Connection | None:
        best: Connection | None = None
        total = fewest = 0
        for connection in self._connections:
            load = connection.in_flight
            total += load
            if connection.ready and (best is None or load < fewest):
                best, fewest = connection, load
        return best if total < self._limits.in_flight else None
