"""Prompts out of JSON lines, CSV, plain text and standard input, and what is said of those that are none."""

from __future__ import annotations

import csv
import errno
import gc
import io
import itertools
import json
import os
import pickle
import sys
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyagent.batch import Prompt, Result, Timings
from anyagent.batch._files.inputs import (
    DEEPEST,
    InputError,
    InputFormat,
    count_prompts,
    format_of,
    read_prompts,
)
from anyagent.batch._files.rows import ROW_COLUMNS, decode_row, encode_row

from .properties import REPEATABLE, TEXTS, chain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from hypothesis.strategies import SearchStrategy

FORMATS: list[InputFormat] = ["jsonl", "csv", "tsv", "text"]
OPENAI = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": {"secret": 1}}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def written(content: bytes) -> Path:
        path = tmp_path / "prompts"
        path.write_bytes(content)
        return path

    return written


class Stdin:
    """What `sys.stdin` is while a test runs: bytes, as they come."""

    def __init__(self, pieces: Iterable[bytes | OSError]) -> None:
        self.buffer = io.BufferedReader(_Pieces(pieces), 8192)


class _Pieces(io.RawIOBase):
    def __init__(self, pieces: Iterable[bytes | OSError]) -> None:
        self._pieces = iter(pieces)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = next(self._pieces, b"")
        if isinstance(piece, OSError):
            raise piece
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable[bytes | OSError]], Stdin]:
    def replaced(pieces: Iterable[bytes | OSError]) -> Stdin:
        fake = Stdin(pieces)
        monkeypatch.setattr(sys, "stdin", fake)
        return fake

    return replaced


def read(content: bytes, format: InputFormat, **columns: str) -> tuple[list[Prompt], InputError | None]:
    """What `content` gives on standard input, and the error that it ends with."""
    before, sys.stdin = sys.stdin, Stdin([content[i : i + 4096] for i in range(0, len(content), 4096)])
    prompts = []
    try:
        for prompt in read_prompts(None, format, **columns):
            prompts.append(prompt)
    except InputError as exc:
        return prompts, exc
    finally:
        sys.stdin = before
    return prompts, None


def failure(content: bytes, format: InputFormat, **columns: str) -> str:
    """The error that `content` ends with, without the name of the source."""
    _, error = read(content, format, **columns)
    assert error is not None
    assert str(error).startswith("standard input")
    return str(error).removeprefix("standard input").removeprefix(", ")


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_a_row_of_json_gives_its_text_its_id_and_all_other_columns_in_order() -> None:
    row = {"z": [1, {"b": None, "a": 1.5}], "text": "Hello", "a": 2**70, "id": "r1", "m": "é\u2028"}
    prompts, error = read(jsonl(row), "jsonl")
    assert error is None
    assert prompts == [Prompt("Hello", "r1", columns={"z": row["z"], "a": 2**70, "m": "é\u2028"})]
    assert list(prompts[0].columns) == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("row", "row_id"),
    [
        ({"text": "a"}, None),
        ({"text": "a", "id": None}, None),
        ({"text": "a", "id": "x"}, "x"),
        ({"text": "a", "id": 17}, "17"),
        ({"text": "a", "id": -(2**70)}, str(-(2**70))),
        ({"text": "a", "custom_id": "y"}, "y"),
    ],
)
def test_an_id_is_a_string_an_integer_or_none(row: dict[str, object], row_id: str | None) -> None:
    assert read(jsonl(row), "jsonl") == ([Prompt("a", row_id)], None)


def test_an_id_goes_before_a_custom_id_which_is_a_column_like_others_then() -> None:
    row = {"custom_id": "y", "id": "x", "text": "a"}
    assert read(jsonl(row), "jsonl") == ([Prompt("a", "x", columns={"custom_id": "y"})], None)


