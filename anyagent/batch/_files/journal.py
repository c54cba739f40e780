"""Answers as Parquet: kept as lines in a journal while they come, written as a whole at the end."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from .answered import Content, OutputError, survey
from .inputs import reason_of
from .parquet import read_keys, rows_as_jsonl, write_parquet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["begin", "finish", "look_into", "path_for"]


def path_for(answers: Path) -> Path:
    """Where the journal of the Parquet file `answers` is."""
    return answers.with_name(answers.name + ".jsonl")


def begin(answers: Path) -> None:
    """Let the journal begin with the rows of `answers`, if these are there and it is not."""
    journal = path_for(answers)
    if journal.exists() or not answers.exists():
        return
    beside = journal.with_name(f".{journal.name}.{os.getpid()}")
    with _explained(answers):
        try:
            with beside.open("wb") as file:
                file.writelines(rows_as_jsonl(answers))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another run was faster
                os.link(beside, journal)
        finally:
            beside.unlink(missing_ok=True)


def finish(answers: Path) -> None:
    """Write `answers` out of the journal, which is not needed any more then."""
    journal = path_for(answers)
    with _explained(answers):
        write_parquet(journal, answers)
        journal.unlink()


def look_into(answers: Path, *, retry_failed: bool) -> Content:
    """As `survey`: of the journal or, if there is none, of `answers`."""
    journal = path_for(answers)
    if journal.exists() or not answers.exists():
        return survey(journal, retry_failed=retry_failed)
    content = Content()
    with _explained(answers):
        for row in read_keys(answers):
            content.failed += row.failed
            if not (row.failed and retry_failed):
                content.answered.add(row.id, row.place)
    return content


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise OutputError(path, reason_of(exc)) from exc
    except ValueError as exc:
        raise OutputError(path, str(exc)) from exc
