"""One row of the output as a line of JSON, and back."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from .._result import Attempt, ErrorRecord, Result, Timings  # noqa: TC001 - msgspec reads the annotations

__all__ = ["ROW_COLUMNS", "RowKey", "decode_row", "encode_row"]

ROW_COLUMNS: Final = ("id", "index", "text", "tokens_used", "attempts", "timings", "error")
"""What each row has of its own, in this order; the columns of its prompt follow."""


class RowKey(NamedTuple):
    """What has to be known of a row to go on behind it: whose it is, where that is, whether it failed."""

    id: str
    place: int
    failed: bool


class _Row(msgspec.Struct):
    id: str
    index: int
    text: str | None
    tokens_used: int | None
    attempts: tuple[Attempt, ...]
    timings: Timings
    error: ErrorRecord | None


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(_Row).decode


def encode_row(result: Result) -> bytes:
    """`result` as one line of JSON, its newline included: `ROW_COLUMNS`, and then its columns.

    Of what JSON does not know, a date, time, duration, `Decimal` or UUID becomes text (ISO 8601 for the first
    three), bytes become Base64, and numbers that are not finite become null. A column that holds anything
    else is a `TypeError`, and one with the name of the row's own a `ValueError`; both name it.
    """
    row = {
        "id": result.id,
        "index": result.index,
        "text": result.text,
        "tokens_used": result.tokens_used,
        "attempts": result.attempts,
        "timings": result.timings,
        "error": result.error,
        **result.columns,
    }
    if len(row) != len(ROW_COLUMNS) + len(result.columns):
        taken = next(name for name in ROW_COLUMNS if name in result.columns)
        raise ValueError(f"the column {taken!r} has the name of one of the output's")
    try:
        return _encode(row) + b"\n"
    except (TypeError, ValueError, RecursionError):
        name = next(name for name, value in row.items() if not _is_json({name: value}))
    # Raised out here: the original may hold the whole text, and would become the __context__.
    raise TypeError(f"the column {name!r} holds what JSON does not know")


def decode_row(line: bytes) -> RowKey:
    """The key of a row that `encode_row` has made, whatever columns it has besides; else `ValueError`."""
    try:
        row = _decode(line)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        row = None
    if row is None:
        raise ValueError("not a row of answers")
    return RowKey(row.id, row.index, row.error is not None)


def _is_json(value: object) -> bool:
    try:
        _encode(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