def test_other_columns_can_be_named_as_id_and_text() -> None:
    row = {"question": "a", "number": 1, "custom_id": "y"}
    prompts = [Prompt("a", "1", columns={"custom_id": "y"})]
    assert read(jsonl(row), "jsonl", id_column="number", text_column="question") == (prompts, None)
    table = b"question,number,custom_id\r\na,1,y\r\n"
    assert read(table, "csv", id_column="number", text_column="question") == (prompts, None)


def test_the_texts_column_may_be_the_id() -> None:
    prompts = [Prompt("b", "a")]
    assert read(jsonl({"text": "a", "q": "b"}), "jsonl", id_column="text", text_column="q") == (prompts, None)


def test_blank_lines_and_a_byte_order_mark_are_passed_over() -> None:
    line = b'{"text":"a"}'
    content = b"\xef\xbb\xbf" + line + b"\r\n\n  \t\n" + line
    assert read(content, "jsonl") == ([Prompt("a")] * 2, None)
    assert read(b"\xef\xbb\xbf\n" + line, "jsonl") == ([Prompt("a")], None)
    assert read(b"\xef\xbb\xbfid,text\n\n1,a\n\n", "csv") == ([Prompt("a", "1")], None)
    assert read(b"\xef\xbb\xbfa\r\n\n \xc2\xa0\n b ", "text") == ([Prompt("a"), Prompt(" b ")], None)


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"\n \n\n"])
def test_an_input_without_rows_has_no_prompts(content: bytes) -> None:
    assert read(content, "jsonl") == ([], None)
    assert read(content, "text") == ([], None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"secret\n", "not a JSON object"),
        (b'["secret"]\n', "not a JSON object"),
        (b'{"text":"secret"\n', "not a JSON object"),
        (b'{"text":"secret"}{}\n', "not a JSON object"),
        (b'{"text":"secret\\ud800"}\n', "not a JSON object"),
        (b'{"text":"secret","n":1e999}\n', "not a JSON object"),
        (b'{"text":"secret\xff"}\n', "not UTF-8"),
        (b'{"text":"secret', "the last line is not complete"),
        (b'{"text":"secret\xc3', "the last line is not complete"),
        (b'{"text":"secret","n":' + b"[" * 100_000 + b"\n", "nested too deeply"),
        (b'{"text":"secret","n":' + b"[" * 300 + b"]" * 300 + b"}\n", "nested too deeply"),
        (b'{"text":"secret","n":' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}\n", "nested too deeply"),
        (b'{"text":["secret"]}\n', "'text' must be a string"),
        (b'{"text":null}\n', "'text' must be a string"),
        (b'{"text":""}\n', "'text' is empty"),
        (b'{"text":" \\n\\u00a0"}\n', "'text' is empty"),
        (b'{"text":"secret","id":""}\n', "'id' is empty"),
        (b'{"text":"secret","id":1.5}\n', "'id' must be a string or an integer"),
        (b'{"text":"secret","id":true}\n', "'id' must be a string or an integer"),
        (b'{"text":"secret","custom_id":["x"]}\n', "'custom_id' must be a string or an integer"),
        (b'{"id":"secret","prompt":"secret"}\n', "unknown column 'text'; there are: id, prompt"),
        (b"{}\n", "unknown column 'text'; there are: none"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_by_its_number_and_not_shown(line: bytes, reason: str) -> None:
    before = jsonl({"text": "a"}) + b"\n" + jsonl({"text": "b"})
    prompts, error = read(before + line, "jsonl")
    assert prompts == [Prompt("a"), Prompt("b")]
    assert error is not None
    assert (error.source, error.line, error.reason) == ("standard input", 4, reason)
    assert str(error) == f"standard input, line 4: {reason}"
    assert all("secret" not in repr(vars(exc)) + repr(exc) for exc in chain(error))


def test_columns_nested_as_deeply_as_is_allowed_can_be_written_out() -> None:
    lists: list[Any] = []
    for _ in range(DEEPEST - 1):
        lists = [lists]
    text = "[{" * DEEPEST
    prompts, error = read(jsonl({"text": text, "deep": lists}), "jsonl")
    assert error is None
    assert written(prompts[0])["deep"] == lists


def test_a_file_of_an_openai_batch_is_told_what_is_expected() -> None:
    assert failure(jsonl(OPENAI), "jsonl") == (
        "line 1: unknown column 'text'; there are: custom_id, method, url, body; "
        'expected is {"custom_id": "...", "text": "the prompt"}'
    )


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    row = {"id": "x", "text": "a"}
    assert failure(jsonl(row), "jsonl", id_column="x") == "line 1: unknown column 'x'; there are: id, text"
    reason = "line 1: unknown column 'x'; there are: id, text"
    for options in ({"id_column": "x"}, {"text_column": "x"}):
        assert failure(b"id,text\nonly the header is needed", "csv", **options) == reason
    many = {f"c{i}": 1 for i in range(1000)}
    assert failure(jsonl(many), "jsonl").endswith("c18, c19, ...")


@pytest.mark.parametrize("name", [name for name in ROW_COLUMNS if name not in ("id", "text")])
def test_a_column_that_the_output_has_of_its_own_is_to_be_renamed(name: str) -> None:
    reason = f"line 1: the output has a column '{name}' of its own: rename that of the input"
    assert failure(jsonl({"text": "a", name: 1}), "jsonl") == reason
    assert failure(b"text," + name.encode() + b"\na,1\n", "csv") == reason


def test_an_old_text_or_id_collides_when_another_column_is_named() -> None:
    row = {"id": "x", "text": "a", "q": "b"}
    assert "'text' of its own" in failure(jsonl(row), "jsonl", text_column="q")
    assert "'id' of its own" in failure(jsonl(row), "jsonl", id_column="q")


def test_one_column_cannot_be_both() -> None:
    row = {"text": "a"}
    reason = "line 1: the column 'text' cannot be both the id and the text"
    assert failure(jsonl(row), "jsonl", id_column="text") == reason


def test_a_table_gives_every_field_as_text() -> None:
    content = b'id,text,note\r\n1,"Hello, ""you""\r\nthere",\r\nx,b,"c\n\nd"'
    prompts = [
        Prompt('Hello, "you"\r\nthere', "1", columns={"note": ""}),
        Prompt("b", "x", columns={"note": "c\n\nd"}),
    ]
    assert read(content, "csv") == (prompts, None)
    assert read(content.replace(b",", b"\t"), "tsv") == (
        [Prompt('Hello\t "you"\r\nthere', "1", columns={"note": ""}), prompts[1]],
        None,
    )


@pytest.mark.parametrize(
    ("rows", "line", "reason"),
    [
        (b'a,"b\nc\n', 2, "the last row is not complete: a quote is not closed"),
        (b'a,"b\nc"\nd,"e"f\n', 4, "text behind the quote that closes a field"),
        (b"a,b\rc,d\n", 2, "a line ends with a carriage return alone"),
        (b"a,b\n\nc\n", 4, "1 fields, but 2 columns"),
        (b"a,b,c\n", 2, "3 fields, but 2 columns"),
        (b"a, \n", 2, "'text' is empty"),
        (b",b\n", 2, "'id' is empty"),
        (b'a,"b\nc\xff"\n', 3, "not UTF-8"),
        (b"a,b\nc,d\xc3", 3, "the last line is not complete"),
        (
            b'a,"' + b"x" * 2**24 + b'x"',
            2,
            "a field is longer than 16,777,216 characters: is a quote not closed?",
        ),
    ],
)
def test_a_bad_row_of_a_table_is_named_by_the_line_where_it_begins(
    rows: bytes, line: int, reason: str
) -> None:
    assert failure(b"id,text\n" + rows, "csv") == f"line {line}: {reason}"


def test_a_long_field_of_a_table_is_read() -> None:
    text = "x" * 2**20
    assert read(f'text\n"{text}"\n'.encode(), "csv") == ([Prompt(text)], None)


def test_a_table_needs_a_header_that_names_each_column_once() -> None:
    reason = ": it is empty: the first line must name the columns"
    assert failure(b"", "csv") == reason
    assert failure(b"\n\n", "csv") == reason
    assert failure(b"text,a,a\n", "csv") == "line 1: there are two columns 'a'"
    assert read(b"id,text\n", "csv") == ([], None)


def test_a_line_of_text_that_is_not_utf_8_is_named() -> None:
    assert failure(b"a\n\nb\xe9\n", "text") == "line 3: not UTF-8"
    assert failure(b"a\nb\xc3", "text") == "line 2: the last line is not complete"


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.jsonl", "jsonl"),
        ("a.b.NDJSON", "jsonl"),
        ("a.csv", "csv"),
        ("a.tsv", "tsv"),
        ("a.txt", "text"),
        ("a.parquet", "parquet"),
    ],
)
def test_the_suffix_of_a_file_says_its_format(name: str, format: InputFormat) -> None:
    assert format_of(Path(name)) == format


