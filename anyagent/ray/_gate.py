"""A predictor's gate: lets attempts through as far as the governor of the cluster allows."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

import anyio
import anyio.lowlevel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._governor import Told

__all__ = ["GovernedGate", "Governing"]

_TELL_PERIOD: Final = 0.05  # seconds, between two times that the governor is told how things are


class Governing(Protocol):
    """A `Governor` as one of its members calls it."""

    async def tell(self, number: int, returned: int, wanted: int, ended: Sequence[int | None], /) -> None: ...

    async def listen(self, version: int, /) -> Told: ...

    async def take(self, wanted: int, /) -> int: ...


class GovernedGate:
    """A `Gate` that asks `governor`, seldom: for permits and, if `rated`, for attempts in blocks.

    A permit that is free is used again at once, unless the governor wants it back. `run` has to run
    meanwhile; what the governor raises comes out of that.
    """

    def __init__(self, governor: Governing, *, rated: bool) -> None:
        self._governor = governor
        self._rated = rated
        self._granted = 0
        self._returned = 0
        self._limit = 0
        self._in_flight = 0
        self._for_permit = _Queue()
        self._for_rate = _Queue()
        self._ended: list[int | None] = []
        self._told = (0, 0)  # permits returned, and wanted
        self._news = anyio.Event()

    async def enter(self) -> None:
        """Wait until one more attempt may be sent, first come, first served. Cancelled: nothing is taken."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        place = self._for_permit.join()
        self._settle()
        try:
            await place.wait()
        except BaseException:
            self._in_flight -= self._for_permit.leave(place)
            self._settle()
            raise
        if self._rated:
            place = self._for_rate.join()
            try:
                await place.wait()
            except BaseException:
                self._in_flight -= 1
                self._ended += [None] * self._for_rate.leave(place)
                self._settle()
                raise

    def leave(self, tokens_used: int | None) -> None:
        """The attempt that entered has ended."""
        self._in_flight -= 1
        if self._rated:
            self._ended.append(tokens_used)
        self._settle()

    async def run(self) -> None:
        """Keep in touch with the governor, until cancelled."""
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(self._listen)
            task_group.start_soon(self._tell)
            if self._rated:
                task_group.start_soon(self._take)

    @property
    def _free(self) -> bool:
        return self._in_flight < min(self._granted - self._returned, self._limit)

    def _settle(self) -> None:
        while self._for_permit and self._free:
            self._in_flight += 1
            self._for_permit.admit()
        surplus = self._granted - self._returned - max(self._limit, self._in_flight)
        self._returned += max(surplus, 0)
        if self._ended or self._told != self._state:
            self._news.set()

    @property
    def _state(self) -> tuple[int, int]:
        return self._returned, self._in_flight + len(self._for_permit)

    async def _tell(self) -> None:
        number = 0
        while True:
            await self._news.wait()
            self._news = anyio.Event()
            number += 1
            self._told = self._state
            ended, self._ended = self._ended, []
            await self._governor.tell(number, *self._told, ended)
            await anyio.sleep(_TELL_PERIOD)

    async def _listen(self) -> None:
        version = 0
        while True:
            version, self._granted, self._limit = await self._governor.listen(version)
            self._settle()

    async def _take(self) -> None:
        while True:
            await self._for_rate.arrival()
            count = await self._governor.take(len(self._for_rate))
            for _ in range(count):
                if self._for_rate:
                    self._for_rate.admit()
                else:
                    self._ended.append(None)
            self._settle()


class _Queue:
    """Attempts that wait, first come, first served."""

    def __init__(self) -> None:
        self._places: deque[anyio.Event] = deque()
        self._arrival = anyio.Event()

    def __len__(self) -> int:
        return len(self._places)

    def join(self) -> anyio.Event:
        """Queue up; the event is set at one's turn."""
        place = anyio.Event()
        self._places.append(place)
        self._arrival.set()
        return place

    def admit(self) -> None:
        """It is the first one's turn."""
        self._places.popleft().set()

    def leave(self, place: anyio.Event) -> bool:
        """Wait no longer; returns whether it was its turn already."""
        if not place.is_set():
            self._places.remove(place)
        return place.is_set()

    async def arrival(self) -> None:
        """Wait until there is somebody."""
        while not self._places:
            self._arrival = anyio.Event()
            await self._arrival.wait()
