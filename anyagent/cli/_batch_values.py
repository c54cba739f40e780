"""The values of the options of ``anyagent batch``, checked and as the library takes them."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from ..batch import Adaptive
from ..batch._files.journal import path_for
from ._connection import Connection
from ._errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ..batch._files.job import FileJob

__all__ = ["check_distinct", "codes_of", "connection_to", "in_flight_of", "naming_options"]

_OPTION_OF: Final = {
    "Adaptive.initial": "--max-in-flight",
    "AttemptTimeouts.first_event": "--first-event-timeout",
    "AttemptTimeouts.idle": "--idle-timeout",
    "AttemptTimeouts.total": "--timeout",
    "Rates.requests_per_minute": "--requests-per-minute",
    "Rates.tokens_per_minute": "--tokens-per-minute",
    "Retry.attempts": "--attempts",
    "connections": "--connections",
    "fsync": "--fsync",
    "in_flight": "--in-flight",
    "max_error_rate": "--max-error-rate",
    "max_errors": "--max-errors",
}


def connection_to(
    urls: Sequence[str], headers: Sequence[str], dialect: str | None, backend: str
) -> Connection:
    """Check the options, for all agents; what comes out has the URL of the first."""
    each: Sequence[str | None] = urls or [None]
    first, *others = [Connection.parse(url, headers, dialect, backend) for url in each]
    if any(other.headers != first.headers for other in others):
        raise UsageError(
            "ANYAGENT_TOKEN is set, and some of the URLs have credentials of their own, but not all"
        )
    return first


def in_flight_of(value: str, maximum: int | None) -> int | Adaptive:
    if value == "adaptive":
        initial = Adaptive().initial
        return Adaptive() if maximum is None else Adaptive(initial=min(initial, maximum), maximum=maximum)
    if maximum is not None:
        raise UsageError("--max-in-flight is for --in-flight adaptive")
    if not value.isdecimal():
        raise UsageError("--in-flight must be a positive integer, or adaptive")
    return int(value)


def codes_of(code: str) -> set[str | int]:
    """The code as agents may spell it: as text and, if it is one, as a number."""
    return {code, int(code)} if code.removeprefix("-").isdecimal() else {code}


def check_distinct(job: FileJob, others: Mapping[str, Path | None]) -> None:
    """No file is to be written over another one: not those of `job`, nor `others`."""
    paths = {"INPUT": job.input, "--output": job.output, **others}
    if job.as_parquet and job.output is not None:
        paths["the journal of --output"] = path_for(job.output)
    seen: dict[str, str] = {}
    for name, path in paths.items():
        if path is not None and (path.is_file() or not path.exists()):
            other = seen.setdefault(os.path.realpath(path), name)
            if other != name:
                raise UsageError(f"{other} and {name} are the same file, {path}")


@contextlib.contextmanager
def naming_options() -> Iterator[None]:
    """Have an error name the option where the library names its parameter."""
    try:
        yield
    except ValueError as exc:
        name, space, rest = str(exc).partition(" ")
        raise UsageError(_OPTION_OF.get(name, name) + space + rest) from exc