@pytest.mark.parametrize("name", ["a", "a.json", "jsonl", "a.jsonl.gz"])
def test_an_unknown_suffix_is_an_error_that_names_those_known(name: str) -> None:
    with pytest.raises(InputError, match=r"known are \.jsonl, \.ndjson, \.csv, \.tsv, \.txt, \.parquet$"):
        format_of(Path(name))


@pytest.mark.parametrize("format", [*FORMATS, "parquet"])
def test_a_file_that_cannot_be_opened_is_an_error_with_the_systems_reason(
    tmp_path: Path, format: InputFormat
) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(InputError) as caught:
        next(read_prompts(missing, format))
    assert str(caught.value) == f"{missing}: no such file or directory"
    with pytest.raises(InputError, match=r": is a directory$"):
        next(read_prompts(tmp_path, format))


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_cannot_be_read_on_is_an_error_behind_what_was_read(
    stdin: Callable[[Iterable[bytes | OSError]], Stdin], format: InputFormat
) -> None:
    content = {
        "jsonl": jsonl({"text": "a"}) * 2,
        "csv": b"text\na\na\n",
        "tsv": b"text\na\na\n",
        "text": b"a\na\n",
    }
    fake = stdin([content[format], OSError(errno.EIO, os.strerror(errno.EIO))])
    prompts = read_prompts(None, format)
    assert list(itertools.islice(prompts, 2)) == [Prompt("a")] * 2
    with pytest.raises(InputError, match=r"^standard input: input/output error$"):
        next(prompts)
    assert not fake.buffer.closed


