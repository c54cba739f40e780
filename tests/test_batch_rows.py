"""Rows of the output: what a line looks like, and what is read back from it."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyagent.batch import Attempt, ErrorRecord, Result, Timings
from anyagent.batch._files.rows import ROW_COLUMNS, RowKey, decode_row, encode_row

from .properties import REPEATABLE, TEXTS, chain

TIMINGS = Timings(queued=1.5, sent=2.0, first_event=2.25, end=3.0)
BUSY = ErrorRecord("AgentError", 429, "too many")

_numbers = st.floats(allow_nan=False, allow_infinity=False)
_times = st.none() | _numbers
_errors = st.builds(ErrorRecord, type=TEXTS, code=st.none() | TEXTS | st.integers(), details=TEXTS)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | _numbers | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
RESULTS: st.SearchStrategy[Result] = st.builds(
    Result,
    id=TEXTS,
    index=st.integers(min_value=0),
    text=st.none() | TEXTS,
    tokens_used=st.none() | st.integers(),
    attempts=st.lists(
        st.builds(
            Attempt,
            agent=TEXTS,
            sent=_times,
            first_event=_times,
            end=_numbers,
            error=st.none() | _errors,
            partial=TEXTS,
        ),
        max_size=3,
    ).map(tuple),
    timings=st.builds(Timings, queued=_numbers, sent=_times, first_event=_times, end=_numbers),
    error=st.none() | _errors,
    columns=st.dictionaries(TEXTS.filter(lambda name: name not in ROW_COLUMNS), _values, max_size=4),
)


def answered(**columns: object) -> Result:
    attempt = Attempt("localhost:8000/ws", 2.0, 2.25, 3.0)
    return Result("a", 7, "Hello", 2, (attempt,), TIMINGS, None, columns)


def test_an_answer_is_one_line_with_its_own_columns_first() -> None:
    assert encode_row(answered(label="x", weight=0.5)) == (
        b'{"id":"a","index":7,"text":"Hello","tokens_used":2,'
        b'"attempts":[{"agent":"localhost:8000/ws","sent":2.0,"first_event":2.25,"end":3.0}],'
        b'"timings":{"queued":1.5,"sent":2.0,"first_event":2.25,"end":3.0},"error":null,'
        b'"label":"x","weight":0.5}\n'
    )


def test_a_failed_row_has_no_text_and_says_why() -> None:
    attempt = Attempt("localhost:8000/ws", 2.0, None, 3.0, BUSY, "Hel")
    line = encode_row(Result("a", 7, None, None, (attempt,), TIMINGS, BUSY))
    row = json.loads(line)
    assert (row["text"], row["tokens_used"]) == (None, None)
    assert row["error"] == {"type": "AgentError", "code": 429, "details": "too many"}
    assert row["attempts"][0]["error"] == row["error"]
    assert row["attempts"][0]["partial"] == "Hel"


def test_a_newline_in_a_text_does_not_end_the_line() -> None:
    line = encode_row(answered(text_of_old="a\r\nb\u2028c"))
    assert line.splitlines(keepends=True) == [line]


def test_dates_and_the_like_become_text_and_numbers_that_are_not_finite_null() -> None:
    columns: dict[str, Any] = {
        "date": datetime.date(2030, 1, 2),
        "datetime": datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
        "time": datetime.time(3, 4),
        "duration": datetime.timedelta(seconds=90),
        "decimal": decimal.Decimal("1.50"),
        "bytes": b"\xff",
        "uuid": uuid.UUID(int=1),
        "nan": float("nan"),
        "infinite": [float("inf")],
        "tuple": (1, 2),
    }
    row = json.loads(encode_row(answered(**columns)))
    assert {name: row[name] for name in columns} == {
        "date": "2030-01-02",
        "datetime": "2030-01-02T03:04:05Z",
        "time": "03:04:00",
        "duration": "PT90S",
        "decimal": "1.50",
        "bytes": "/w==",
        "uuid": "00000000-0000-0000-0000-000000000001",
        "nan": None,
        "infinite": [None],
        "tuple": [1, 2],
    }


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("value", [object(), 1j, "secret \ud800", {"deep": nested(100_000)}, {("a",): 1}])
def test_a_column_that_json_does_not_know_is_named_and_not_shown(value: object) -> None:
    with pytest.raises(TypeError, match=r"^the column 'odd' holds what JSON does not know$") as caught:
        encode_row(answered(fine=1, odd=value, too=2))
    assert chain(caught.value) == [caught.value]


@pytest.mark.parametrize("name", ROW_COLUMNS)
def test_a_column_with_the_name_of_one_of_the_rows_own_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'"):
        encode_row(answered(**{"a": 1, name: 2}))


def test_a_row_is_known_by_its_id_and_whether_it_failed() -> None:
    assert decode_row(encode_row(answered(error_of_old=1))) == RowKey("a", 7, failed=False)
    failed = Result("b", 0, None, None, (), TIMINGS, BUSY)
    assert decode_row(encode_row(failed)) == RowKey("b", 0, failed=True)


OWN = json.loads(encode_row(answered()))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"null\n",
        b"[]\n",
        b'{"id":"a","text":"Hello"}\n',
        b"\xff\n",
        json.dumps(OWN | {"id": 1}).encode(),
        json.dumps(OWN | {"text": 1}).encode(),
        json.dumps(OWN | {"error": "no"}).encode(),
        json.dumps(OWN | {"attempts": [1]}).encode(),
        json.dumps({name: value for name, value in OWN.items() if name != "timings"}).encode(),
        json.dumps(OWN).encode() + b"{}",
        json.dumps(OWN).encode().replace(b"Hello", b"H\xffllo"),
        json.dumps(OWN).encode()[:-1] + b',"deep":' + b"[" * 100_000,
    ],
)
def test_what_is_no_row_is_a_value_error_that_does_not_show_it(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not a row of answers$") as caught:
        decode_row(line)
    assert chain(caught.value) == [caught.value]


@REPEATABLE
@given(RESULTS)
def test_any_row_survives(result: Result) -> None:
    line = encode_row(result)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    row = json.loads(line)
    assert list(row) == [*ROW_COLUMNS, *result.columns]
    assert {name: row[name] for name in result.columns} == result.columns
    assert (row["id"], row["index"], row["text"]) == (result.id, result.index, result.text)
    assert decode_row(line) == RowKey(result.id, result.index, result.error is not None)


@REPEATABLE
@given(RESULTS, st.data())
def test_no_torn_row_passes_for_a_whole_one(result: Result, data: st.DataObject) -> None:
    line = encode_row(result)
    cut = data.draw(st.integers(0, len(line) - 2))
    with pytest.raises(ValueError, match="not a row"):
        decode_row(line[:cut])
