"""How much may be asked in a minute: token buckets, and the gate that waits for them."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

import anyio
import anyio.lowlevel

if TYPE_CHECKING:
    from ._config import Rates

__all__ = ["Gate", "RateGate", "TokenBucket"]

_GUESS: Final = 100.0  # tokens of an answer, as long as none is known
_REMEMBERED: Final = 100  # answers that the estimate is the mean of, about


class Gate(Protocol):
    """What every attempt has to pass."""

    async def enter(self) -> None:
        """Wait, first come, first served, until one more attempt may be sent.

        Cancelled: nothing is taken.
        """

    def leave(self, tokens_used: int | None) -> None:
        """An attempt that entered has ended, and has used that much; ``None``: it got no answer."""


class TokenBucket:
    """Fills up at `rate` (per second, maybe infinite), and is full at first; `now` is of any monotonic clock.

    Full is what comes in a second, and no less than `least`. What it holds may become less than nothing, by
    what is taken without being there.
    """

    def __init__(self, rate: float, least: float) -> None:
        self.least = least
        self._rate = rate
        self._empty_at = -math.inf  # when it held nothing, or will

    def ready_at(self, amount: float) -> float:
        """From when on it holds `amount`, which must not be more than a full bucket."""
        return self._empty_at + amount / self._rate

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, whether it is there or not; a negative one is given back."""
        full_for = max(1.0, self.least / self._rate)  # seconds
        self._empty_at = max(self._empty_at, now - full_for) + amount / self._rate


class RateGate:
    """The gate of `Rates`.

    An attempt takes one request, and as many tokens as answers have used on average. When it has ended, that
    is set right by what it used. One that got no answer gets its tokens back, since nobody knows whether the
    agent has used any, and most often it has not; but not the request.

    The bucket of tokens holds two answers at least, so that what one gives back is not lost.
    """

    def __init__(self, rates: Rates) -> None:
        self._estimate = _GUESS
        self._requests = TokenBucket(_per_second(rates.requests_per_minute), 1)
        self._tokens = TokenBucket(_per_second(rates.tokens_per_minute), 2 * self._estimate)
        self._answers = 0
        self._reserved: deque[float] = deque()  # tokens, for each attempt that has entered
        self._waiting: deque[_Waiter] = deque()

    async def enter(self) -> None:
        waiter = _Waiter()
        self._waiting.append(waiter)
        self._admit()
        try:
            if waiter.admitted:
                await anyio.lowlevel.checkpoint()
            while not waiter.admitted:
                waiter.woken = anyio.Event()
                with anyio.CancelScope(deadline=waiter.until):
                    await waiter.woken.wait()
                self._admit()
        except BaseException:
            if waiter.admitted:
                self._take(-1, -self._reserved.pop())
            else:
                self._waiting.remove(waiter)
            self._admit()
            raise

    def leave(self, tokens_used: int | None) -> None:
        reserved = self._reserved.popleft()  # whichever: only their sum matters
        if tokens_used is None:
            self._take(0, -reserved)
        else:
            self._take(0, tokens_used - reserved)
            self._answers += 1
            self._estimate += (tokens_used - self._estimate) / min(self._answers, _REMEMBERED)
            self._tokens.least = 2 * self._estimate
        self._admit()

    def _admit(self) -> None:
        """Let in all that there is enough for; only the first of the others waits for a moment."""
        now = anyio.current_time()
        while self._waiting:
            first = self._waiting[0]
            ready_at = max(self._requests.ready_at(1), self._tokens.ready_at(self._estimate))
            if ready_at > now:
                sooner = ready_at < first.until
                first.until = ready_at
                if sooner:
                    first.woken.set()
                return
            self._take(1, self._estimate)
            self._reserved.append(self._estimate)
            self._waiting.popleft()
            first.admitted = True
            first.woken.set()

    def _take(self, requests: int, tokens: float) -> None:
        now = anyio.current_time()
        self._requests.take(requests, now)
        self._tokens.take(tokens, now)


class _Waiter:
    """One who waits: until an event, or until its tokens are there if it is the first."""

    def __init__(self) -> None:
        self.woken = anyio.Event()
        self.until = math.inf
        self.admitted = False


def _per_second(per_minute: float | None) -> float:
    return math.inf if per_minute is None else per_minute / 60