def test_an_error_without_a_reason_of_the_system_is_named_by_its_type(
    stdin: Callable[[Iterable[bytes | OSError]], Stdin],
) -> None:
    stdin([io.UnsupportedOperation()])
    with pytest.raises(InputError, match=r"^standard input: UnsupportedOperation$"):
        next(read_prompts(None, "text"))


def test_a_standard_input_that_is_closed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match=r"^standard input: it is closed$"):
        next(read_prompts(None, "jsonl"))


def test_standard_input_is_read_as_it_comes_and_left_open(
    stdin: Callable[[Iterable[bytes | OSError]], Stdin],
) -> None:
    def endless() -> Iterator[bytes]:
        for number in itertools.count():
            taken.append(number)
            yield b'{"text":"%d"}\n' % number

    taken: list[int] = []
    fake = stdin(endless())
    prompts = read_prompts(None, "jsonl")
    assert taken == []
    assert [prompt.text for prompt in itertools.islice(prompts, 3)] == ["0", "1", "2"]
    assert taken == [0, 1, 2]
    prompts.close()
    assert not fake.buffer.closed


def open_paths() -> list[str]:
    return [file.path for file in psutil.Process().open_files()]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ends", ["at the end", "closed", "dropped", "with an error"])
def test_a_file_is_open_no_longer_than_it_is_read(
    write: Callable[[bytes], Path], format: InputFormat, ends: str
) -> None:
    line = {"jsonl": b'{"text":"a"}\n', "csv": b"a\n", "tsv": b"a\n", "text": b"a\n"}[format]
    bad = b"\xff\n" if ends == "with an error" else b""
    path = write((b"text\n" if format in ("csv", "tsv") else b"") + line * 3 + bad)
    prompts = read_prompts(path, format)
    assert str(path) not in open_paths()
    assert next(prompts) == Prompt("a")
    assert str(path) in open_paths()
    if ends == "at the end":
        assert len(list(prompts)) == 2
    elif ends == "closed":
        prompts.close()
    elif ends == "dropped":
        del prompts
        gc.collect()
    else:
        with pytest.raises(InputError, match=r"line [45]: not"):
            list(prompts)
    assert str(path) not in open_paths()


