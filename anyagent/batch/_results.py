"""From the tasks that have prompts answered to the one that takes the results."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

if TYPE_CHECKING:
    from ._result import Result

__all__ = ["Results"]

_PER_CHECKPOINT: Final = 64


class Results:
    """Results in the order in which they come or, if `ordered`, by their place among all."""

    def __init__(self, *, ordered: bool) -> None:
        self.ended = False
        self._ordered = ordered
        self._ready: deque[Result] = deque()
        self._early: dict[int, Result] = {}  # by place: those that others have to come before
        self._place = 0
        self._error: BaseException | None = None
        self._arrival: anyio.Event | None = None
        self._since_checkpoint = 0

    def add(self, result: Result, place: int) -> None:
        """Take in the result that is the `place`-th, from 0."""
        if self._ordered and self.ended:
            if place >= self._place:  # else one behind it was there to be taken
                self._ready.append(result)
                self._place = place + 1
        elif self._ordered:
            self._early[place] = result
            while (ready := self._early.pop(self._place, None)) is not None:
                self._ready.append(ready)
                self._place += 1
        else:
            self._ready.append(result)
        if self._ready:
            self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """There will be no more; `error` is raised behind the last. What waits for others waits no longer."""
        if not self.ended:
            self.ended = True
            self._error = error
            for place in sorted(self._early):
                self._ready.append(self._early[place])
                self._place = place + 1
            self._early.clear()
            self._wake()

    async def take(self) -> Result:
        """Wait for the next one; raises `StopAsyncIteration`, or what it ended with.

        It is a checkpoint now and then.

        Cancelled: nothing is lost.
        """
        self._since_checkpoint += 1
        if not self._ready or self._since_checkpoint >= _PER_CHECKPOINT:
            self._since_checkpoint = 0
            await self._wait()
            if not self._ready:
                raise StopAsyncIteration
        return self._ready.popleft()

    async def take_all(self) -> list[Result]:
        """Wait until there are some; none at the end, or what it ended with is raised.

        Cancelled: nothing is lost.
        """
        await self._wait()
        return self.take_ready()

    def take_ready(self) -> list[Result]:
        """All that are there."""
        ready = list(self._ready)
        self._ready.clear()
        return ready

    async def _wait(self) -> None:
        """Wait until there are some, or the end; at a checkpoint in any case."""
        await anyio.lowlevel.checkpoint()
        while not self._ready:
            if self.ended:
                if self._error is not None:
                    raise self._error
                return
            if self._arrival is not None:
                raise anyio.BusyResourceError("iterating over this batch")
            self._arrival = anyio.Event()
            try:
                await self._arrival.wait()
            finally:
                self._arrival = None

    def _wake(self) -> None:
        if self._arrival is not None:
            self._arrival.set()
