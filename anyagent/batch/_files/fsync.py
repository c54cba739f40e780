"""How often written rows are made durable."""

from __future__ import annotations

import dataclasses
import re

from ...config import check_positive_integer, check_positive_number

__all__ = ["Fsync", "SyncPolicy"]

_ROWS = re.compile(r"[0-9]{1,18}")
_SECONDS = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)s")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fsync:
    """When rows that were written are synced to the disk, so that they outlast a power cut.

    * `rows` (default ``None``): a sync begins after this many, or once the one before has ended.
    * `seconds` (default 1): at the latest this long after the sync before.

    What comes first counts; ``None``: not for this reason; both ``None``: never, which leaves it to the
    operating system. A value that is not positive and finite is a `ValueError`.

    A row that was written outlasts the end of the process however it comes about, synced or not.
    """

    rows: int | None = None
    seconds: float | None = 1

    def __post_init__(self) -> None:
        if self.rows is not None:
            check_positive_integer("Fsync.rows", self.rows)
        if self.seconds is not None:
            check_positive_number("Fsync.seconds", self.seconds)

    @classmethod
    def parse(cls, text: str) -> Fsync:
        """Read ``"always"`` (after each row), ``"never"``, ``"100"`` (rows) or ``"5s"`` (seconds).

        Anything else is a `ValueError`.
        """
        if text == "never":
            return cls(seconds=None)
        if text == "always":
            return cls(rows=1, seconds=None)
        if _ROWS.fullmatch(text) and int(text):
            return cls(rows=int(text), seconds=None)
        seconds = _SECONDS.fullmatch(text)
        if seconds and float(seconds[1]):
            return cls(seconds=float(seconds[1]))
        raise ValueError(
            "fsync must be 'always', 'never', a positive number of rows such as '100', "
            f"or of seconds such as '5s', not {text!r}"
        )


class SyncPolicy:
    """Tells the one who appends rows when to sync them. Pure: does nothing itself, and is told the time.

    Whoever appends is the one who asks: after each `OutputFile.append` it calls `wrote`; whenever a sync is
    `due` it calls `began` and then has `OutputFile.sync` run in a thread, one at a time, while it goes on
    appending. Without anything else to do it waits for no longer than `next` says. At the end it syncs once
    more if rows are `pending`.

    `now` is in seconds, of any clock that does not go back.
    """

    def __init__(self, fsync: Fsync, now: float) -> None:
        self._fsync = fsync
        self._before = now
        self._rows = 0

    @property
    def pending(self) -> bool:
        """Whether there are rows that no sync has been begun for; false where there is to be none."""
        return self._rows > 0 and (self._fsync.rows is not None or self._fsync.seconds is not None)

    def wrote(self) -> None:
        """A row was appended."""
        self._rows += 1

    def began(self, now: float) -> None:
        """A sync begins now; it covers all rows that were appended before."""
        self._before = now
        self._rows = 0

    def due(self, now: float) -> bool:
        """Whether to begin a sync now."""
        return self.next(now) == 0

    def next(self, now: float) -> float | None:
        """In how many seconds a sync is due if no row is appended until then; ``None``: not at all."""
        if not self._rows:
            return None
        if self._fsync.rows is not None and self._rows >= self._fsync.rows:
            return 0.0
        if self._fsync.seconds is None:
            return None
        return max(0.0, self._before + self._fsync.seconds - now)