@pytest.mark.parametrize("format", FORMATS)
def test_memory_does_not_grow_with_the_length_of_the_input(
    write: Callable[[bytes], Path], format: InputFormat
) -> None:
    head = b"text\n" if format in ("csv", "tsv") else b""
    line = b'{"text":"%d"}\n' if format == "jsonl" else b"%d\n"
    path = write(head + b"".join(line % number for number in range(50_000)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_prompts(path, format)) == 50_000
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()


def test_an_error_of_the_input_can_be_pickled() -> None:
    error = InputError("a.parquet", 7, "no", "row")
    assert str(error) == "a.parquet, row 7: no"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))


@pytest.mark.parametrize(
    ("content", "format", "count"),
    [
        (b'{"text":"a"}\n\n \n{"text":"b"}', "jsonl", 2),
        (b"a\n\n \nb\n", "text", 2),
        (b'id,text\n1,"a\nb"\n\n2,c', "csv", 2),
        (b'id\ttext\n1\t"a\nb"\n\n2\tc', "tsv", 2),
        (b"", "jsonl", 0),
        (b"", "csv", 0),
        (b"text\n", "csv", 0),
        (b"text\n\xff\n", "csv", 1),
        (b'text\n"' + b"x" * (2**24 + 1), "csv", None),
        (b"no", "parquet", None),
    ],
)
def test_prompts_are_counted(
    write: Callable[[bytes], Path], content: bytes, format: InputFormat, count: int | None
) -> None:
    assert count_prompts(write(content), format) == count


