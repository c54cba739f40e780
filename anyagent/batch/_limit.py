"""How many requests may be in flight to an agent, found out from its answers: pure, no clock and no I/O."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ._config import Adaptive

__all__ = ["AdaptiveLimit"]

_BUSY_CUT: Final = 0.85  # what is left of the limit when the agent was busy
_ROUNDS: Final = 10  # until the limit is back where it was cut; a round is as many answers as the limit
_QUEUED: Final = 0.5  # the share of the requests in flight that may wait in the agent
_DRAINED: Final = 0.5  # what the limit is cut to for that, as a share of those that did not wait
_SPURIOUS: Final = 0.7  # a cut after which the first event takes this much of the time before: of no use
_WINDOW: Final = 12  # answers that are measured together, at least
_SIGNIFICANT: Final = 3  # standard errors


class AdaptiveLimit:
    """The limit of one agent; times are in seconds, by any monotonic clock.

    It grows and is cut as the congestion window of TCP is, and for the same reasons.

    * Slow start: it grows by one with each answer, so that it doubles in a round trip, until it is cut first.
    * An agent that is busy has more than it takes: the limit is cut by a seventh. That counts once for all
      requests that were sent before the cut, and none of them makes it grow again.
    * An agent that queues has more than it can work on: its first events come later. How many requests wait
      there follows from Little's law, out of the time to the first event compared with the lowest that was
      seen (as in TCP Vegas; the time that the rest of an answer takes does not matter). Once they are more
      than half of those in flight, and that is not chance, the limit is cut to half of what the agent works
      on, so that its queue drains and the lowest time can be measured afresh. If that time is hardly lower
      than before the cut, the agent has become slower by itself: the cut is undone.
    * After a cut it is soon back near the ceiling, which is where it was cut, stays there, and then goes
      beyond it slowly (the curve of CUBIC). After twice the time the ceiling is forgotten: slow start.
    * It does not grow while less than half of it is used.
    """

    def __init__(self, settings: Adaptive, now: float) -> None:
        self._minimum = settings.minimum
        self._maximum = settings.maximum
        self._limit: float = settings.initial
        self._floor = self._ceiling = 0.0  # where it was cut to, and where it is to come back
        self._rounds = math.inf  # since the cut
        self._cut_at = -math.inf
        self._unsettled = 0.0  # answers until the cut has taken effect
        self._lowest = math.inf  # mean time to the first event
        self._before: tuple[float, float] | None = None  # that time and the limit, before the last cut
        self._window = _Window(self._limit, now)

    @property
    def limit(self) -> int:
        """How many requests may be in flight now."""
        return round(self._limit)

    @property
    def at_minimum(self) -> bool:
        """Whether it cannot be cut further."""
        return self.limit <= self._minimum

    def succeeded(self, now: float, *, in_flight: int, sent: float, first_event: float | None) -> None:
        """A request that was sent at `sent` has been answered to its end, which is now.

        `in_flight` counts it, too. Without a `first_event`, its end stands for it.
        """
        sent_since = sent > self._cut_at
        if not self._unsettled:
            self._window.add((now if first_event is None else first_event) - sent, now - sent)
            if self._window.full and self._judge(now):
                return
        elif sent_since:
            self._unsettled = max(self._unsettled - 1, 0)
            self._window = _Window(self._limit, now)
        if sent_since and 2 * in_flight >= self._limit:
            self._grow()

    def busy(self, now: float, *, sent: float) -> None:
        """The agent was too busy to begin with a request that was sent at `sent`."""
        if sent > self._cut_at:
            taken = self.limit - 1
            self._cut(now, min(self._limit * _BUSY_CUT, taken), ceiling=taken)

    def _grow(self) -> None:
        self._rounds += 1 / self._limit
        if self._rounds > 2 * _ROUNDS:
            self._limit = self._bounded(self._limit + 1)
        else:
            curve = (self._rounds / _ROUNDS - 1) ** 3
            self._limit = self._bounded(self._ceiling + (self._ceiling - self._floor) * curve)

    def _judge(self, now: float) -> bool:
        """Compare what was measured with the lowest; returns whether that has changed the limit."""
        window = self._window
        self._window = _Window(self._limit, now)
        first_event = window.first_event
        self._lowest = min(self._lowest, first_event)
        before, self._before = self._before, None
        if before is not None and first_event > before[0] * _SPURIOUS:
            self._limit = before[1]
            self._rounds = math.inf
            return True
        waited = first_event - self._lowest
        if waited - _SIGNIFICANT * window.standard_error <= window.total * _QUEUED:
            return False
        working = min(window.in_flight(now), self._limit) * (1 - waited / window.total)
        before = first_event, self._limit
        self._cut(now, working * _DRAINED, ceiling=working / (1 - _QUEUED))
        self._before = before
        self._lowest = math.inf
        self._unsettled = self._limit
        return True

    def _cut(self, now: float, limit: float, *, ceiling: float) -> None:
        self._cut_at = now
        self._limit = self._floor = self._bounded(limit)
        self._ceiling = self._bounded(ceiling)
        self._rounds = 0
        self._before = None
        self._window = _Window(self._limit, now)

    def _bounded(self, limit: float) -> float:
        return min(max(limit, self._minimum), self._maximum)


class _Window:
    """Means over as many answers as the limit was, and not too few."""

    def __init__(self, limit: float, start: float) -> None:
        self._missing = max(limit, _WINDOW)
        self._start = start
        self._count = 0
        self._first_events = self._squares = self._totals = 0.0

    def add(self, first_event: float, total: float) -> None:
        self._missing -= 1
        self._count += 1
        self._first_events += first_event
        self._squares += first_event * first_event
        self._totals += total

    @property
    def full(self) -> bool:
        return self._missing <= 0

    @property
    def first_event(self) -> float:
        """Time to the first event."""
        return self._first_events / self._count

    @property
    def standard_error(self) -> float:
        """That of `first_event`."""
        variance = self._squares / self._count - self.first_event**2
        return math.sqrt(max(variance, 0) / self._count)

    @property
    def total(self) -> float:
        """Time to the end."""
        return self._totals / self._count

    def in_flight(self, now: float) -> float:
        """Throughput times time to the end: Little's law."""
        elapsed = now - self._start
        return self._totals / elapsed if elapsed > 0 else math.inf
