"""Parquet: prompts from it, answers to it, and what is read back of those."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import errno
import gc
import importlib
import json
import os
import resource
import stat
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent.batch import Attempt, ErrorRecord, Prompt, Result, Timings
from anyagent.batch._files import parquet as _parquet
from anyagent.batch._files.inputs import InputError, count_prompts, read_prompts
from anyagent.batch._files.parquet import read_keys, require_pyarrow, rows_as_jsonl, write_parquet
from anyagent.batch._files.rows import RowKey, encode_row

from .properties import REPEATABLE, TEXTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Any: pyarrow has no types.
pa: Any = importlib.import_module("pyarrow")
pq: Any = importlib.import_module("pyarrow.parquet")

TIMINGS = Timings(queued=1.5, sent=2.0, first_event=None, end=3.0)
BUSY = ErrorRecord("AgentError", 429, "too many")


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    """A file with `columns`, in row groups of two rows."""
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def failure(path: Path, **columns: str) -> str:
    """The error that reading `path` ends with, without its name."""
    with pytest.raises(InputError) as caught:
        list(read_prompts(path, "parquet", **columns))
    return str(caught.value).removeprefix(str(path)).removeprefix(", ")


def open_paths() -> list[str]:
    return [file.path for file in psutil.Process().open_files()]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "answers.parquet"


def journal(path: Path, *rows: Result) -> Path:
    path.write_bytes(b"".join(map(encode_row, rows)))
    return path


def result(number: int, error: ErrorRecord | None = None, /, **columns: object) -> Result:
    attempt = Attempt("localhost:8000/ws", 2.0, None, 3.0, error)
    text = None if error else f"answer {number}"
    return Result(f"r{number}", number, text, None if error else 5, (attempt,), TIMINGS, error, columns)


def written(target: Path, *rows: Result) -> Any:
    """The table that `rows` become."""
    write_parquet(journal(target.with_suffix(".jsonl"), *rows), target)
    with pq.ParquetFile(target) as file:
        return file.read() if rows else file.schema_arrow.empty_table()


# Reading


def test_a_row_gives_its_text_its_id_and_all_other_columns_in_order(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a",
        {"z": [1, None, 3], "text": ["a", "b", "c"], "a": [["x"], [], None], "id": [7, None, 9]},
    )
    prompts = list(read_prompts(path, "parquet"))
    assert prompts == [
        Prompt("a", "7", columns={"z": 1, "a": ["x"]}),
        Prompt("b", None, columns={"z": None, "a": []}),
        Prompt("c", "9", columns={"z": 3, "a": None}),
    ]
    assert list(prompts[0].columns) == ["z", "a"]
    assert count_prompts(path, "parquet") == 3


def test_other_columns_can_be_named_as_id_and_text(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a", {"q": ["a"], "name": ["n"], "custom_id": ["c"]})
    prompts = list(read_prompts(path, "parquet", id_column="name", text_column="q"))
    assert prompts == [Prompt("a", "n", columns={"custom_id": "c"})]


def test_what_python_has_no_type_for_is_read_as_what_comes_nearest(tmp_path: Path) -> None:
    when = datetime.datetime(2030, 1, 2, 3, 4, 5, 678901)
    nanoseconds = [1_893_553_445_678_901_234]
    stamp = pa.timestamp("ns")
    columns = {
        "text": pa.array(["a"]).dictionary_encode(),
        "stamp": pa.array(nanoseconds, stamp),
        "stamp_us": pa.array([when], pa.timestamp("us")),
        "stamps": pa.array([nanoseconds], pa.list_(stamp)),
        "in_struct": pa.array([{"a": nanoseconds[0]}], pa.struct([("a", stamp)])),
        "time": pa.array([1001], pa.time64("ns")),
        "time_s": pa.array([1], pa.time32("s")),
        "duration": pa.array([1001], pa.duration("ns")),
        "duration_s": pa.array([1], pa.duration("s")),
        "half": pa.array([1.5], pa.float32()).cast(pa.float16()),
        "date": pa.array([datetime.date(2030, 1, 2)]),
        "decimal": pa.array([decimal.Decimal("1.50")]),
        "bytes": pa.array([b"\xff"]),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "null": pa.array([None], pa.null()),
        "bool": pa.array([True]),
        "large": pa.array(["a"], pa.large_string()),
        "in_list": pa.array([["a"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        "nan": pa.array([float("nan")]),
        "fixed": pa.array([[1, 2]], pa.list_(pa.int8(), 2)),
    }
    [prompt] = read_prompts(parquet(tmp_path / "a", columns), "parquet")
    row = json.loads(encode_row(Result("x", 0, "", 0, (), TIMINGS, None, prompt.columns)))
    assert prompt.text == "a"
    assert {name: row[name] for name in columns if name != "text"} == {
        "stamp": when.isoformat(),
        "stamp_us": when.isoformat(),
        "stamps": [when.isoformat()],
        "in_struct": {"a": when.isoformat()},
        "time": "00:00:00.000001",
        "time_s": "00:00:01",
        "duration": "PT0.000001S",
        "duration_s": "PT1S",
        "half": 1.5,
        "date": "2030-01-02",
        "decimal": "1.50",
        "bytes": "/w==",
        "map": [["k", 1]],
        "null": None,
        "bool": True,
        "large": "a",
        "in_list": ["a"],
        "nan": None,
        "fixed": [1, 2],
    }


def test_views_are_read_as_what_they_are_views_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"text": pa.array(["a"], pa.string_view()), "bytes": pa.array([b"a"], pa.binary_view())}
    only(monkeypatch, pa.table(columns))
    [prompt] = read_prompts(parquet(tmp_path / "a", {"text": ["a"]}), "parquet")
    assert prompt == Prompt("a", columns={"bytes": b"a"})


def only(monkeypatch: pytest.MonkeyPatch, table: Any) -> None:
    """Every file holds `table`: not each version of pyarrow writes what it reads of others."""

    class File:
        def __init__(self, file: object, **options: object) -> None:
            self.schema_arrow = table.schema
            self.metadata = table  # for its number of rows

        def iter_batches(self, *arguments: object, **options: object) -> Iterator[Any]:
            return iter(table.to_batches())

    monkeypatch.setattr(pq, "ParquetFile", File)


def test_a_file_without_rows_has_no_prompts(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a", {"text": pa.array([], pa.string())})
    assert list(read_prompts(path, "parquet")) == []
    assert count_prompts(path, "parquet") == 0


def deep_type(levels: int) -> Any:
    kind = pa.int8()
    for _ in range(levels):
        kind = pa.list_(kind)
    return kind


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_view(pa.int8()),
        pa.list_(pa.list_view(pa.int8())),
        pa.struct([("a", pa.list_view(pa.int8()))]),
        pa.map_(pa.string(), pa.timestamp("ns")),
        deep_type(200),
    ],
    ids=["view", "view in a list", "view in a struct", "nanoseconds in a map", "deep"],
)
def test_a_column_that_json_does_not_know_is_named_with_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    only(monkeypatch, pa.schema([("text", pa.string()), ("odd", kind)]).empty_table())
    path = parquet(tmp_path / "a", {"text": ["a"]})
    assert failure(path).startswith(": the column 'odd' has a type that JSON does not know: ")


@pytest.mark.parametrize(
    ("columns", "options", "reason"),
    [
        ({"id": ["a"]}, {}, ": unknown column 'text'; there are: id"),
        ({"text": ["a"]}, {"id_column": "x"}, ": unknown column 'x'; there are: text"),
        ({"text": [1]}, {}, ": the column 'text' must hold text, not int64"),
        (
            {"text": ["a"], "index": [1]},
            {},
            ": the output has a column 'index' of its own: rename that of the input",
        ),
        ({"text": ["a", "b", None]}, {}, "row 3: 'text' must be a string"),
        ({"text": ["a", "b", " "]}, {}, "row 3: 'text' is empty"),
        ({"text": ["a"], "id": [1.5]}, {}, "row 1: 'id' must be a string or an integer"),
        ({"text": ["a", "b"], "id": ["x", ""]}, {}, "row 2: 'id' is empty"),
    ],
)
def test_what_is_no_prompt_is_named_and_not_shown(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, str], reason: str
) -> None:
    path = parquet(tmp_path / "a", columns)
    assert failure(path, **options) == reason
    assert str(path) not in open_paths()


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["text", "a", "a"])
    pq.write_table(table, tmp_path / "a")
    assert failure(tmp_path / "a") == ": there are two columns 'a'"


def test_a_value_that_python_cannot_hold_is_an_error_that_names_its_column(tmp_path: Path) -> None:
    columns = {"text": ["a"], "far": pa.array([2**62], pa.timestamp("ms"))}
    assert failure(parquet(tmp_path / "a", columns)) == ": the column 'far' holds what cannot be read"


def test_the_prompts_before_a_bad_one_come_out(tmp_path: Path) -> None:
    prompts = read_prompts(parquet(tmp_path / "a", {"text": ["a", "b", None]}), "parquet")
    assert [next(prompts), next(prompts)] == [Prompt("a"), Prompt("b")]
    with pytest.raises(InputError, match="row 3"):
        next(prompts)


@pytest.mark.parametrize("content", [b"", b"text\na\n", b"PAR1" + b"x" * 50 + b"PAR1"])
def test_what_is_no_parquet_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    assert failure(path) == ": not a Parquet file, or a damaged one"
    assert count_prompts(path, "parquet") is None


def test_a_file_that_is_damaged_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    pq.write_table(pa.table({"text": [f"a{i}" for i in range(2000)]}), path)
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    assert failure(path) == ": damaged behind row 0"


def test_a_file_that_cannot_be_read_is_an_error_with_the_systems_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "a", {"text": ["a"]})

    class File:
        def __init__(self, file: object, **options: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(pq, "ParquetFile", File)
    assert failure(path) == ": input/output error"


def test_a_pipe_and_standard_input_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)  # so that opening it does not wait for one
    try:
        assert failure(path) == ": Parquet can only be read from a file that can be read in any order"
    finally:
        os.close(writer)
    with pytest.raises(InputError, match=r"^standard input: Parquet can only be read from a file$"):
        next(read_prompts(None, "parquet"))


def test_without_pyarrow_it_is_said_how_to_install_it(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_pyarrow()
    path = parquet(tmp_path / "a", {"text": ["a"]})
    rows = journal(tmp_path / "rows", result(0))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said = "Parquet needs pyarrow: pip install 'anyagent[parquet]'"
    assert failure(path) == f": {said}"
    assert count_prompts(path, "parquet") is None
    for needs in (require_pyarrow, lambda: write_parquet(rows, target), lambda: next(read_keys(path))):
        with pytest.raises(ImportError) as caught:
            needs()
        assert str(caught.value) == said
    assert not target.exists()


@pytest.mark.parametrize("ends", ["at the end", "closed", "dropped"])
def test_a_file_is_open_no_longer_than_it_is_read(tmp_path: Path, ends: str) -> None:
    path = parquet(tmp_path / "a", {"text": ["a", "b", "c"]})
    prompts = read_prompts(path, "parquet")
    assert str(path) not in open_paths()
    assert next(prompts) == Prompt("a")
    assert str(path) in open_paths()
    if ends == "at the end":
        assert len(list(prompts)) == 2
    elif ends == "closed":
        prompts.close()
    else:
        del prompts
        gc.collect()
    assert str(path) not in open_paths()


@settings(REPEATABLE, max_examples=200)
@given(st.data())
def test_any_damage_gives_prompts_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    table = pa.table({"text": ["a", "b"] * 20, "id": list(range(40)), "n": [[{"x": 1.5}], None] * 20})
    pq.write_table(table, path, row_group_size=10)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    with contextlib.suppress(InputError):
        for prompt in read_prompts(path, "parquet"):
            assert prompt.text.strip()
            encode_row(Result("x", 0, "", 0, (), TIMINGS, None, prompt.columns))


# Writing

OWN_SCHEMA = {
    "id": "string",
    "index": "int64",
    "text": "string",
    "tokens_used": "int64",
    "attempts": "list<element: struct<agent: string, sent: double, first_event: double, end: double, "
    "error: struct<type: string, code: string, details: string>, partial: string>>",
    "timings": "struct<queued: double, sent: double, first_event: double, end: double>",
    "error": "struct<type: string, code: string, details: string>",
}


def types(table: Any) -> dict[str, str]:
    return {field.name: str(field.type).replace("item: ", "element: ") for field in table.schema}


def test_the_rows_own_columns_have_the_same_types_in_every_file(target: Path) -> None:
    assert types(written(target)) == OWN_SCHEMA
    assert [*read_keys(target), *rows_as_jsonl(target)] == []
    assert types(written(target, result(0))) == OWN_SCHEMA
    assert types(written(target, result(0, BUSY))) == OWN_SCHEMA


def test_rows_are_written_as_they_are(target: Path) -> None:
    table = written(target, result(0, label="x"), result(1, BUSY, label="y"))
    first, second = table.to_pylist()
    assert first == {
        "id": "r0",
        "index": 0,
        "text": "answer 0",
        "tokens_used": 5,
        "attempts": [
            {
                "agent": "localhost:8000/ws",
                "sent": 2.0,
                "first_event": None,
                "end": 3.0,
                "error": None,
                "partial": "",
            }
        ],
        "timings": {"queued": 1.5, "sent": 2.0, "first_event": None, "end": 3.0},
        "error": None,
        "label": "x",
    }
    assert (second["text"], second["tokens_used"]) == (None, None)
    assert second["error"] == {"type": "AgentError", "code": "429", "details": "too many"}
    assert second["attempts"][0]["error"] == second["error"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None, None], "string"),
        ([True, None, False], "bool"),
        ([1, -5, None], "int64"),
        ([1, 2**63 - 1], "int64"),
        ([2**60, 1], "int64"),
        ([1, 2.5], "double"),
        ([2.5, 1, 2**53], "double"),
        (["a", None], "string"),
        ([[], [1], None, [2.5, None]], "list<element: double>"),
        ([[], None], "list<element: string>"),
        ([{"a": 1}, {"b": [True]}, {"a": 2.5}], "struct<a: double, b: list<element: bool>>"),
        ([[{"a": None}], [{"a": {"b": "x"}}]], "list<element: struct<a: struct<b: string>>>"),
    ],
)
def test_a_column_gets_a_type_that_holds_all_its_values(
    target: Path, monkeypatch: pytest.MonkeyPatch, values: list[object], kind: str
) -> None:
    monkeypatch.setattr(_parquet, "_BYTES_WRITTEN", 1)  # a row group for each row
    table = written(target, *(result(i, c=value) for i, value in enumerate(values)))
    assert types(table)["c"] == kind
    assert pq.read_metadata(target).num_row_groups == len(values)
    assert [filled(row["c"], value) for row, value in zip(table.to_pylist(), values, strict=True)] == values


def filled(read: Any, given: Any) -> Any:
    """`read` without the fields that `given` does not have, which are null in a struct."""
    if isinstance(given, dict):
        assert all(value is None for name, value in read.items() if name not in given)
        return {name: filled(read[name], value) for name, value in given.items()}
    if isinstance(given, list):
        return [filled(inner, value) for inner, value in zip(read, given, strict=True)]
    return read


def deep(levels: int) -> list[Any]:
    return [] if levels == 0 else [deep(levels - 1)]


@pytest.mark.parametrize(
    "values",
    [
        [1, "a"],
        [True, 1],
        [2**63],
        [2**60, 0.5],
        [0.5, 2**53 + 1],
        ["a", [1]],
        [[1], [1, "a"]],
        [[1], ["a"]],
        [[1, 0.5], [[]]],
        [{"a": 1}, {"a": "x"}],
        [{"a": [1, "x"]}],
        [{}],
        [[{}], None],
        [{"a": {}}],
        [{str(i): i for i in range(1001)}],
        [{str(i): i} for i in range(1001)],
        [deep(30), None],
        [{"a": deep(30)}, {}],
    ],
    ids=lambda values: str(values)[:20],
)
def test_a_column_whose_values_fit_no_type_becomes_json_text(target: Path, values: list[object]) -> None:
    table = written(target, *(result(i, c=value, d="plain") for i, value in enumerate(values)))
    assert (types(table)["c"], types(table)["d"]) == ("string", "string")
    column = table.column("c").to_pylist()
    assert [None if text is None else json.loads(text) for text in column] == values
    assert [json.loads(line)["c"] for line in rows_as_jsonl(target)] == values


def test_a_column_that_comes_late_is_null_before(target: Path) -> None:
    table = written(target, result(0), result(1, late=1), result(2, other="x"))
    assert table.column("late").to_pylist() == [None, 1, None]
    assert list(types(table))[-2:] == ["late", "other"]


def test_a_number_of_tokens_beyond_64_bits_is_null(target: Path) -> None:
    row = msgspec.structs.replace(result(0), tokens_used=2**63)
    assert written(target, row).column("tokens_used").to_pylist() == [None]


def test_what_stands_behind_the_last_newline_does_not_count(target: Path) -> None:
    rows = journal(target.with_suffix(".jsonl"), result(0), result(1))
    rows.write_bytes(rows.read_bytes()[:-1])
    write_parquet(rows, target)
    assert list(read_keys(target)) == [RowKey("r0", 0, failed=False)]


@pytest.mark.parametrize("line", [b"{}", b'{"id":"a","text":"secret"}', b"\xff", None])
def test_a_line_that_is_no_row_is_named_and_changes_nothing(target: Path, line: bytes | None) -> None:
    target.write_bytes(b"old")
    rows = journal(target.with_suffix(".jsonl"), result(0))
    if line is None:  # a row, but for a number that nothing can hold
        line = encode_row(result(1, c=1)).rstrip()[:-2] + b"1e999}"
    rows.write_bytes(rows.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=r"\.jsonl, line 2: not a row of answers$"):
        write_parquet(rows, target)
    assert target.read_bytes() == b"old"
    assert sorted(target.parent.iterdir()) == sorted([target, rows])


def test_a_full_disk_leaves_the_old_file_as_it_was(target: Path) -> None:
    target.write_bytes(b"old")
    rows = journal(target.with_suffix(".jsonl"), *(result(i, noise=os.urandom(40)) for i in range(2000)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_parquet(rows, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    gc.collect()  # what pyarrow has left must not write once more
    assert caught.value.errno == errno.EFBIG
    assert target.read_bytes() == b"old"
    assert sorted(target.parent.iterdir()) == sorted([target, rows])


def test_a_target_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "directory"
    target.mkdir()
    rows = journal(tmp_path / "rows", result(0))
    with pytest.raises(IsADirectoryError):
        write_parquet(rows, target)
    with pytest.raises(FileNotFoundError):
        write_parquet(rows, tmp_path / "missing" / "a.parquet")
    with pytest.raises(FileNotFoundError):
        write_parquet(tmp_path / "missing", target)
    assert sorted(tmp_path.iterdir()) == sorted([target, rows])


def test_a_replaced_file_keeps_its_permissions_and_its_links(target: Path) -> None:
    link = target.with_name("link")
    link.symlink_to(target.name)
    old_mask = os.umask(0o027)
    try:
        rows = journal(target.with_suffix(".jsonl"), result(0))
        write_parquet(rows, link)
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
    finally:
        os.umask(old_mask)
    target.chmod(0o604)
    write_parquet(rows, link)
    assert stat.S_IMODE(target.stat().st_mode) == 0o604
    assert link.is_symlink()


# Reading answers again


def test_keys_say_which_rows_failed(target: Path) -> None:
    nothing = ErrorRecord("Disconnected", None, "")
    written(target, result(0), result(1, BUSY, **{"error.type": 1}), result(2, nothing))
    assert list(read_keys(target)) == [RowKey("r0", 0, False), RowKey("r1", 1, True), RowKey("r2", 2, True)]
    assert str(target) not in open_paths()


def own(**changed: Any) -> dict[str, Any]:
    """The columns of a file with one row, but for those that are `changed`."""
    times = {"sent": 1.0, "first_event": None, "end": 2.0}
    row = {
        "id": "a",
        "index": 0,
        "text": None,
        "tokens_used": None,
        "attempts": [{"agent": "a", **times, "error": None, "partial": ""}],
        "timings": {"queued": 1.0, **times},
        "error": None,
    }
    return {name: [value] for name, value in (row | changed).items()}


def test_a_file_of_answers_is_known_by_its_columns(target: Path) -> None:
    parquet(target, own(other=1))
    assert list(read_keys(target)) == [RowKey("a", 0, failed=False)]
    [line] = rows_as_jsonl(target)
    assert json.loads(line)["other"] == 1
    assert b"partial" not in line


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"id": ["a"], "text": ["a"]}, "not a file of answers"),
        (own(id=1), "the column 'id' must hold text, not int64"),
        (own(attempts=1), "the column 'attempts' must hold lists of structs, not int64"),
        (own(attempts=["a"]), "the column 'attempts' must hold lists of structs, not list"),
    ],
)
def test_a_file_of_something_else_is_a_value_error(
    target: Path, columns: dict[str, Any], reason: str
) -> None:
    parquet(target, columns)
    for read in (read_keys, rows_as_jsonl):
        with pytest.raises(ValueError, match=reason):
            next(iter(read(target)))


ATTEMPTS = pa.list_(pa.struct([("agent", pa.string())]))


@pytest.mark.parametrize(
    ("columns", "reader"),
    [
        (own() | {"id": pa.array([None], pa.string())}, read_keys),
        (own() | {"id": pa.array([None], pa.string())}, rows_as_jsonl),
        (own() | {"attempts": pa.array([None], ATTEMPTS)}, rows_as_jsonl),
        (own() | {"attempts": pa.array([[None]], ATTEMPTS)}, rows_as_jsonl),
        (own(attempts=[{"agent": "a"}]), rows_as_jsonl),
        (own(timings="a"), rows_as_jsonl),
    ],
)
def test_a_row_of_something_else_is_a_value_error(
    target: Path, columns: dict[str, Any], reader: Callable[[Path], Iterator[object]]
) -> None:
    parquet(target, columns)
    with pytest.raises(ValueError, match=r"^not a row of answers$"):
        list(reader(target))


_numbers = st.floats(allow_nan=False, allow_infinity=False)
_times = st.none() | _numbers
_errors = st.builds(ErrorRecord, type=TEXTS, code=st.none() | TEXTS, details=TEXTS)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.integers(-5, 5) | _numbers | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
_results = st.builds(
    Result,
    id=TEXTS,
    index=st.integers(0, 2**60),
    text=st.none() | TEXTS,
    tokens_used=st.none() | st.integers(0, 2**60),
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
    columns=st.dictionaries(st.sampled_from(["a", "b", "", "é.x", "error.type"]), _values, max_size=4),
)


def same(read: Any, given: Any) -> bool:
    """Whether `read` is `given`, but for nulls where a struct of another row has fields."""
    if isinstance(given, dict) and isinstance(read, dict):
        return given.keys() <= read.keys() and all(same(read[name], given.get(name)) for name in read)
    if isinstance(given, list) and isinstance(read, list):
        return len(read) == len(given) and all(map(same, read, given))
    return bool(read == given) and isinstance(read, bool) == isinstance(given, bool)


@settings(REPEATABLE, max_examples=60)
@given(st.lists(_results, max_size=5))
def test_any_rows_survive(tmp_path_factory: pytest.TempPathFactory, results: list[Result]) -> None:
    directory = tmp_path_factory.getbasetemp()
    rows = journal(directory / "rows.jsonl", *results)
    target = directory / "rows.parquet"
    write_parquet(rows, target)
    lines = list(rows_as_jsonl(target))
    given = [json.loads(line) for line in rows.read_bytes().splitlines()]
    assert [same(json.loads(line), row) for line, row in zip(lines, given, strict=True)] == [True] * len(
        given
    )
    assert list(read_keys(target)) == [
        RowKey(each.id, each.index, each.error is not None) for each in results
    ]
    # And once more: a batch that goes on begins with these lines.
    rows.write_bytes(b"".join(lines))
    write_parquet(rows, target)
    assert list(rows_as_jsonl(target)) == lines


def test_memory_does_not_grow_with_the_number_of_rows(target: Path) -> None:
    rows = target.with_suffix(".jsonl")
    with rows.open("wb") as file:
        for number in range(40_000):
            file.write(encode_row(result(number, noise=f"{number}" * 200)))
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)  # counts what is taken from now on
    pa.set_memory_pool(pool)
    try:
        write_parquet(rows, target)
        assert sum(1 for _ in rows_as_jsonl(target)) == 40_000
    finally:
        pa.set_memory_pool(before)
    assert rows.stat().st_size > 45 * 2**20
    assert pool.max_memory() < 32 * 2**20
