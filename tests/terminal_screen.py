"""What is to be seen on a terminal after it was sent something."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["Screen"]

_TOKEN: Final = re.compile(
    r"\x1b\[(?P<number>\d*)(?P<command>[AJ])|\x1b\[[\d;]*m|(?P<other>[^\x1b])", re.DOTALL
)


class Screen:
    """A terminal with as many lines as it takes, and the few control sequences that the command uses.

    Any other one is an `AssertionError`. `widest` is the longest line there has been; one that is longer than
    `columns` goes on in the next line, as on a terminal.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._lines = [""]
        self._row = self._column = 0
        self._rest = ""
        self.wrapped: list[str] = []

    def feed(self, text: str) -> None:
        """Show `text`."""
        end = 0
        for match in _TOKEN.finditer(text):
            assert match.start() == end, f"unknown control sequence: {text[end : end + 20]!r}"
            end = match.end()
            if match["command"] == "A":
                self._row = max(0, self._row - int(match["number"] or 1))
            elif match["command"] == "J":
                del self._lines[self._row + 1 :]
                self._lines[self._row] = self._lines[self._row][: self._column]
            elif match["other"] is not None:
                self._put(match["other"])
        assert end == len(text), f"unknown control sequence: {text[end : end + 20]!r}"

    @property
    def lines(self) -> list[str]:
        """What is to be seen, without the spaces at the ends of lines; the cursor is in the last one."""
        return [line.rstrip() for line in self._lines]

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
            return
        if character == "\n" or self._column == self._columns:
            if character != "\n":
                self.wrapped.append(self._lines[self._row])
                self._column = 0
            self._row += 1
            if self._row == len(self._lines):
                self._lines.append("")
        if character != "\n":
            line = self._lines[self._row].ljust(self._column)
            self._lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
            self._column += 1
