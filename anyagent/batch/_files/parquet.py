"""Parquet in and out, by pyarrow, which is imported when it is needed."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from .inputs import DEEPEST, InputError, Unfit, names_of, prompt_of
from .rows import ROW_COLUMNS, RowKey, decode_row

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from typing import BinaryIO

    from .._prompt import Prompt

__all__ = ["count_rows", "read_keys", "read_parquet", "require_pyarrow", "rows_as_jsonl", "write_parquet"]

_ROWS_READ: Final = 256  # at once
_BYTES_READ: Final = 2**20  # of each column, at once
_BYTES_WRITTEN: Final = 8 * 2**20  # of JSON in a row group
_MOST_FIELDS: Final = 1_000  # of an object; one with more is rather a mapping
_MOST_LEVELS: Final = 16  # of lists and objects inside one another
_LARGEST_EXACT: Final = 2**53  # a float can be each integer up to it
_LARGEST: Final = 2**63 - 1
_JSON: Final = {b"anyagent": b"json"}  # marks a column that holds JSON text

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode  # Any: `decode_row` has checked the row's own


def require_pyarrow() -> None:
    """Raise `ImportError`, saying what to install, if there is no pyarrow."""
    _arrow()


def read_parquet(
    path: Path | None, source: str, id_column: str | None, text_column: str | None
) -> Generator[Prompt, None, None]:
    """What `read_prompts` does for Parquet; an `OSError` is still to be explained."""
    if path is None:
        raise InputError(source, None, "Parquet can only be read from a file")
    number: int | None = None
    with path.open("rb") as file:
        try:
            table = _Table(file)
            names = names_of(table.names, id_column, text_column)
            table.check_text(names.text)
            rows = table.rows()
            while True:
                number = None
                row = next(rows, None)
                if row is None:
                    return
                number = table.row
                prompt = prompt_of(row, names)
                yield prompt
        except (Unfit, ImportError) as exc:
            reason = str(exc)
    raise InputError(source, number, reason, "row")


def count_rows(path: Path) -> int:
    """How many rows the file has, from its metadata; `ValueError` if it is no Parquet file."""
    with path.open("rb") as file:
        return _Table(file).length


def read_keys(path: Path) -> Iterator[RowKey]:
    """The keys of the rows that `write_parquet` has written.

    Raises `ValueError` if `path` is no such file, or a damaged one, `OSError` if it cannot be read, and
    `ImportError` if there is no pyarrow.
    """
    for row in _own_rows(path, ["id", "index", "error"]):
        if row["id"] is None or row["index"] is None:
            raise ValueError("not a row of answers")
        yield RowKey(row["id"], row["index"], row["error"] is not None)


def rows_as_jsonl(path: Path) -> Iterator[bytes]:
    """The rows that `write_parquet` has written as lines again; raises as `read_keys` does.

    Each has all columns then, null where it had none, and the codes of errors are text.
    """
    for row in _own_rows(path, None):
        for attempt in filter(None, row["attempts"] or ()):
            for name in ("error", "partial"):  # left out where there is none, as in JSON
                if not attempt.get(name):
                    attempt.pop(name, None)
        line = _encode(row) + b"\n"
        decode_row(line)
        yield line


def write_parquet(rows: Path, target: Path) -> None:
    """Write the rows in the file `rows`, lines of `encode_row`, as Parquet to `target`.

    `target` is replaced as a whole once everything is on disk; after an error it is as it was. What stands
    behind the last newline of `rows` does not count. The row's own columns always have the same types: those
    of JSON, with the code of an error as text, and null for a number of tokens beyond 64 bits. Of each other
    column, all values are looked at for a type that holds them: bool, int64, double, string, or lists and
    structs of these. Where there is none, the column holds JSON text, which `rows_as_jsonl` takes back.

    Raises `OSError` if a file cannot be read or written, `ValueError` if a line is no such row, and
    `ImportError` if there is no pyarrow.
    """
    pyarrow, parquet = _arrow()
    types = {name: _type_of(pyarrow, kind) for name, kind in _kinds(rows).items()}
    as_json = [name for name, kind in types.items() if kind is None]
    passed = [
        pyarrow.field(name, pyarrow.string(), metadata=_JSON) if kind is None else pyarrow.field(name, kind)
        for name, kind in types.items()
    ]
    schema = pyarrow.schema(_own_fields(pyarrow) + passed)
    with _replaced(target) as file:
        writer = parquet.ParquetWriter(file, schema, compression="zstd")
        try:
            for group in _groups(rows):
                for row in group:
                    _fit(row, as_json)
                columns = [
                    pyarrow.array([row.get(field.name) for row in group], type=field.type) for field in schema
                ]
                writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
            writer.close()
        finally:
            writer.is_open = False  # after an error it would write once more when it is collected


def _arrow() -> tuple[Any, Any]:  # Any: pyarrow has no types
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as exc:
        raise ImportError("Parquet needs pyarrow: pip install 'anyagent[parquet]'") from exc


# Reading


class _Table:
    """A Parquet file whose columns Python, and then JSON, know; else `Unfit`.

    `row` is how many rows `rows` has given so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._pyarrow, parquet = _arrow()
        if not file.seekable():
            raise Unfit("Parquet can only be read from a file that can be read in any order")
        with self._understood("not a Parquet file, or a damaged one"):
            self._file = parquet.ParquetFile(file, buffer_size=_BYTES_READ)
            schema = self._file.schema_arrow
        self.names: list[str] = schema.names
        self.length: int = self._file.metadata.num_rows
        self.row = 0
        self.fields: dict[str, Any] = {field.name: field for field in schema}

    def check_text(self, name: str) -> None:
        """Whether the column `name` holds text, else `Unfit`."""
        types = self._pyarrow.types
        kind = self._readable(name)
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise Unfit(f"the column {name!r} must hold text, not {kind}")

    def check_objects(self, name: str) -> None:
        """Whether the column `name` holds lists of structs, else `Unfit`."""
        types = self._pyarrow.types
        kind = self._readable(name)
        if not (types.is_list(kind) or types.is_large_list(kind)) or not types.is_struct(kind.value_type):
            raise Unfit(f"the column {name!r} must hold lists of structs, not {kind}")

    def rows(self, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """All rows, or some of the `columns` of all rows."""
        names = self.names if columns is None else columns
        types = [self._readable(name) for name in names]
        if self.length == 0:  # some versions of pyarrow fail where there is no row group
            return
        batches = self._file.iter_batches(_ROWS_READ, columns=columns, use_threads=False)
        while True:
            with self._understood(f"damaged behind row {self.row}"):
                batch = next(batches, None)
            if batch is None:
                return
            values = []
            for name, kind in zip(names, types, strict=True):
                with self._understood(f"the column {name!r} holds what cannot be read"):
                    column = batch.column(name)
                    if column.type != kind:
                        column = column.cast(kind, safe=False)
                    values.append(column.to_pylist())
            for row in zip(*values, strict=True):
                self.row += 1
                yield dict(zip(names, row, strict=True))

    @contextlib.contextmanager
    def _understood(self, reason: str) -> Iterator[None]:
        """Whatever pyarrow says of what it reads, which may quote that, is `Unfit` with this `reason`."""
        try:
            yield
        except OSError as exc:
            if exc.errno is not None:  # of the file, not of what is in it
                raise
        except (self._pyarrow.ArrowException, ValueError, TypeError, OverflowError, LookupError):
            pass
        else:
            return
        raise Unfit(reason)

    def _readable(self, name: str) -> Any:
        kind = _readable(self._pyarrow, self.fields[name].type, DEEPEST)
        if kind is None:
            raise Unfit(f"the column {name!r} has a type that JSON does not know: {self.fields[name].type}")
        return kind


def _readable(pyarrow: Any, kind: Any, levels: int) -> Any:
    """What a column of the type `kind` is read as, or ``None`` if JSON knows nothing like it."""
    types = pyarrow.types
    if levels == 0:
        return None
    if types.is_float16(kind):
        return pyarrow.float32()
    if types.is_string_view(kind):
        return pyarrow.string()
    if types.is_binary_view(kind):
        return pyarrow.binary()
    # Nanoseconds, which the types of Python do not have, are cut off.
    if types.is_timestamp(kind):
        return pyarrow.timestamp("us", kind.tz) if kind.unit == "ns" else kind
    if types.is_time(kind):
        return pyarrow.time64("us") if kind.unit == "ns" else kind
    if types.is_duration(kind):
        return pyarrow.duration("us") if kind.unit == "ns" else kind
    if types.is_dictionary(kind):
        return _readable(pyarrow, kind.value_type, levels)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _readable(pyarrow, kind.value_type, levels - 1)
        if item == kind.value_type:
            return kind
        return None if item is None else pyarrow.list_(item)
    if types.is_map(kind):
        inner = [_readable(pyarrow, each, levels - 1) for each in (kind.key_type, kind.item_type)]
        return kind if inner == [kind.key_type, kind.item_type] else None
    if types.is_struct(kind):
        fields = [(field.name, _readable(pyarrow, field.type, levels - 1)) for field in kind]
        return None if any(inner is None for _, inner in fields) else pyarrow.struct(fields)
    plain = (
        types.is_null,
        types.is_boolean,
        types.is_integer,
        types.is_floating,
        types.is_string,
        types.is_large_string,
        types.is_binary,
        types.is_large_binary,
        types.is_fixed_size_binary,
        types.is_date,
        types.is_decimal,
    )
    return kind if any(is_kind(kind) for is_kind in plain) else None


def _own_rows(path: Path, columns: list[str] | None) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        table = _Table(file)
        if not set(ROW_COLUMNS) <= set(table.names):
            raise ValueError("not a file of answers")
        table.check_text("id")
        table.check_objects("attempts")
        as_json = [name for name, field in table.fields.items() if field.metadata == _JSON]
        for row in table.rows(columns):
            for name in as_json:
                if row.get(name) is not None:
                    row[name] = msgspec.Raw(row[name])
            yield row


# Writing


@dataclass(frozen=True)
class _List:
    item: _Kind


@dataclass(frozen=True)
class _Struct:
    fields: dict[str, _Kind]


_Kind: TypeAlias = str | _List | _Struct
"""What values have in common: "int" those that a float can be, "long" others of 64 bits, "json" nothing."""


def _kinds(rows: Path) -> dict[str, _Kind]:
    """What the values of each passed-through column have in common, as they first appear."""
    kinds: dict[str, _Kind] = {}
    for _, row in _decoded(rows):
        for name, value in row.items():
            if name not in ROW_COLUMNS and (kind := kinds.get(name, "null")) != "json":
                kinds[name] = _joined(kind, _kind_of(value, _MOST_LEVELS))
    return kinds


def _groups(rows: Path) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for length, row in _decoded(rows):
        group.append(row)
        size += length
        if size >= _BYTES_WRITTEN:
            yield group
            group = []
            size = 0
    if group:
        yield group


def _decoded(rows: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row, and how long its line was."""
    with rows.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                decode_row(line)
                row = _decode(line)
            except (msgspec.DecodeError, ValueError, RecursionError):
                row = None
            if row is None:  # raised out here: the original may hold the whole row
                raise ValueError(f"{rows}, line {number}: not a row of answers")
            yield len(line), row


def _kind_of(value: object, levels: int) -> _Kind:
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case int():
            if abs(value) <= _LARGEST_EXACT:
                return "int"
            return "long" if abs(value) <= _LARGEST else "json"
        case float():
            return "float"
        case str():
            return "text"
        case list() if levels:
            item: _Kind = "null"
            for each in value:
                item = _joined(item, _kind_of(each, levels - 1))
            return "json" if item == "json" else _List(item)
        case dict() if levels and len(value) <= _MOST_FIELDS:
            fields = {name: _kind_of(each, levels - 1) for name, each in value.items()}
            return "json" if "json" in fields.values() else _Struct(fields)
        case _:
            return "json"


def _joined(one: _Kind, other: _Kind) -> _Kind:
    match one, other:
        case _ if one == other:
            return one
        case ("null", kind) | (kind, "null"):
            return kind
        case ("int", "long") | ("long", "int"):
            return "long"
        case ("int", "float") | ("float", "int"):
            return "float"
        case _List(), _List():
            item = _joined(one.item, other.item)
            return "json" if item == "json" else _List(item)
        case _Struct(), _Struct():
            fields = dict(one.fields)
            for name, kind in other.fields.items():
                fields[name] = _joined(fields.get(name, "null"), kind)
            return "json" if "json" in fields.values() or len(fields) > _MOST_FIELDS else _Struct(fields)
        case _:
            return "json"


def _type_of(pyarrow: Any, kind: _Kind) -> Any:
    """The type of Arrow for `kind`, or ``None`` if only JSON text can hold it."""
    match kind:
        case _List(item):
            inner = _type_of(pyarrow, item)
            return None if inner is None else pyarrow.list_(inner)
        case _Struct(fields):
            types = {name: _type_of(pyarrow, each) for name, each in fields.items()}
            # Parquet has no struct without fields.
            return pyarrow.struct(list(types.items())) if types and None not in types.values() else None
        case "bool":
            return pyarrow.bool_()
        case "int" | "long":
            return pyarrow.int64()
        case "float":
            return pyarrow.float64()
        case "text" | "null":
            return pyarrow.string()
        case _:
            return None


def _own_fields(pyarrow: Any) -> list[Any]:
    """The columns that a row has of its own."""
    number, integer, text = pyarrow.float64(), pyarrow.int64(), pyarrow.string()
    error = pyarrow.struct([("type", text), ("code", text), ("details", text)])
    times = [("sent", number), ("first_event", number), ("end", number)]
    attempt = pyarrow.struct([("agent", text), *times, ("error", error), ("partial", text)])
    types = {
        "id": text,
        "index": integer,
        "text": text,
        "tokens_used": integer,
        "attempts": pyarrow.list_(attempt),
        "timings": pyarrow.struct([("queued", number), *times]),
        "error": error,
    }
    return [pyarrow.field(name, types[name]) for name in ROW_COLUMNS]


def _fit(row: dict[str, Any], as_json: list[str]) -> None:
    """Make `row` what the columns' types can hold."""
    for name in ("index", "tokens_used"):
        if abs(row[name] or 0) > _LARGEST:
            row[name] = None
    for attempt in row["attempts"]:
        attempt.setdefault("partial", "")
    for error in (row["error"], *(attempt.get("error") for attempt in row["attempts"])):
        if error is not None and error["code"] is not None:
            error["code"] = str(error["code"])
    for name in as_json:
        if row.get(name) is not None:
            row[name] = _encode(row[name]).decode()


@contextlib.contextmanager
def _replaced(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `target`, or of what that links to, when the block ends well."""
    target = Path(os.path.realpath(target))
    temporary = target.with_name(f".anyagent-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
