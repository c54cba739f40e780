"""The lanes of one connection: who holds one, and who waits for one."""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import count
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Lanes"]


class Lanes:
    """Hands out at most `limit` lanes at once, first come, first served.

    `names` are reused once released; with ``None`` every lane is new ("1", "2", ...). A released lane goes
    straight to whoever has waited longest, so nobody who comes later can snatch it.
    """

    def __init__(self, names: tuple[str, ...] | None, limit: int) -> None:
        self.in_use = 0
        self._limit = limit
        self._free = None if names is None else deque(names)
        self._fresh = count(1)
        self._waiters: OrderedDict[anyio.Event, None] = OrderedDict()
        self._given: dict[anyio.Event, str] = {}  # to waiters that have not woken up yet
        self._closed: Callable[[], Exception] | None = None

    @property
    def waiting(self) -> int:
        """How many callers wait in `acquire`."""
        return len(self._waiters)

    async def acquire(self) -> str:
        """Wait for a lane. Cancelled while waiting: none is held. Raises what `close` was given."""
        await anyio.lowlevel.checkpoint()
        self._raise_if_closed()
        if not self._waiters and self._available():
            return self._take()
        turn = anyio.Event()
        self._waiters[turn] = None
        try:
            await turn.wait()
            self._raise_if_closed()
        except BaseException:
            self._waiters.pop(turn, None)
            if turn in self._given:
                self.release(self._given.pop(turn))
            raise
        return self._given.pop(turn)

    def release(self, lane: str) -> None:
        """Give a lane back, and on to the next who waits."""
        self.in_use -= 1
        if self._free is not None:
            self._free.append(lane)
        self._serve()

    def resize(self, limit: int) -> None:
        """Allow `limit` lanes at once from now on; lanes beyond it stay with their holders until released."""
        self._limit = limit
        self._serve()

    def close(self, error: Callable[[], Exception]) -> None:
        """Give out no more lanes: whoever waits, and whoever comes, gets ``error()`` raised. Idempotent."""
        if self._closed is None:
            self._closed = error
            waiters, self._waiters = self._waiters, OrderedDict()
            for turn in waiters:
                turn.set()

    def _available(self) -> bool:
        return self.in_use < self._limit and (self._free is None or bool(self._free))

    def _take(self) -> str:
        self.in_use += 1
        return str(next(self._fresh)) if self._free is None else self._free.popleft()

    def _serve(self) -> None:
        while self._waiters and self._available():
            turn, _ = self._waiters.popitem(last=False)
            self._given[turn] = self._take()
            turn.set()

    def _raise_if_closed(self) -> None:
        if self._closed is not None:
            raise self._closed()
