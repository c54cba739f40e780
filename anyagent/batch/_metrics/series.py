"""A run over time, in a bounded number of intervals."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Final

from .histogram import quantile

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CAPACITY", "WIDTH", "Interval", "Series", "coarser"]

WIDTH: Final = 0.125  # seconds; of an interval, as long as there are few
CAPACITY: Final = 300  # intervals; even, so that pairs can be made of them


@dataclasses.dataclass(slots=True)
class Interval:
    """What happened from `begin` to `end`, in seconds since the start of the run.

    * `done`, `failed`: prompts that were finished. `tokens`: of those done.
    * `retried`: tries after the first one. `reconnects`: connections opened in place of others.
    * `in_flight_sum`, `limit_sum`: over the `observed` seconds of which they are known, their integrals.
    * `in_flight_max`, `limit_min`, `limit_max`: their extremes, where `observed` is not 0.
    * `first_event`: times to first event of attempts that ended in it: how many in which bucket.
    """

    begin: float
    end: float
    done: int = 0
    failed: int = 0
    retried: int = 0
    reconnects: int = 0
    tokens: int = 0
    observed: float = 0.0
    in_flight_sum: float = 0.0
    limit_sum: float = 0.0
    in_flight_max: int = 0
    limit_min: int = 0
    limit_max: int = 0
    first_event: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.begin

    @property
    def in_flight(self) -> float | None:
        """How many requests were in flight, on average; ``None``: not known."""
        return self.in_flight_sum / self.observed if self.observed else None

    @property
    def limit(self) -> float | None:
        """How many might have been, on average; ``None``: not known."""
        return self.limit_sum / self.observed if self.observed else None

    def first_event_quantile(self, share: float) -> float | None:
        """A quantile of the times to first event, in seconds; ``None`` if there is none."""
        return quantile(self.first_event, share) if self.first_event else None

    def observe(self, seconds: float, in_flight: int, limit: int) -> None:
        """For so long, that many requests were in flight, and so many might have been."""
        level = Interval(
            self.begin,
            self.end,
            observed=seconds,
            in_flight_sum=seconds * in_flight,
            limit_sum=seconds * limit,
            in_flight_max=in_flight,
            limit_min=limit,
            limit_max=limit,
        )
        self.add(level)

    def add(self, other: Interval) -> None:
        """Add what happened in `other`."""
        self.done += other.done
        self.failed += other.failed
        self.retried += other.retried
        self.reconnects += other.reconnects
        self.tokens += other.tokens
        if other.observed:
            self.limit_min = min(self.limit_min, other.limit_min) if self.observed else other.limit_min
            self.limit_max = max(self.limit_max, other.limit_max)
            self.in_flight_max = max(self.in_flight_max, other.in_flight_max)
            self.in_flight_sum += other.in_flight_sum
            self.limit_sum += other.limit_sum
            self.observed += other.observed
        for bucket, count in other.first_event.items():
            self.first_event[bucket] = self.first_event.get(bucket, 0) + count

    def joined(self, other: Interval) -> Interval:
        """This interval and the `other`, which follows it, as one."""
        both = Interval(self.begin, other.end)
        both.add(self)
        both.add(other)
        return both


class Series:
    """Intervals of one width, one after the other.

    When there are too many, each two become one, and those that follow are as wide.
    """

    def __init__(self) -> None:
        self._width = WIDTH
        self._closed: list[Interval] = []
        self._current = Interval(0.0, WIDTH)
        self._level: tuple[int, int] | None = None  # in flight, limit
        self._time = 0.0

    def add(self, happened: Interval) -> None:
        """Add what `happened` in the newest interval."""
        self._current.add(happened)

    def advance(self, time: float) -> None:
        """Go on to `time`, in seconds since the start, with as many in flight as were before."""
        while time >= self._current.end:
            self._observe(self._current.end)
            self._close()
        self._observe(time)

    def set_level(self, in_flight: int, limit: int) -> None:
        """From now on, so many requests are in flight, and so many might be."""
        self._level = in_flight, limit

    def intervals(self) -> list[Interval]:
        """All that there are, up to the time that has been reached; they are not to be changed."""
        last = dataclasses.replace(self._current, end=self._time)
        if self._closed and last.seconds < self._width / 2:  # its rates would be those of chance
            return [*self._closed[:-1], self._closed[-1].joined(last)]
        return [*self._closed, last]

    def _observe(self, time: float) -> None:
        if time > self._time:
            if self._level is not None:
                self._current.observe(time - self._time, *self._level)
            self._time = time

    def _close(self) -> None:
        self._closed.append(self._current)
        if len(self._closed) == CAPACITY:
            pairs = zip(self._closed[::2], self._closed[1::2], strict=True)
            self._closed = [first.joined(second) for first, second in pairs]
            self._width *= 2
        begin = self._current.end
        self._current = Interval(begin, begin + self._width)


def coarser(intervals: Sequence[Interval], most: int) -> list[Interval]:
    """The same in at most `most` intervals, of equal width but for the last one."""
    size = -(-len(intervals) // most)
    return [
        functools.reduce(Interval.joined, intervals[place : place + size])
        for place in range(0, len(intervals), size)
    ]
