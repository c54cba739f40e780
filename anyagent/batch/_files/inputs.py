"""Prompts out of files and standard input, read one by one."""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import stat
import sys
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

import msgspec

from .._prompt import Prompt
from .rows import ROW_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import BinaryIO

__all__ = [
    "DEEPEST",
    "InputError",
    "InputFormat",
    "Names",
    "Unfit",
    "count_prompts",
    "format_of",
    "names_of",
    "prompt_of",
    "read_prompts",
]

InputFormat: TypeAlias = Literal["jsonl", "csv", "tsv", "text", "parquet"]
"""How prompts are written down; see `read_prompts`."""

DEEPEST: Final = 200
"""How many lists and objects a column may have inside one another: few enough to be written out again."""

_FORMATS: Final[dict[str, InputFormat]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
}
_DELIMITERS: Final = {"csv": ",", "tsv": "\t"}
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
# Characters of CSV: a quote that is never closed makes all the rest of a file one field.
_LONGEST_FIELD: Final = 2**24
_MOST_NAMES: Final = 20  # in a message
_BUFFER: Final = 2**20  # bytes

_decode: Final = msgspec.json.Decoder(dict[str, object]).decode


class InputError(Exception):
    """An input that cannot be read, or a row of it that is no prompt.

    * `source`: the path of the file, or ``"standard input"``.
    * `line`: where in it, from 1, or ``None``; the number of the row if `unit` is ``"row"``.
    * `reason`: what is wrong with it. It may name columns, and holds nothing else of the input.
    """

    def __init__(
        self, source: str, line: int | None, reason: str, unit: Literal["line", "row"] = "line"
    ) -> None:
        self.source = source
        self.line = line
        self.reason = reason
        self.unit = unit
        super().__init__(source, line, reason, unit)

    def __str__(self) -> str:
        where = "" if self.line is None else f", {self.unit} {self.line}"
        return f"{self.source}{where}: {self.reason}"


class Unfit(ValueError):
    """What is wrong with a row, or with the columns of a file."""


class Names(NamedTuple):
    """Which columns hold the id, if any does, and the text."""

    id: str | None
    text: str


def format_of(path: Path) -> InputFormat:
    """The format that the suffix of `path` stands for, else `InputError`."""
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        known = ", ".join(_FORMATS)
        raise InputError(str(path), None, f"no format is known for its name; known are {known}") from None


def read_prompts(
    path: Path | None,
    format: InputFormat,
    *,
    id_column: str | None = None,
    text_column: str | None = None,
) -> Generator[Prompt, None, None]:
    """The prompts of the file `path`, or of standard input (``None``), each read when it is asked for.

    * ``"jsonl"``: one JSON object a line, UTF-8; blank lines are skipped.
    * ``"csv"``, ``"tsv"``: as in RFC 4180, the first line names the columns; with commas or tabs.
    * ``"text"``: one prompt a line; blank lines are skipped.
    * ``"parquet"``: needs pyarrow, and a file.

    The text is in the column `text_column` (default ``"text"``), a string that is not blank. The id, a string
    that is not empty or an integer, is in `id_column` (default ``"id"``, else ``"custom_id"``, else there is
    none); null stands for none. All other columns become the prompt's `columns`. They must not have the name
    of one that the output has of its own (`ROW_COLUMNS`).

    Raises `InputError` for anything else. What stands before is given out first. The file is open from the
    first prompt that is taken to the end, or until the generator is closed.
    """
    source = "standard input" if path is None else str(path)
    try:
        if format == "parquet":
            from .parquet import read_parquet  # imports this module

            yield from read_parquet(path, source, id_column, text_column)
            return
        with _opened(path, source) as file:
            # Nearly all lines come straight from the file; only the first may begin with a mark.
            lines = itertools.chain([next(file, b"").removeprefix(_BYTE_ORDER_MARK)], file)
            if format == "jsonl":
                yield from _read_jsonl(lines, source, id_column, text_column)
            elif format == "text":
                yield from _read_text(lines, source)
            else:
                yield from _read_csv(lines, source, _DELIMITERS[format], id_column, text_column)
    except OSError as exc:
        raise InputError(source, None, reason_of(exc)) from exc


def count_prompts(path: Path | None, format: InputFormat) -> int | None:
    """About how many prompts `read_prompts` will give, found out quickly, without looking at each.

    ``None`` for standard input, for what is no regular file and so can be read only once, and for what
    cannot be counted; `read_prompts` says why.
    """
    try:
        if path is None or not stat.S_ISREG(path.stat().st_mode):
            return None
        if format == "parquet":
            from .parquet import count_rows

            return count_rows(path)
        with path.open("rb", buffering=_BUFFER) as file:
            if format not in _DELIMITERS:
                return sum(not line.isspace() for line in file)
            _allow_long_fields()
            text = (line.decode(errors="replace") for line in file)
            rows = sum(map(bool, csv.reader(text, delimiter=_DELIMITERS[format])))
            return max(rows - 1, 0)
    except (OSError, ValueError, ImportError, csv.Error):
        return None


def reason_of(exc: OSError) -> str:
    """What the operating system says, as it stands behind a colon."""
    if exc.strerror is None:
        return type(exc).__name__
    return exc.strerror[:1].lower() + exc.strerror[1:]


