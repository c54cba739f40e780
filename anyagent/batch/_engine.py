"""The window of a batch: as many prompts in flight as the agents take, each until it has its result."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

from .._request import ResponseStats
from ..errors import AnyAgentError, Disconnected
from ._attempt import AttemptTimeout, NotCompleted, deadline_of, failure_of
from ._fleet import Fleet
from ._metrics.metrics import Metrics
from ._result import Attempt, Result, Timings
from ._results import Results
from ._source import Source

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

    from .._response import Reply, Response
    from ._config import BatchConfig
    from ._fleet import Host, Line
    from ._rates import Gate
    from ._result import ErrorRecord
    from ._source import Job, Prompts

__all__ = ["Engine", "TooManyErrors"]

_RATE_NEEDS: Final = 100  # results, before the share of failed ones says something
_SAMPLE_PERIOD: Final = 0.25  # seconds
_LONGEST_WAIT: Final = 600.0  # seconds, of those that an agent can ask for
_MOST_TOKENS: Final = 10**9  # of one answer, that an agent is believed
_EXPECTED: Final = (AnyAgentError, ValueError, TypeError, OverflowError, RecursionError)


class TooManyErrors(Exception):
    """More prompts have failed than `BatchConfig.max_errors` or `BatchConfig.max_error_rate` allows.

    `failed` of `finished` prompts have; `last` is the newest one's error.
    """

    def __init__(self, failed: int, finished: int, last: ErrorRecord) -> None:
        self.failed = failed
        self.finished = finished
        self.last = last
        super().__init__(failed, finished, last)

    def __str__(self) -> str:
        return f"{self.failed} of {self.finished} prompts failed, the last with {self.last.type}"


def _plausible(reply: Reply) -> Reply:
    """`reply` with a number of tokens that can be reckoned with."""
    tokens = reply.tokens_used
    if tokens is None or 0 <= tokens <= _MOST_TOKENS:
        return reply
    return dataclasses.replace(reply, tokens_used=min(max(tokens, 0), _MOST_TOKENS))


class Engine:
    """Runs a batch, in tasks of `task_group`.

    A worker is a task that has a prompt and a place on a connection, sees to the attempt, and goes on with
    the next prompt as long as there is one and a place for it. Whatever may change that calls `_fill`. What
    goes wrong in a task is kept in `crash`, and `on_crash` called.
    """

    def __init__(
        self,
        prompts: Prompts,
        config: BatchConfig,
        task_group: TaskGroup,
        *,
        skip: Callable[[str, int], int | None] | None,
        gate: Gate | None,
        on_crash: Callable[[], object],
    ) -> None:
        now = anyio.current_time()
        self.metrics = Metrics(now)
        self._last_error: ErrorRecord | None = None
        self.ended: float | None = None
        self.crash: BaseException | None = None
        self._on_crash = on_crash
        self._config = config
        self._retry = config.retries
        self._gate = gate
        self._task_group = task_group
        self._epoch = time.time() - now  # so that a clock that is set does no harm
        self._clock = now - time.monotonic()
        self._results = Results(ordered=config.ordered)
        self._source = Source(prompts, config.agent_name, skip, self._fill)
        self._fleet = Fleet(config, now, on_change=self._changed, start_soon=self.start_soon)
        self._again: deque[Job] = deque()  # to be tried again now
        self._later: list[tuple[float, int, Job]] = []  # a heap: to be tried again at that time
        self._later_count = itertools.count()
        self._sooner = anyio.Event()
        self._in_flight: dict[Response, Job] = {}
        self._expired: dict[Response, AttemptTimeout] = {}
        self._at_gate: set[anyio.CancelScope] = set()
        self._working = 0  # workers
        self._unfinished = 0  # jobs without a result
        self._untaken = 0  # results that were not taken
        self._stopping = False
        self._filling_soon = False
        self._next_sample = now

    @property
    def in_flight(self) -> int:
        """How many attempts are under way, without those that wait for their rate."""
        return self._fleet.in_flight - len(self._at_gate)

    @property
    def limit(self) -> int:
        """How many may be."""
        return self._fleet.limit

    @property
    def reconnects(self) -> int:
        """How many connections were replaced."""
        return self._fleet.reconnects

    def start(self) -> None:
        """Connect, and begin."""
        self.start_soon(self._source.run)
        self._fleet.start()
        self.start_soon(self._try_again)
        self.start_soon(self._watch)

    async def take(self) -> Result:
        """Wait for the next result; as `Results.take`."""
        result = await self._results.take()
        self._taken(1)
        return result

    async def take_all(self) -> list[Result]:
        """Wait for results; as `Results.take_all`."""
        results = await self._results.take_all()
        self._taken(len(results))
        return results

    def take_ready(self) -> list[Result]:
        """All results that are there; as `Results.take_ready`."""
        results = self._results.take_ready()
        self._taken(len(results))
        return results

    def end(self) -> None:
        """The block is left: whoever still waits for a result gets `anyio.ClosedResourceError`."""
        self.ended = anyio.current_time()
        self.sample(self.ended)
        self._results.end(anyio.ClosedResourceError("the batch was left"))

    def now(self) -> float:
        """The time of the run, from any thread."""
        return time.monotonic() + self._clock

    def stop(self) -> None:
        """Begin no further attempt. The results end when those under way have."""
        self._stopping = True
        for scope in self._at_gate:
            scope.cancel()
        self._end_if_done()

    def sample(self, now: float) -> None:
        """Note what is in flight, and may be, for the metrics."""
        self._next_sample = now + _SAMPLE_PERIOD
        self.metrics.sample(
            now, in_flight=self._fleet.in_flight, limit=self._fleet.limit, reconnects=self._fleet.reconnects
        )

    def start_soon(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run `function` in a task of the batch; what it raises comes out of it."""
        self._task_group.start_soon(self._guard, function, *args)

    async def _guard(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        try:
            await function(*args)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as exc:
            if self.crash is None or not isinstance(exc, Exception):
                self.crash = exc
            self._on_crash()

    # Which prompt, and where

    def _changed(self) -> None:
        """There may be a place, or will never be one again."""
        self._fill()
        if self._fleet.failure is not None and not self._filling_soon:  # else there may be nothing to ask
            self._results.end(self._fleet.failure)

    def _fill(self) -> None:
        """Start a worker for each prompt that there is a place for."""
        while (work := self._take()) is not None:
            self._working += 1
            self.start_soon(self._work, *work)
        self._end_if_done()

    def _take(self) -> tuple[Job, Line] | None:
        if self._stopping or self._results.ended:
            return None
        now = anyio.current_time()
        attempts = self._again[0].attempts if self._again else ()
        line = self._fleet.take(now, attempts[-1].agent if attempts else None)
        if line is None:
            return None
        job = self._next_job(now)
        if job is None or self._stopping:  # the prompts' own iterator may stop the batch
            self._fleet.give_back(line)
            return None
        return job, line

    def _next_job(self, now: float) -> Job | None:
        if self._again:
            return self._again.popleft()
        if self._full() or self._source.exhausted:
            return None
        job = self._source.take(now)
        if job is not None:
            self._unfinished += 1
        elif self._source.skipping and not self._filling_soon:
            self._filling_soon = True
            self.start_soon(self._fill_soon)
        return job

    def _taken(self, count: int) -> None:
        was_full = self._full()
        self._untaken -= count
        if was_full:
            self._fill()

    def _full(self) -> bool:
        return self._unfinished + self._untaken >= self._config.window

    async def _fill_soon(self) -> None:
        await anyio.lowlevel.checkpoint()
        self._filling_soon = False
        self._changed()

    def _end_if_done(self) -> None:
        if self._working or (self._unfinished and not self._stopping) or self._results.ended:
            return
        if not self._stopping and (job := self._next_job(anyio.current_time())) is not None:
            self._again.append(job)  # it waits for a connection
        if self._source.exhausted or self._stopping:
            self._results.end(self._source.failure)

    # Attempts

    async def _work(self, job: Job, line: Line) -> None:
        work: tuple[Job, Line] | None = (job, line)
        try:
            while work is not None:
                await self._attempt(*work)
                work = self._take()
        finally:
            self._working -= 1
        self._fill()

    async def _attempt(self, job: Job, line: Line) -> None:
        """Have a prompt answered on `line`, and see to what comes of it."""
        prompt, gate = job.prompt, self._gate
        response: Response | None = None
        tokens_used: int | None = None
        entered = False
        try:
            if gate is not None:
                entered = await self._enter(gate, line.host)
                if not entered:
                    return
            response = await line.agent.send_message(
                prompt.text, conversation=prompt.conversation, metadata=prompt.metadata
            )
            job.begun = None
            self._in_flight[response] = job
            reply = _plausible(await response.collect())
            tokens_used = reply.tokens_used
            assert response.end is not None
            if response.end.status == "completed":
                self._answered(job, line, response.stats, reply)
            else:
                self._failed(job, line, NotCompleted(response.end.status, reply.text), response.stats)
        except anyio.ClosedResourceError:  # by `_watch`
            assert response is not None
            self._failed(job, line, self._expired.pop(response), response.stats)
        except _EXPECTED as exc:
            self._failed(job, line, exc, None if response is None else response.stats)
        finally:
            self._fleet.give_back(line)
            if response is not None:
                self._in_flight.pop(response, None)
            if gate is not None and entered:
                gate.leave(tokens_used)

    async def _enter(self, gate: Gate, host: Host) -> bool:
        """Wait until one more may be sent; false: the batch was stopped."""
        with anyio.CancelScope() as scope:
            self._at_gate.add(scope)
            host.waiting += 1
            try:
                await gate.enter()
            finally:
                host.waiting -= 1
                self._at_gate.discard(scope)
            if not self._stopping:
                return True
            gate.leave(None)
        return False

    def _answered(self, job: Job, line: Line, stats: ResponseStats, reply: Reply) -> None:
        assert stats.sent is not None
        assert stats.end is not None
        end, limit = stats.end, line.host.limit
        if limit is not None:
            limit.succeeded(
                end,
                in_flight=line.host.in_flight - line.host.waiting,
                sent=stats.sent,
                first_event=stats.first_event,
            )
        self._record(job, line, stats, end, None, reply.tokens_used)
        self._finish(job, stats, end, reply, None)
        if limit is None or limit.limit > line.host.in_flight:
            self._fill()

    def _failed(self, job: Job, line: Line, exc: Exception, stats: ResponseStats | None) -> None:
        if isinstance(exc, Disconnected):
            self._fleet.refuse(line, exc)
        now = anyio.current_time()
        stats = stats or ResponseStats()
        failure = failure_of(exc, self._retry, sent=stats.sent is not None)
        limit = line.host.limit
        if limit is not None and stats.sent is not None and failure.busy:
            limit.busy(now, sent=stats.sent)
        self._record(job, line, stats, now, failure.error, None, failure.partial)
        job.tries += not failure.unseen
        if not failure.retry or job.tries >= self._retry.attempts:
            self._finish(job, stats, now, None, failure.error)
        elif failure.unseen:
            self._again.appendleft(job)
        else:
            self.metrics.retried()
            wait = min(failure.retry_after, _LONGEST_WAIT) + random.uniform(0, self._retry.bound(job.tries))
            if failure.busy and (limit is None or limit.at_minimum):
                line.host.rest(now + wait)  # or all prompts would be sent, one after the other, only to fail
            heapq.heappush(self._later, (now + wait, next(self._later_count), job))
            self._sooner.set()

    def _record(
        self,
        job: Job,
        line: Line,
        stats: ResponseStats,
        end: float,
        error: ErrorRecord | None,
        tokens_used: int | None,
        partial: str = "",
    ) -> None:
        """Note that an attempt is over."""
        epoch = self._epoch
        sent, first_event = stats.sent, stats.first_event
        attempt = Attempt(
            line.host.label,
            None if sent is None else epoch + sent,
            None if first_event is None else epoch + first_event,
            epoch + end,
            error,
            partial,
        )
        job.attempts = (*job.attempts, attempt)
        self.metrics.attempt(
            sent=sent,
            first_event=first_event,
            last_event=stats.last_event,
            end=end,
            events=stats.events,
            tokens=tokens_used,
            error=error,
        )
        if end >= self._next_sample:
            self.sample(end)

    def _finish(
        self, job: Job, stats: ResponseStats, end: float, reply: Reply | None, error: ErrorRecord | None
    ) -> None:
        """The prompt has its result."""
        text, tokens_used = (None, None) if reply is None else (reply.text, reply.tokens_used)
        last = job.attempts[-1]
        timings = Timings(self._epoch + job.queued, last.sent, last.first_event, last.end)
        result = Result(
            job.key, job.index, text, tokens_used, job.attempts, timings, error, job.prompt.columns
        )
        self._unfinished -= 1
        self._untaken += 1
        self.metrics.result(end, error, tokens_used, job.queued)
        self._results.add(result, job.order)
        self._last_error = error or self._last_error
        if self._last_error is not None:
            self._end_if_too_many(self._last_error)

    def _end_if_too_many(self, last: ErrorRecord) -> None:
        most, rate = self._config.max_errors, self._config.max_error_rate
        failed = self.metrics.failed
        finished = self.metrics.done + failed
        if (most is not None and failed > most) or (
            rate is not None and finished >= _RATE_NEEDS and failed > rate * finished
        ):
            self._results.end(TooManyErrors(failed, finished, last))

    # Time

    async def _try_again(self) -> None:
        """Bring back each prompt when it is time to try it again."""
        while True:
            self._sooner = anyio.Event()
            now = anyio.current_time()
            while self._later and self._later[0][0] <= now:
                self._again.append(heapq.heappop(self._later)[-1])
            self._fill()
            with anyio.CancelScope(deadline=self._later[0][0] if self._later else math.inf):
                await self._sooner.wait()

    async def _watch(self) -> None:
        """End the attempts that take too long. Looks only when the first of them may have."""
        timeouts = self._config.timeouts
        set_ones = [
            seconds
            for seconds in (timeouts.total, timeouts.first_event, timeouts.idle)
            if seconds is not None
        ]
        while set_ones:
            now = anyio.current_time()
            look_again = now + min(set_ones)
            for response, job in list(self._in_flight.items()):
                if job.begun is None:
                    job.begun = now
                deadline, timeout = deadline_of(response.stats, job.begun, timeouts)
                if response.stats.end is None and deadline <= now:
                    self._expired[response] = timeout
                    await response.aclose()
                elif deadline > now:
                    look_again = min(look_again, deadline)
            await anyio.sleep_until(look_again)
