"""SIGINT and SIGTERM as exceptions, where there is a place for them."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from types import FrameType, TracebackType

__all__ = ["SIGNAL_POLL", "Signals", "Terminated"]

SIGNAL_POLL: Final = 0.1
"""How many seconds a wait may last before signals are looked after."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Terminated(SystemExit):
    """SIGTERM arrived; what `KeyboardInterrupt` is for SIGINT."""


class Signals:
    """Takes the two signals over while its block runs; for the main thread.

    Inside `raised`, a signal raises `KeyboardInterrupt` or `Terminated`. Anywhere else it waits for the next
    such place, so that nothing is left half done; yet a second signal means that this takes too long, and
    ends the process at once, after calling `last_words`, which must not wait for anything. A signal that was
    ignored when the process began stays ignored.
    """

    def __init__(self, last_words: Callable[[], object] = lambda: None) -> None:
        self._last_words = last_words
        self._raising: Collection[int] = ()
        self._pending: int | None = None

    def __enter__(self) -> Signals:
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in _SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def raised(self, numbers: Collection[int] = _SIGNALS) -> Iterator[None]:
        """In this block the signals `numbers` raise, and one that waits does so at its beginning."""
        self._raising = numbers
        try:
            if self._pending is not None and self._pending in numbers:
                self._raise(self._pending)
            yield
        finally:
            self._raising = ()

    def forget_interrupt(self) -> None:
        """The SIGINT that was raised, or waits to be, has been dealt with."""
        if self._pending == signal.SIGINT:
            self._pending = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in self._raising:
            self._pending = number
            self._raise(number)
        if self._pending is not None:
            self._last_words()
            os._exit(128 + number)
        self._pending = number

    def _raise(self, number: int) -> None:
        self._raising = ()
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(128 + number)