def names_of(columns: Sequence[str], id_column: str | None, text_column: str | None) -> Names:
    """Which of `columns` hold what, as `read_prompts` says, else `Unfit`."""
    id_name = id_column
    if id_name is None:
        id_name = next((name for name in ("id", "custom_id") if name in columns), None)
    text_name = "text" if text_column is None else text_column
    for name in (id_name, text_name):
        if name is not None and name not in columns:
            raise Unfit(_unknown(name, columns))
    if id_name == text_name:
        raise Unfit(f"the column {text_name!r} cannot be both the id and the text")
    seen = {id_name, text_name}
    for name in columns:
        if name in ROW_COLUMNS and name not in seen:
            raise Unfit(f"the output has a column {name!r} of its own: rename that of the input")
    if len(set(columns)) != len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise Unfit(f"there are two columns {twice!r}")
    return Names(id_name, text_name)


def prompt_of(row: dict[str, object], names: Names) -> Prompt:
    """The prompt of `row`, whose remainder becomes the prompt's columns, else `Unfit`."""
    text = row.pop(names.text)
    if not isinstance(text, str):
        raise Unfit(f"{names.text!r} must be a string")
    if not text or text.isspace():
        raise Unfit(f"{names.text!r} is empty")
    row_id = None if names.id is None else row.pop(names.id)
    if isinstance(row_id, int) and not isinstance(row_id, bool):
        row_id = str(row_id)
    elif row_id is not None and not isinstance(row_id, str):
        raise Unfit(f"{names.id!r} must be a string or an integer")
    elif row_id == "":
        raise Unfit(f"{names.id!r} is empty")
    return Prompt(text, row_id, None, None, row)


def _opened(path: Path | None, source: str) -> AbstractContextManager[BinaryIO]:
    if path is not None:
        return path.open("rb", buffering=_BUFFER)
    if sys.stdin is None:  # the process was started without one
        raise InputError(source, None, "it is closed")
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):  # it is no file, but what a program has put there
        return contextlib.nullcontext(sys.stdin.buffer)
    # Not by its own buffer: the interpreter could not end while a thread waits for that.
    return open(descriptor, "rb", buffering=_BUFFER, closefd=False)


def _read_jsonl(
    lines: Iterable[bytes], source: str, id_column: str | None, text_column: str | None
) -> Iterator[Prompt]:
    # Most rows have the same columns; which of these hold what is found out once.
    known = functools.lru_cache(maxsize=100)(
        functools.partial(names_of, id_column=id_column, text_column=text_column)
    )
    for number, line in enumerate(lines, 1):
        try:
            row = _decode(line)
            prompt = prompt_of(row, known(tuple(row)))
            if row and _is_deep(row, line):
                raise Unfit(_TOO_DEEP)
        except Unfit as exc:
            reason = str(exc)
        except RecursionError:
            reason = _TOO_DEEP
        except (msgspec.DecodeError, UnicodeError) as exc:
            if not line.strip():
                continue
            if not line.endswith(b"\n"):
                reason = "the last line is not complete"
            elif isinstance(exc, UnicodeError):
                reason = "not UTF-8"
            else:
                reason = "not a JSON object"
        else:
            yield prompt
            continue
        # Raised out here: the original may hold the whole row, and would become the __context__.
        raise InputError(source, number, reason)


def _read_csv(
    lines: Iterable[bytes], source: str, delimiter: str, id_column: str | None, text_column: str | None
) -> Iterator[Prompt]:
    _allow_long_fields()
    rows = csv.reader(_decoded(lines, source), delimiter=delimiter, strict=True)
    header: list[str] = []
    names: Names | None = None
    while True:
        number = rows.line_num + 1
        try:
            fields = next(rows, None)
            if fields is None:
                break
            if not fields:  # a blank line
                continue
            if names is None:
                header, names = fields, names_of(fields, id_column, text_column)
                continue
            if len(fields) != len(header):
                raise Unfit(f"{len(fields)} fields, but {len(header)} columns")
            prompt = prompt_of(dict(zip(header, fields, strict=True)), names)
        except Unfit as exc:
            raise InputError(source, number, str(exc)) from None
        except csv.Error as exc:
            raise InputError(source, number, _csv_reason(exc)) from None
        yield prompt
    if names is None:
        raise InputError(source, None, "it is empty: the first line must name the columns")


def _read_text(lines: Iterable[bytes], source: str) -> Iterator[Prompt]:
    for line in _decoded(lines, source):
        if line and not line.isspace():
            yield Prompt(line.rstrip("\r\n"))


def _decoded(lines: Iterable[bytes], source: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as exc:
            cut = exc.reason == "unexpected end of data"
        else:
            yield text
            continue
        raise InputError(source, number, "the last line is not complete" if cut else "not UTF-8")


_TOO_DEEP: Final = "nested too deeply"


def _is_deep(row: dict[str, object], line: bytes) -> bool:
    if line.count(b"[") + line.count(b"{") <= DEEPEST:
        return False
    layer = list(row.values())
    for _ in range(DEEPEST):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(layer)


def _allow_long_fields() -> None:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))  # it is one for the whole process


def _csv_reason(exc: csv.Error) -> str:
    message = str(exc)
    if "field limit" in message:
        return f"a field is longer than {csv.field_size_limit():,} characters: is a quote not closed?"
    if "end of data" in message:
        return "the last row is not complete: a quote is not closed"
    if "new-line" in message:
        return "a line ends with a carriage return alone"
    return "text behind the quote that closes a field"


def _unknown(name: str, columns: Sequence[str]) -> str:
    listed = ", ".join(columns[:_MOST_NAMES]) + (", ..." if len(columns) > _MOST_NAMES else "")
    reason = f"unknown column {name!r}; there are: {listed or 'none'}"
    if "custom_id" in columns and "body" in columns:  # a file for the Batch API of OpenAI
        return f'{reason}; expected is {{"custom_id": "...", "{name}": "the prompt"}}'
    return reason
