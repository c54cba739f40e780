"""Clocks that jump as soon as every task waits for time, so that a deadlock ends at once, too."""

from __future__ import annotations

import asyncio
import functools
import math
import selectors
from typing import Any

import trio.lowlevel
import trio.testing

__all__ = ["JumpingLoop", "jumping"]


def jumping(backend: str) -> dict[str, Any]:
    """The options with which `anyio.run` runs `backend` in virtual time."""
    if backend == "asyncio":
        return {"loop_factory": JumpingLoop}
    clock = trio.testing.MockClock(autojump_threshold=0)
    setattr(clock, "_autojump", functools.partial(_jump_to_next_deadline, clock))  # noqa: B010 - for mypy
    return {"clock": clock}


def _jump_to_next_deadline(clock: trio.testing.MockClock) -> None:
    """What the clock itself does, but also where the sum of now and the rest rounds to a moment too early."""
    before = clock.current_time()
    rest = trio.lowlevel.current_statistics().seconds_to_next_deadline
    if 0 < rest < math.inf:
        clock.jump(rest)
        if clock.current_time() == before:
            clock.jump(math.ulp(before))


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that does not wait: a wait for time is over at once, and the clock says so."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(None if timeout is None else 0)
        if timeout is not None and not ready:
            self.now += max(timeout, 0)
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """For asyncio what `trio.testing.MockClock` with autojump is for Trio."""

    def __init__(self) -> None:
        self._jumping_selector = _JumpingSelector()
        super().__init__(self._jumping_selector)

    def time(self) -> float:
        return self._jumping_selector.now

    def jump(self, seconds: float) -> None:
        """Let `seconds` pass at once, as `trio.testing.MockClock.jump` does."""
        self._jumping_selector.now += seconds
