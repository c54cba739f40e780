"""Clocks that jump as soon as every task waits for time, so that a deadlock ends at once, too."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

import trio.testing

__all__ = ["JumpingLoop", "jumping"]


def jumping(backend: str) -> dict[str, Any]:
    """The options with which `anyio.run` runs `backend` in virtual time."""
    if backend == "asyncio":
        return {"loop_factory": JumpingLoop}
    return {"clock": trio.testing.MockClock(autojump_threshold=0)}


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
