"""The lanes of one connection."""

from __future__ import annotations

from collections import deque
from itertools import count

__all__ = ["Lanes"]


class Lanes:
    """Gives out at most `limit` lanes at once.

    `names` are used again once they are released, the one that was released first comes first; with ``None``
    every lane is new ("1", "2", ...).
    """

    def __init__(self, names: tuple[str, ...] | None, limit: int) -> None:
        self.in_use = 0
        self._limit = limit
        self._free = None if names is None else deque(names)
        self._fresh = count(1)

    @property
    def free(self) -> bool:
        """Whether there is one to `take`."""
        return self.in_use < self._limit and (self._free is None or bool(self._free))

    def take(self) -> str:
        self.in_use += 1
        return str(next(self._fresh)) if self._free is None else self._free.popleft()

    def release(self, lane: str) -> None:
        self.in_use -= 1
        if self._free is not None:
            self._free.append(lane)

    def resize(self, limit: int) -> None:
        """Allow `limit` lanes at once from now on; those beyond it stay with their holders until released."""
        self._limit = limit
