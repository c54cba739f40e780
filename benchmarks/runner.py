"""Runs a selection of the suite: one server, a fresh worker for each repetition, clients interleaved."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import psutil

from . import scenarios
from .results import FORMAT, Results, Row, WorkerAnswer
from .worker import CANNOT_LOAD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Entry", "RunnerError", "estimate", "machine", "run", "select"]

_ROOT: Final = Path(__file__).resolve().parent.parent
_WORKER_DEADLINE: Final = 180.0  # seconds
_START: Final = 0.3  # seconds that a process takes before it measures
_SHOWN_STDERR: Final = 30  # lines of a failed worker


class RunnerError(Exception):
    """The suite cannot go on."""


@dataclass(frozen=True)
class Entry:
    """One row that is to be measured."""

    scenario: scenarios.Scenario
    variant: scenarios.Variant
    client: str

    @property
    def name(self) -> str:
        return f"{self.scenario.name}/{self.variant.name}"


def select(only: Sequence[str], *, quick: bool) -> list[Entry]:
    """The rows to measure, in the order of the tables.

    Each of `only` selects the variants (``scenario/variant``) and the clients that contain it; those that
    match a variant narrow the variants, those that match a client the clients. Raises `ValueError` for one
    that matches neither, or if nothing is left.
    """
    entries = [
        Entry(scenario, variant, client)
        for scenario in scenarios.ALL
        for variant in scenario.variants
        if not quick or variant.quick is not None
        for client in scenario.clients()
    ]
    names = {name for name in only if any(name in entry.name for entry in entries)}
    clients = {name for name in only if any(name in entry.client for entry in entries)}
    for name in only:
        if not name:
            raise ValueError("an empty --only selects nothing")
        if name not in names | clients:
            raise ValueError(f"--only {name}: no scenario and no client of that name")
    selected = [
        entry
        for entry in entries
        if (not names or any(name in entry.name for name in names))
        and (not clients or any(name in entry.client for name in clients))
    ]
    if not selected:
        raise ValueError("the --only options together select nothing")
    return selected


def _cost(entry: Entry, *, quick: bool) -> float:
    """About how many seconds one repetition takes."""
    return _START + (0.0 if quick else entry.variant.seconds)


def estimate(entries: Sequence[Entry], repetitions: int, *, quick: bool) -> float:
    """About how many seconds a run of `entries` takes."""
    return sum(entry.variant.repetitions(repetitions) * _cost(entry, quick=quick) for entry in entries)


def _in_turn(entries: Sequence[Entry], repetitions: int) -> Iterator[Entry]:
    """Every repetition: variant by variant, in each all clients once, then all again, begun by the next."""
    variants = dict.fromkeys(entry.name for entry in entries)
    for name in variants:
        group = [entry for entry in entries if entry.name == name]
        for repetition in range(group[0].variant.repetitions(repetitions)):
            shift = repetition % len(group)
            yield from group[shift:] + group[:shift]


def machine() -> dict[str, str]:
    """What the figures depend on, besides the versions of the libraries."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def _processors() -> tuple[int | None, int | None]:
    """A processor for the server and one for the workers, where there are two to be had."""
    if sys.platform != "linux":
        return None, None
    usable = sorted(os.sched_getaffinity(0))
    # The first and the last: neighbours may be two threads of one core.
    return (usable[0], usable[-1]) if len(usable) > 1 else (None, None)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and what it has started, at once."""
    if process.poll() is not None:
        return  # its number may be another's by now
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for child in (*parent.children(recursive=True), parent):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A module of this package in a process of its own, out of reach of Ctrl-C: it ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if arguments[0] == "benchmarks.worker" else None,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _kill(process)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


class _Failure(Exception):
    """A worker gave no answer."""

    def __init__(self, problem: str, returncode: int) -> None:
        super().__init__(problem)
        self.returncode = returncode


def _work(job: scenarios.Job) -> WorkerAnswer:
    """Run one worker; raises `_Failure`."""
    with _process("benchmarks.worker", msgspec.json.encode(job).decode()) as process:
        try:
            output, errors = process.communicate(timeout=_WORKER_DEADLINE)
        except subprocess.TimeoutExpired:
            raise _Failure(f"no answer within {_WORKER_DEADLINE:g} s", -1) from None
    if process.returncode == 0:
        sys.stderr.write(errors)
        try:
            return msgspec.json.decode(output, type=WorkerAnswer)
        except msgspec.DecodeError as exc:
            raise _Failure(f"not an answer: {output[:200]!r} ({exc})", 0) from None
    lines = errors.splitlines()[-_SHOWN_STDERR:] or [f"exit code {process.returncode}, and no message"]
    print("\n".join(lines), file=sys.stderr)
    raise _Failure(lines[-1], process.returncode)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class _Progress:
    """One line on standard error for each worker."""

    def __init__(self, total: int, estimated: float) -> None:
        self._total, self._estimated = total, estimated
        self._done, self._spent, self._start = 0, 0.0, time.monotonic()

    def line(self, entry: Entry, outcome: str, share: float) -> None:
        """Report on one worker, whose share of the estimate was `share` seconds."""
        self._done += 1
        self._spent += share
        elapsed = time.monotonic() - self._start
        left = elapsed / self._spent * (self._estimated - self._spent)
        place = f"[{self._done}/{self._total}, {_clock(left)} left]"
        print(f"{place} {entry.name} {entry.client}: {outcome}", file=sys.stderr, flush=True)


def run(entries: Sequence[Entry], repetitions: int, options: dict[str, str], *, quick: bool) -> Results:
    """Measure `entries`; a worker that fails is reported and kept in its row, and the rest goes on.

    Raises `RunnerError` if the server ends.
    """
    rows = {
        (entry.name, entry.client): Row(
            entry.scenario.name, entry.variant.name, entry.client, entry.scenario.unit
        )
        for entry in entries
    }
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    results = Results(FORMAT, date, machine(), {}, options, rows=list(rows.values()))
    server_cpu, worker_cpu = _processors()
    turns = list(_in_turn(entries, repetitions))
    progress = _Progress(len(turns), estimate(entries, repetitions, quick=quick))
    missing: dict[str, str] = {}
    with _process("benchmarks.server", *([] if server_cpu is None else [str(server_cpu)])) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        if not port:
            raise RunnerError("the replay server did not start")
        for entry in turns:
            if server.poll() is not None:
                raise RunnerError(f"the replay server ended, with exit code {server.returncode}")
            row = rows[entry.name, entry.client]
            if row.not_applicable is not None:
                outcome = row.not_applicable
            elif entry.client in missing:
                outcome = missing[entry.client]
                row.errors.append(outcome)
            else:
                job = scenarios.Job(
                    scenario=entry.scenario.name,
                    variant=entry.variant.name,
                    client=entry.client,
                    quick=quick,
                    port=int(port),
                    server_pid=server.pid,
                    cpu=worker_cpu,
                )
                try:
                    outcome = _record(_work(job), row, results)
                except _Failure as failure:
                    outcome = f"FAILED: {failure}"
                    row.errors.append(str(failure))
                    if failure.returncode == CANNOT_LOAD:
                        missing[entry.client] = str(failure)
            progress.line(entry, outcome, _cost(entry, quick=quick))
    results.versions = dict(sorted(results.versions.items()))
    return results


def _record(answer: WorkerAnswer, row: Row, results: Results) -> str:
    """Keep what a worker answered; returns a few words on it."""
    results.labels[row.client] = answer.label
    results.versions.update(answer.versions)
    if answer.measurement is None:
        row.not_applicable = answer.not_applicable or "not applicable"
        return row.not_applicable
    row.remark = answer.remark
    row.add(answer.measurement)
    return f"{answer.measurement.value:.4g} {row.unit}"
