"""``anyagent batch``: a file of prompts, a line of answer for each."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import signal
import stat
from typing import TYPE_CHECKING, Final

import msgspec
from anyio.from_thread import start_blocking_portal

from ..batch._engine import TooManyErrors
from ..batch._files.inputs import InputError, reason_of
from ..batch._files.job import plan
from ..batch._files.journal import path_for
from ..batch._files.output import OutputError
from ..batch._files.run import FileRun
from ..batch._report.page import html
from ..errors import ConnectError
from ._batch_display import watched
from ._display import OutputClosed
from ._errors import Aborted, NotWritten, RowsFailed, Stopped, UsageError, describe
from ._relay import result_of
from ._signals import SIGNAL_POLL, Terminated

if TYPE_CHECKING:
    from pathlib import Path

    from anyio.from_thread import BlockingPortal

    from ..batch._files.job import FileJob
    from ..batch._metrics.metrics import Summary
    from ._batch_display import End, View
    from ._connection import Connection
    from ._display import Display
    from ._signals import Signals

__all__ = ["Order", "batch", "show_plan"]

_FAILURES: Final = (InputError, OutputError, TooManyErrors, ConnectError)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is to be done.

    * `job`: the batch; it asks the agents of its own URLs, or the embedded one if `connection` does.
    * `grace`: how many seconds a first signal leaves to what is in flight.
    * `metrics`, `report`: where to write the figures, and a page with their plots.
    * `settings`: what of it is worth showing with the figures.
    * `view`: how the progress is shown.
    """

    job: FileJob
    connection: Connection
    grace: float
    metrics: Path | None
    report: Path | None
    settings: dict[str, str]
    view: type[View]


def batch(order: Order, display: Display, signals: Signals) -> None:
    """Run the batch, to its end or until a signal stops it; show its progress and what came of it.

    Raises what ended it early, as `_errors.run` expects it, and `RowsFailed` if nothing did but not every
    prompt is answered. By then the answers there are have been written, and `metrics` and `report` too.
    """
    _check(order.job)
    if order.job.output is None:
        display.page("")  # which raises if there is no standard output
        if display.answers_on_terminal:
            raise UsageError("the answers would fill the terminal: give --output FILE, or a pipe")
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(_Afterwards("--metrics", order.metrics))
        report = stack.enter_context(_Afterwards("--report", order.report))
        served = stack.enter_context(order.connection.served(display))
        job = order.job
        if order.connection.url is None:
            assert served.url is not None
            job = dataclasses.replace(job, config=dataclasses.replace(job.config, url=served.url))
        portal = stack.enter_context(start_blocking_portal(served.backend))
        run = portal.call(FileRun, job)
        view = order.view(display, run.progress)
        with watched(view):
            outcome = _outcome(run, order.grace, portal, view, display, signals)
        progress = run.progress()
        summary, page = portal.call(_figures, run, order.settings)
        end: End = "complete" if outcome is None else "stopped" if run.stopped else "failed"
        where = job.output
        if where is not None and job.as_parquet and path_for(where).exists():
            where = path_for(where)
        view.conclude(end, summary, where)
        figures = msgspec.json.format(msgspec.json.encode(summary)) + b"\n"
        for file, data in ((metrics, figures), (report, page.encode())):
            try:
                file.write(data)
            except NotWritten as exc:
                if outcome is not None:
                    view.note(describe(exc))
                outcome = outcome or exc
        if outcome is None and (failed := progress.failed + run.failed_before):
            again = "" if job.output is None else "; --retry-failed asks for them again"
            outcome = RowsFailed(f"{failed:,} of the prompts failed{again}")
        if outcome is not None:
            raise outcome


def _check(job: FileJob) -> None:
    """Raise what is known to be wrong before anything is begun, in the terms of the command."""
    try:
        job.check()
        if job.input is not None:
            job.input.stat()
    except (InputError, OutputError, ImportError) as exc:
        raise UsageError(str(exc)) from exc
    except OSError as exc:
        raise UsageError(f"{job.input}: {reason_of(exc)}") from exc


def show_plan(job: FileJob, display: Display, signals: Signals) -> None:
    """Print what a batch would come to. Raises what it cannot work with, as `_errors.run` expects it."""
    _check(job)
    with signals.raised():
        try:
            found = plan(job)
        except _FAILURES as exc:
            raise _translated(exc) from exc
    again = "asked again" if job.retry_failed else "not asked again without --retry-failed"
    rows = [
        ("prompts", found.rows, ""),
        ("to be asked", found.to_ask, ""),
        ("not asked", found.rows - found.to_ask, "the output has a row for them"),
        ("failed before", found.failed, again),
        ("repeated", found.repeated, "with the id or, without ids, the text of one before"),
    ]
    display.page("".join(f"{f'{name:<13}{count:>12,}  {remark}'.rstrip()}\n" for name, count, remark in rows))


def _outcome(
    run: FileRun, grace: float, portal: BlockingPortal, view: View, display: Display, signals: Signals
) -> Exception | None:
    """Run it, and return what ended it early, in the terms of the command."""
    running = portal.start_task_soon(run.run)
    try:
        result_of(running, signals)
    except _FAILURES as exc:
        return _translated(exc)
    except (KeyboardInterrupt, Terminated) as exc:
        portal.start_task_soon(run.stop, grace)
        display.interrupted()
        in_flight = run.progress().in_flight
        view.note(f"stopping: no new prompt; waiting up to {grace:g} s for the {in_flight:,} in flight")
        view.note("Ctrl-C again ends at once")
        while not concurrent.futures.wait([running], SIGNAL_POLL).done:
            pass  # a signal that arrives now ends the process
        try:
            running.result()
        except _FAILURES as failure:
            view.note(str(failure))
        return Stopped(signal.SIGTERM if isinstance(exc, Terminated) else signal.SIGINT)
    return None


def _translated(exc: Exception) -> Exception:
    match exc:
        case InputError():
            return UsageError(str(exc))
        case OutputError() if isinstance(exc.__cause__, BrokenPipeError):
            return OutputClosed()
        case OutputError():
            return NotWritten(str(exc))
        case TooManyErrors():
            return Aborted(str(exc))
        case _:
            return exc


def _figures(run: FileRun, settings: dict[str, str]) -> tuple[Summary, str]:
    """The summary and the report, made in the thread of the run."""
    summary = msgspec.structs.replace(run.summary(), settings=settings)
    return summary, html(summary, *run.course())


class _Afterwards:
    """A file that is written when all is over, but opened before, to find out in time that it cannot be.

    Without a `path` there is none. Raises `UsageError` if it cannot be opened.
    """

    def __init__(self, option: str, path: Path | None) -> None:
        self._name = f"{option} {path}"
        try:
            self._file = None if path is None else open(path, "ab", 0)  # noqa: SIM115 - see __exit__
        except OSError as exc:
            raise UsageError(f"{self._name}: {reason_of(exc)}") from exc

    def __enter__(self) -> _Afterwards:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, data: bytes) -> None:
        """Replace what it holds. Raises `NotWritten`."""
        if self._file is None:
            return
        try:
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                self._file.truncate(0)
            while data:
                data = data[self._file.write(data) or 0 :]
        except OSError as exc:
            raise NotWritten(f"{self._name}: {reason_of(exc)}") from exc
