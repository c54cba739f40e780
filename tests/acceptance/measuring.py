"""What the acceptance tests measure with: the memory and the time that something takes at most."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MEBIBYTE", "SLACK", "Growth", "Stopwatch"]

MEBIBYTE = 2**20
SLACK = 0.5
"""How much later than its timeout something may end, in seconds."""


class Stopwatch:
    """Seconds of real time since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start


class Growth:
    """By how much Python's memory, that of all threads together, has grown at its peak, in bytes."""

    def __init__(self) -> None:
        self._before, _ = tracemalloc.get_traced_memory()

    @classmethod
    @contextlib.contextmanager
    def measured(cls) -> Iterator[Growth]:
        """Measure in the block; what has been allocated before does not count."""
        tracemalloc.start()
        try:
            yield cls()
        finally:
            tracemalloc.stop()

    @property
    def peak(self) -> int:
        _, peak = tracemalloc.get_traced_memory()
        return peak - self._before
