"""Batch runs from file to file, and agents for them, each in a process of its own.

``python -m tests.acceptance.batch_programs NAME ARGUMENT...`` runs one of `PROGRAMS`.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import threading
import time
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import psutil

from anyagent.batch import BatchConfig
from anyagent.batch._files import answered as _answered
from anyagent.batch._files import journal as _journal
from anyagent.batch._files import output as _output
from anyagent.batch._files import parquet as _parquet
from anyagent.batch._files import run as _files
from anyagent.batch._files.fsync import Fsync
from anyagent.batch._files.inputs import InputError
from anyagent.batch._files.output import OutputError
from anyagent.batch._files.run import FileJob, FileRun
from anyagent.errors import AnyAgentError
from anyagent.testing import embedded_agent

from .programs import resident_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import FrameType

    from anyagent import IM
    from anyagent.testing import AgentReply

__all__ = ["EARLY", "LATE", "PER_SECOND", "PER_WORKER", "WORKERS"]

WORKERS: Final = 5
"""How many prompts the agent of `serve` works on at once; the others wait in it."""

PER_WORKER: Final = 25
"""How many prompts a second each of them answers."""

PER_SECOND: Final = WORKERS * PER_WORKER

EARLY: Final = range(20_000, 30_001, 1_000)
LATE: Final = range(89_000, 99_001, 1_000)
"""After how many answers `measure` looks at the memory, which goes up and down with what is under way."""

_CODE: Final = frozenset(module.__file__ for module in (_answered, _files, _journal, _output, _parquet))


def job_of(order: dict[str, Any]) -> FileJob:
    """The job that an order describes; paths and the fsync policy are text in it."""
    config = BatchConfig(order["url"], **order.get("config", {}))
    options = order.get("options", {})
    if "fsync" in options:
        options = {**options, "fsync": Fsync.parse(options["fsync"])}
    return FileJob(input=Path(order["input"]), output=Path(order["output"]), config=config, **options)


def outcome_of(order: dict[str, Any]) -> dict[str, Any]:
    """Run a job: its figures, and what it raised."""
    return anyio.run(_outcome_of, order, backend=order.get("backend", "asyncio"))


async def _outcome_of(order: dict[str, Any]) -> dict[str, Any]:
    run = FileRun(job_of(order))
    error = None
    try:
        await run.run()
    except (AnyAgentError, InputError, OutputError) as exc:
        error = f"{type(exc).__name__}: {exc}"
    return {**figures_of(run), "error": error}


def figures_of(run: FileRun) -> dict[str, Any]:
    summary = run.summary()
    return {name: getattr(summary, name) for name in ("done", "failed", "skipped", "attempts")}


# Killed


class KilledAtLine:
    """Ends the process when it comes to yet another line of the code that deals with files.

    A line that it has come to before does not count, and with `functions` only those of these do.
    """

    def __init__(self, lines: int, functions: Collection[str] = ()) -> None:
        self._lines = lines
        self._functions = functions
        self._seen: set[tuple[str, int]] = set()

    def begin(self) -> None:
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        code = frame.f_code
        counts = code.co_filename in _CODE and (not self._functions or code.co_name in self._functions)
        return self._line if counts else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        self._seen.add((frame.f_code.co_filename, frame.f_lineno))
        if len(self._seen) > self._lines:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._line


def kill_in_write(number: int, share: float) -> None:
    """Let the process end within its write of that row, which is then there up to a `share` of its bytes."""
    write, rows = os.write, 0

    def torn(descriptor: int, data: bytes) -> int:
        nonlocal rows
        rows += data.startswith(b'{"id":')
        if rows > number:
            write(descriptor, data[: int(share * len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    os.write = torn  # type: ignore[assignment]  # of this process alone


def slow_disk(seconds: float) -> None:
    """Let each sync of a file take so long."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            time.sleep(seconds)
        fsync(descriptor)

    os.fsync = slow  # type: ignore[assignment]  # of this process alone


def forked(order: dict[str, Any]) -> None:
    if "line" in order:
        KilledAtLine(*order["line"]).begin()
    elif "write" in order:
        kill_in_write(*order["write"])
    elif "sync" in order:
        slow_disk(order["sync"])
    outcome = outcome_of(order)
    sys.settrace(None)
    print(json.dumps(outcome), flush=True)


class WithoutPandas(MetaPathFinder):
    """pyarrow would import pandas where it is there, in each child: that takes longer than all the rest."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name, name=name)


def fork_runs() -> None:
    """A child for each job that is read, a line of JSON each: prints its id and, at its end, its exit code.

    A signal that has ended it counts as that. The id is not given to another process before the next line.
    """
    sys.meta_path.insert(0, WithoutPandas())
    child = 0
    for line in sys.stdin:
        if child:
            os.waitpid(child, 0)
        child = os.fork()
        if not child:
            try:
                forked(json.loads(line))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        print(ended.si_status, flush=True)


# Others


def run_all() -> None:
    """Run each job that is read, and print what came of it."""
    for line in sys.stdin:
        print(json.dumps(outcome_of(json.loads(line))), flush=True)


def as_nobody() -> None:
    """As `run_all`, but after the first job without the privileges that let root write anywhere.

    The first one imports all that is needed, from where others than root may not read.
    """
    print(json.dumps(outcome_of(json.loads(sys.stdin.readline()))), flush=True)
    if os.geteuid() == 0:
        os.seteuid(65_534)
    run_all()


def serve(port: str) -> None:
    """An agent that works on `WORKERS` prompts at once; prints its URL, and ends with its standard input."""
    workers = anyio.Semaphore(WORKERS)

    async def answer(message: IM.UserMessage, reply: AgentReply) -> None:
        async with workers:
            await anyio.sleep(1 / PER_WORKER)
        await reply.text(message.text)

    with embedded_agent(answer, port=int(port)) as agent:
        print(agent.url, flush=True)
        sys.stdin.read()


async def _measured(order: dict[str, Any]) -> dict[str, Any]:
    run = FileRun(job_of(order))
    memory: list[int] = []
    blocks: list[int] = []
    before = peak = resident_memory()
    ended = False

    async def watch() -> None:
        nonlocal peak
        for answers in (*EARLY, *LATE):
            while run.progress().done < answers:
                peak = max(peak, psutil.Process().memory_info().rss)
                if ended:
                    return
                await anyio.sleep(0.01)
            memory.append(resident_memory())
            blocks.append(sys.getallocatedblocks())

    began, used = time.monotonic(), time.process_time()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        await run.run()
        took, used = time.monotonic() - began, time.process_time() - used
        ended = True
    return {
        **figures_of(run),
        "took": took,
        "used": used,
        "memory": memory,
        "blocks": blocks,
        "peak": max(peak, psutil.Process().memory_info().rss) - before,
    }


def measure() -> None:
    """Run each job that is read, and print what it took: time, memory, and objects, at `EARLY` and `LATE`."""
    for line in sys.stdin:
        print(json.dumps(anyio.run(_measured, json.loads(line))), flush=True)


PROGRAMS: Final[dict[str, Callable[..., None]]] = {
    program.__name__: program for program in (fork_runs, run_all, as_nobody, serve, measure)
}


if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
