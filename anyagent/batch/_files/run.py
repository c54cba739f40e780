"""File to file: prompts out of one, answers into another, as durable as asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread

from .._batch import run_engine
from .._metrics.metrics import Metrics
from . import journal as _journal
from .inputs import count_prompts
from .job import FileJob
from .output import OutputFile, SyncPolicy
from .rows import encode_row

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from .._engine import Engine
    from .._metrics.metrics import Latencies
    from .._metrics.series import Interval
    from .._metrics.summary import Summary
    from .._prompt import Prompt
    from .._result import Result
    from .._source import Prompts

__all__ = ["FileJob", "FileRun", "Progress"]

_STANDARD_OUTPUT: Final = Path("standard output")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How a run stands.

    * `total`: prompts in the input; ``None`` where that is not known (yet). `skipped`: answered before.
    * `done`, `failed`: results of this run that are written. `retried`: attempts after the first.
    * `in_flight`, `limit`: attempts under way, and how many may be.
    * `elapsed`: seconds; `eta`: seconds to the end at the present pace, ``None`` where nobody can tell.
    * `requests_per_second`, `tokens_per_second`: of late.
    """

    total: int | None = None
    skipped: int = 0
    done: int = 0
    failed: int = 0
    retried: int = 0
    in_flight: int = 0
    limit: int = 0
    elapsed: float
    eta: float | None = None
    requests_per_second: float = 0
    tokens_per_second: float = 0