def test_what_can_be_read_once_only_is_not_counted(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (None, tmp_path / "pipe", tmp_path, tmp_path / "missing"):
        assert count_prompts(path, "jsonl") is None


def written(prompt: Prompt) -> dict[str, Any]:
    """The row that `prompt` comes out with."""
    result = Result("x", 0, "answer", 1, (), Timings(0.0, None, None, 1.0), None, prompt.columns)
    line = encode_row(result)
    assert decode_row(line).id == "x"
    row: dict[str, Any] = json.loads(line)
    return row


_numbers = st.floats(allow_nan=False, allow_infinity=False)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | _numbers | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
_texts = TEXTS.filter(lambda text: text.strip() != "")
_names = TEXTS.filter(lambda name: name not in (*ROW_COLUMNS, "custom_id"))
_rows: SearchStrategy[dict[str, Any]] = st.builds(
    lambda text, row_id, columns: {**columns, **row_id, "text": text},
    _texts,
    st.just({}) | st.fixed_dictionaries({"id": TEXTS.filter(bool) | st.integers()}),
    st.dictionaries(_names, _values, max_size=4),
)


@REPEATABLE
@given(st.lists(_rows, max_size=4), st.booleans())
def test_any_rows_of_json_survive_until_they_are_written(
    rows: list[dict[str, Any]], ascii_only: bool
) -> None:
    content = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode()
    prompts, error = read(content, "jsonl")
    assert error is None
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt.text == row.pop("text")
        row_id = row.pop("id", None)
        assert prompt.id == (None if row_id is None else str(row_id))
        out = written(prompt)
        assert list(out) == [*ROW_COLUMNS, *row]
        assert {name: out[name] for name in row} == row


@REPEATABLE
@given(
    st.lists(_names, max_size=3, unique=True),
    st.lists(st.tuples(_texts, TEXTS.filter(bool), TEXTS, TEXTS, TEXTS), max_size=4),
    st.sampled_from(["csv", "tsv"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_any_table_survives(
    names: list[str], rows: list[tuple[str, ...]], format: InputFormat, newline: str
) -> None:
    header = ["text", "id", *names]
    file = io.StringIO(newline="")
    delimiter = {"csv": ",", "tsv": "\t"}[format]
    writer = csv.writer(file, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerows([header, *(row[: len(header)] for row in rows)])
    prompts, error = read(file.getvalue().encode(), format)
    assert error is None
    assert prompts == [
        Prompt(row[0], row[1], columns=dict(zip(names, row[2:], strict=False))) for row in rows
    ]


_lines = st.sampled_from(
    [
        b'{"text":"a"}',
        b'{"id":1,"text":"a","n":[{}]}',
        b"{",
        b'{"text":1}',
        b"text",
        b"id,text",
        b"id\ttext",
        b"1,a",
        b"1\ta",
        b'1,"a',
        b'"',
        b"\r",
        b"\xff",
        b"\xc3",
        b"\xef\xbb\xbf",
        b"[" * 2000,
        b'{"text":"a","n":' + b"[" * 900 + b"]" * 900 + b"}",
        b"",
    ]
)
_junk = st.lists(_lines | st.binary(max_size=10), max_size=6).map(b"\n".join)


@REPEATABLE
@given(st.binary(max_size=60) | _junk, st.sampled_from(FORMATS))
def test_any_bytes_give_prompts_or_an_error_with_a_line_of_the_input(
    content: bytes, format: InputFormat
) -> None:
    prompts, error = read(content, format)
    for prompt in prompts:
        assert prompt.text.strip()
        written(prompt)
    if error is not None:
        assert chain(error)[1:] == [] or isinstance(error.__context__, ValueError | csv.Error)
        assert error.line is None or 1 <= error.line <= content.count(b"\n") + 1


@REPEATABLE
@given(
    st.lists(st.sampled_from([b'{"text":"a"}', b"", b" "]), max_size=6),
    st.sampled_from([b"{", b"1", b"\xff", b'{"text":""}', b"{}", b'{"text":"a","index":0}']),
)
def test_the_line_that_is_wrong_is_the_one_that_is_named(lines: list[bytes], wrong: bytes) -> None:
    content = b"\n".join([*lines, wrong, *lines])
    prompts, error = read(content + b"\n", "jsonl")
    assert len(prompts) == sum(bool(line.strip()) for line in lines)
    assert error is not None
    assert error.line == len(lines) + 1


@REPEATABLE
@given(st.lists(_rows, min_size=1, max_size=4), st.data())
def test_an_input_that_is_cut_gives_its_whole_lines_and_then_says_so(
    rows: list[dict[str, Any]], data: st.DataObject
) -> None:
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    content = b"".join(lines)
    cut = data.draw(st.integers(0, len(content)))
    whole = content[:cut].count(b"\n")
    rest = cut - sum(map(len, lines[:whole]))
    prompts, error = read(content[:cut], "jsonl")
    if rest == 0:
        assert (len(prompts), error) == (whole, None)
    elif rest == len(lines[whole]) - 1:  # only the newline is not there
        assert (len(prompts), error) == (whole + 1, None)
    else:
        assert len(prompts) == whole
        assert error is not None
        assert (error.line, error.reason) == (whole + 1, "the last line is not complete")


def test_standard_input_may_be_what_a_program_has_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n')))
    assert [prompt.text for prompt in read_prompts(None, "jsonl")] == ["a"]


def test_standard_input_is_read_to_its_end_and_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.write(writer, b'{"text": "a"}\n{"text": "b"}')
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert [prompt.text for prompt in read_prompts(None, "jsonl")] == ["a", "b"]
        assert os.fstat(reader)
