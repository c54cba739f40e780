"""What an output file holds already: checked line by line, and remembered compactly."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import stat
from typing import TYPE_CHECKING, BinaryIO

from .inputs import reason_of
from .rows import decode_row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .rows import RowKey

__all__ = ["Answered", "Content", "OutputError", "is_stream", "rows_of", "survey"]

_DIGEST_SIZE = 16  # bytes; two of a million million keys are equal by a chance of 1 in 10 ** 15

_ID = re.compile(rb'\{"id":"[^"\\]*(?:\\.[^"\\]*)*"')
_BEFORE_ID = b'{"id":"'
_BEHIND_ID = b',"index":'


class OutputError(Exception):
    """The output cannot be written, or must not be.

    `path`, `reason` in words and, where one line is the reason, its number `line`, from 1. Where the
    operating system refused, its ``OSError`` is the ``__cause__``.
    """

    def __init__(self, path: Path, reason: str, line: int | None = None) -> None:
        self.path = path
        self.reason = reason
        self.line = line
        super().__init__(path, reason, line)

    def __str__(self) -> str:
        where = "" if self.line is None else f", line {self.line}"
        return f"{self.path}{where}: {self.reason}"


class Answered:
    """The keys of rows that are there. Each row answers one prompt of its key: a multiset.

    Of a key it keeps a digest, so that a row costs about 130 bytes of memory, however long its key is.
    ``len()`` is how many rows have not been taken.
    """

    __slots__ = ("_indexes", "_left")

    def __init__(self) -> None:
        self._indexes: dict[int, int | list[int]] = {}  # of the rows of a key; nearly all keys have one
        self._left = 0

    def __len__(self) -> int:
        return self._left

    def add(self, key: str, index: int) -> None:
        """Note a row of this key, which is that of the prompt `index`."""
        digest = _digest(key)
        known = self._indexes.get(digest)
        if known is None:
            self._indexes[digest] = index
        elif isinstance(known, list):
            known.append(index)
        else:
            self._indexes[digest] = [known, index]
        self._left += 1

    def take(self, key: str, index: int) -> int | None:
        """The index of a row of this key, best that of the prompt `index`; ``None``: there is no row.

        The row is then taken, for this prompt and no other.
        """
        digest = _digest(key)
        known = self._indexes.get(digest)
        if known is None:
            return None
        if not isinstance(known, list):
            del self._indexes[digest]
            taken = known
        else:
            taken = known.pop(known.index(index) if index in known else 0)
            if not known:
                del self._indexes[digest]
        self._left -= 1
        return taken


def _digest(key: str) -> int:
    # an integer takes 16 bytes less than the bytes do
    encoded = key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=_DIGEST_SIZE).digest(), "little")


@dataclasses.dataclass(slots=True)
class Content:
    """What is in an output file: the rows `answered`, how many have `failed`, the `size` of all in bytes."""

    answered: Answered = dataclasses.field(default_factory=Answered)
    failed: int = 0
    size: int = 0

    @classmethod
    def of(cls, path: Path, file: BinaryIO, *, retry_failed: bool) -> Content:
        """Read `file` to its end; with `retry_failed`, the rows that have failed are not answered."""
        content = cls()
        for line, row in rows_of(path, file):
            content.size += len(line)
            content.failed += row.failed
            if not (row.failed and retry_failed):
                content.answered.add(row.id, row.place)
        return content


def survey(path: Path, *, retry_failed: bool = False) -> Content:
    """What a run would find in the output file `path`: nothing, if there is none, or it is not a file.

    It is only read, and not locked, so it may change meanwhile. A file that holds anything but rows of
    answers, or cannot be read, is an `OutputError`.
    """
    try:
        if is_stream(path):
            return Content()
        with path.open("rb") as file:
            return Content.of(path, file, retry_failed=retry_failed)
    except FileNotFoundError:
        return Content()
    except OSError as error:
        raise OutputError(path, reason_of(error)) from error


def is_stream(path: Path) -> bool:
    """Whether `path` is there and can only be written to: a device, or a FIFO."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def rows_of(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, RowKey]]:
    """Each whole line of `file`, the output file `path`, and what it says. Memory: one line.

    A line counts only if it ends in a newline: the rest behind the last one is passed over. A line that is
    not a row of answers, or a rest alone that is not the beginning of one, is an `OutputError`: the file is
    something else, which was named by mistake.
    """
    for number, line in enumerate(file, 1):
        if line.endswith(b"\n"):
            try:
                row = decode_row(line)
            except ValueError:
                raise _not_a_row(path, number) from None
            yield line, row
        elif number == 1 and not _begins_row(line):
            raise _not_a_row(path, number)


def _not_a_row(path: Path, number: int) -> OutputError:
    return OutputError(path, "not a row of answers; choose another file, or --overwrite", number)


def _begins_row(torn: bytes) -> bool:
    """Whether what is there of a row may be of this program; a row of an input begins in another way."""
    identified = _ID.match(torn)
    expected, found = (_BEHIND_ID, torn[identified.end() :]) if identified else (_BEFORE_ID, torn)
    return found.startswith(expected) or expected.startswith(found)