class FileRun:
    """One run of `job`, to be used once.

    What is written is whole lines, each at once: whatever ends the run, another one goes on behind them.
    """

    def __init__(self, job: FileJob) -> None:
        self.stopped = False
        self.failed_before = 0  # rows with an error that were there, and are not asked again
        self._job = job
        self._engine: Engine | None = None
        self._deadline = math.inf  # of what is in flight, once it was stopped
        self._patience: anyio.CancelScope | None = None
        self._total: int | None = None
        self._answered = 0  # rows that were there
        self._skipped = 0
        self._done = 0
        self._failed = 0
        self._syncing = False
        self._waiting: anyio.CancelScope | None = None
        self._started = time.monotonic()

    async def run(self) -> Summary:
        """Run to the end, or until `stop`.

        Raises `InputError` for an input that cannot be read (on), once all prompts before are answered;
        `OutputError`; `TooManyErrors`; `ConnectError` if no agent can be reached; `ImportError` if Parquet
        needs what is not installed. Whatever comes: what was answered is written, and synced where that was
        asked for.
        """
        job = self._job
        job.check()
        with self._open_output() as output, _opened(job) as prompts:
            self._answered = len(output.answered)
            self.failed_before = output.answered_failed
            skip = self._skip_in(output) if self._answered else None
            policy = SyncPolicy(job.fsync, anyio.current_time())
            try:
                async with run_engine(prompts, job.config, skip=skip) as engine:
                    self._engine = engine
                    engine.start_soon(self._count)
                    if self.stopped:
                        engine.stop()
                    await self._write(engine, output, policy)
            finally:
                if policy.pending:
                    with anyio.CancelScope(shield=True):
                        await anyio.to_thread.run_sync(output.sync)
            if job.as_parquet and not self.stopped:
                assert job.output is not None
                await anyio.to_thread.run_sync(_journal.finish, job.output)
        return self.summary()

    def stop(self, grace: float) -> None:
        """Send no further prompt, and cancel what is in flight after `grace` seconds. `run` returns then.

        A second call can only shorten the time.
        """
        self.stopped = True
        self._deadline = min(self._deadline, anyio.current_time() + grace)
        if self._patience is not None:
            self._patience.deadline = self._deadline
        if self._engine is not None:
            self._engine.stop()

    def progress(self) -> Progress:
        """How it stands; may be called from any thread."""
        engine, elapsed = self._engine, time.monotonic() - self._started
        if engine is None:
            return Progress(elapsed=elapsed)
        live = engine.metrics.live(engine.now())
        eta = None
        if self._total is not None and live.finished_per_second > 0:
            left = self._total - self._answered - self._done - self._failed
            eta = max(left, 0) / live.finished_per_second
        return Progress(
            total=self._total,
            skipped=self._skipped,
            done=self._done,
            failed=self._failed,
            retried=live.retried,
            in_flight=engine.in_flight,
            limit=engine.limit,
            elapsed=elapsed,
            eta=eta,
            requests_per_second=live.requests_per_second,
            tokens_per_second=live.tokens_per_second,
        )

    def summary(self) -> Summary:
        """The figures so far."""
        if self._engine is None:
            return Metrics(0).summary(0)
        return self._engine.metrics.summary(self._ended(), skipped=self._skipped)

    def course(self) -> tuple[list[Interval], Latencies]:
        """The run over time, and how long things took, so far."""
        metrics = Metrics(0) if self._engine is None else self._engine.metrics
        return metrics.series(self._ended()), metrics.latencies

    def _ended(self) -> float:
        if self._engine is None:
            return 0
        if self._engine.ended is None:
            self._engine.sample(self._engine.now())
        return self._engine.ended or self._engine.now()

    def _open_output(self) -> OutputFile:
        job, path = self._job, self._job.output
        if path is None:
            return OutputFile.over(os.dup(1), _STANDARD_OUTPUT)
        if job.as_parquet:
            if not job.overwrite:
                _journal.begin(path)
            path = _journal.path_for(path)
        return OutputFile.open(path, retry_failed=job.retry_failed, overwrite=job.overwrite)

    def _skip_in(self, output: OutputFile) -> Callable[[str, int], int | None]:
        def skip(key: str, index: int) -> int | None:
            taken = output.answered.take(key, index)
            self._skipped += taken is not None
            return taken

        return skip

    async def _count(self) -> None:
        job = self._job
        self._total = await anyio.to_thread.run_sync(
            count_prompts, job.input, job.format, abandon_on_cancel=True
        )

    async def _write(self, engine: Engine, output: OutputFile, policy: SyncPolicy) -> None:
        """Write every result."""
        try:
            with anyio.CancelScope(deadline=self._deadline) as self._patience:
                while (results := await self._next(engine, output, policy)) is not None:
                    if output.blocks:
                        await anyio.to_thread.run_sync(
                            self._append, results, output, policy, abandon_on_cancel=True
                        )
                    else:
                        self._append(results, output, policy)
        finally:
            if not output.blocks:
                engine.end()  # what waits for its turn waits no longer
                self._append(engine.take_ready(), output, policy)

    async def _next(self, engine: Engine, output: OutputFile, policy: SyncPolicy) -> list[Result] | None:
        """Wait for results, and meanwhile sync when it is time to; ``None``: there are no more."""
        while True:
            now = anyio.current_time()
            wait = None if self._syncing else policy.next(now)
            if wait == 0:
                policy.began(now)
                self._syncing = True
                engine.start_soon(self._sync, output)
                continue
            with anyio.CancelScope(deadline=math.inf if wait is None else now + wait) as self._waiting:
                return await engine.take_all() or None

    async def _sync(self, output: OutputFile) -> None:
        """Have what was written reach the disk, which may take long: answers are written meanwhile."""
        await anyio.to_thread.run_sync(output.sync)
        self._syncing = False
        assert self._waiting is not None
        self._waiting.cancel()  # it may be time for the next one

    def _append(self, results: list[Result], output: OutputFile, policy: SyncPolicy) -> None:
        for result in results:
            output.append(encode_row(result))
            policy.wrote()
            if result.error is None:
                self._done += 1
            else:
                self._failed += 1


@contextlib.contextmanager
def _opened(job: FileJob) -> Iterator[Prompts]:
    """The prompts of the input, which is closed at the end of the block."""
    prompts = job.prompts()
    if job.waits_for_input:
        # A thread may be waiting for the next one even then, and cannot be told to stop.
        yield _read_in_thread(prompts)
    else:
        with contextlib.closing(prompts):
            yield prompts


async def _read_in_thread(prompts: Iterator[Prompt]) -> AsyncIterator[Prompt]:
    while (prompt := await anyio.to_thread.run_sync(next, prompts, None, abandon_on_cancel=True)) is not None:
        yield prompt
