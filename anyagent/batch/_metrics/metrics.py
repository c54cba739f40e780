"""What is measured of a batch: counters, distributions, the run over time."""

from __future__ import annotations

import bisect
import dataclasses
import datetime
import functools
import importlib.metadata
import operator
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from .histogram import Histogram
from .series import WIDTH, Interval, Series
from .summary import Summary, as_text
from .words import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .._result import ErrorRecord

__all__ = ["Latencies", "Live", "Metrics", "Summary", "as_text"]

_RECENT: Final = 10.0  # seconds
_MARKS: Final = int(_RECENT / WIDTH) + 2
_ERROR_KINDS: Final = 50  # an agent may make up codes without end
_ERROR_LENGTH: Final = 60
_OTHER_ERRORS: Final = "other errors"


@dataclasses.dataclass(frozen=True, slots=True)
class Latencies:
    """Distributions, in seconds.

    * `first_event`: from when an attempt was sent to its first event.
    * `between_events`: the mean time from one event to the next, of each attempt that had two or more.
    * `attempt`: from when an attempt was sent to its end.
    * `end_to_end`: from when a prompt was queued to its result, with all attempts and the waiting between.
    """

    first_event: Histogram = dataclasses.field(default_factory=Histogram)
    between_events: Histogram = dataclasses.field(default_factory=Histogram)
    attempt: Histogram = dataclasses.field(default_factory=Histogram)
    end_to_end: Histogram = dataclasses.field(default_factory=Histogram)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """How a run stands.

    `done`, `failed`, `retried`, `tokens` are as in `Summary`. The rates are those of the last 10 seconds, or
    since the start: `requests_per_second`, `tokens_per_second` of prompts that were answered, and
    `finished_per_second` with those that failed.
    """

    done: int
    failed: int
    retried: int
    tokens: int
    requests_per_second: float
    finished_per_second: float
    tokens_per_second: float


class _Mark(NamedTuple):
    """How many there were at a time."""

    time: float
    done: int = 0
    finished: int = 0
    tokens: int = 0


class Metrics:
    """The measurements of one run that began at `start`, in seconds of a monotonic clock, as all times here.

    It takes the same memory however long the run is. All but `live` belongs to the thread of the run.
    """

    def __init__(self, start: float) -> None:
        self.done = 0
        self.failed = 0
        self.retries = 0
        self.attempts = 0
        self.tokens = 0
        self.latencies = Latencies()
        self._started = datetime.datetime.now(datetime.UTC)
        self._start = start
        self._reconnects = 0
        self._lost_tokens = 0
        self._errors: Counter[str] = Counter()
        self._attempt_errors: Counter[str] = Counter()
        self._first_event = self.latencies.first_event.record
        self._between_events = self.latencies.between_events.record
        self._attempt = self.latencies.attempt.record
        self._end_to_end = self.latencies.end_to_end.record
        self._series = Series()
        self._next_tick = start + WIDTH
        self._counted = (0, 0, 0, 0, 0)  # as far as the series knows
        self._first_event_counts = self.latencies.first_event.counts.copy()
        self._marks: tuple[_Mark, ...] = (_Mark(start),)

    def attempt(
        self,
        *,
        sent: float | None,
        first_event: float | None,
        last_event: float | None,
        end: float,
        events: int,
        tokens: int | None,
        error: ErrorRecord | None,
    ) -> None:
        """A prompt was given to an agent, and that has ended; times, `events` as in `ResponseStats`."""
        if end >= self._next_tick:
            self._tick(end)
        self.attempts += 1
        if sent is not None:
            self._attempt(end - sent)
            if first_event is not None:
                self._first_event(first_event - sent)
                if events > 1 and last_event is not None:
                    self._between_events((last_event - first_event) / (events - 1))
        if error is not None:
            _count(self._attempt_errors, error)
            self._lost_tokens += tokens or 0

    def result(self, now: float, error: ErrorRecord | None, tokens: int | None, queued: float) -> None:
        """A prompt that had been taken from the input at `queued` is finished."""
        if now >= self._next_tick:
            self._tick(now)
        if error is None:
            self.done += 1
            if tokens:
                self.tokens += tokens
        else:
            self.failed += 1
            _count(self._errors, error)
        self._end_to_end(now - queued)

    def retried(self) -> None:
        """A prompt that failed is tried again."""
        self.retries += 1

    def sample(self, now: float, *, in_flight: int, limit: int, reconnects: int) -> None:
        """From `now` on so many requests are in flight and might be; so many reconnects there were in all."""
        if now >= self._next_tick:
            self._tick(now)
        self._series.advance(now - self._start)
        self._series.set_level(in_flight, limit)
        self._reconnects = reconnects

    def live(self, now: float) -> Live:
        """How the run stands; may be called from any thread."""
        marks = self._marks
        newest = _Mark(now, self.done, self.done + self.failed, self.tokens)
        since = max(now - _RECENT, marks[0].time)
        before = _between(marks, newest, since)
        seconds = now - since

        def rate(count: float, earlier: float) -> float:
            return max(0.0, count - earlier) / seconds if seconds > 0 else 0.0

        return Live(
            done=newest.done,
            failed=newest.finished - newest.done,
            retried=self.retries,
            tokens=newest.tokens,
            requests_per_second=rate(newest.done, before[0]),
            finished_per_second=rate(newest.finished, before[1]),
            tokens_per_second=rate(newest.tokens, before[2]),
        )

    def series(self, now: float) -> list[Interval]:
        """The run over time, up to `now`, in at most 300 intervals."""
        self._flush()
        self._series.advance(now - self._start)
        return self._series.intervals()

    def summary(self, now: float, *, skipped: int = 0, settings: Mapping[str, str] | None = None) -> Summary:
        """The figures of the run up to `now`, to which the caller adds what it alone knows."""
        elapsed = max(0.0, now - self._start)
        return Summary(
            version=_version(),
            started=self._started,
            ended=self._started + datetime.timedelta(seconds=elapsed),
            elapsed=elapsed,
            done=self.done,
            failed=self.failed,
            skipped=skipped,
            attempts=self.attempts,
            retried=self.retries,
            reconnects=self._reconnects,
            tokens=self.tokens,
            lost_tokens=self._lost_tokens,
            requests_per_second=self.done / elapsed if elapsed else 0.0,
            tokens_per_second=self.tokens / elapsed if elapsed else 0.0,
            first_event=self.latencies.first_event.percentiles(),
            between_events=self.latencies.between_events.percentiles(),
            attempt=self.latencies.attempt.percentiles(),
            end_to_end=self.latencies.end_to_end.percentiles(),
            errors=dict(self._errors.most_common()),
            attempt_errors=dict(self._attempt_errors.most_common()),
            settings=dict(settings or {}),
        )

    def _tick(self, now: float) -> None:
        self._flush()
        elapsed = now - self._start
        self._series.advance(elapsed)
        self._next_tick = self._start + (elapsed // WIDTH + 1) * WIDTH
        mark = _Mark(now, self.done, self.done + self.failed, self.tokens)
        self._marks = (*self._marks[-_MARKS:], mark)  # in one step, for `live`

    def _flush(self) -> None:
        """Count what has happened since the last time as a part of the newest interval."""
        counters = self.done, self.failed, self.retries, self._reconnects, self.tokens
        done, failed, retried, reconnects, tokens = map(operator.sub, counters, self._counted)
        self._counted = counters
        first_event = self.latencies.first_event.since(self._first_event_counts)
        self._first_event_counts = self.latencies.first_event.counts.copy()
        self._series.add(
            Interval(
                0.0,
                0.0,
                done=done,
                failed=failed,
                retried=retried,
                reconnects=reconnects,
                tokens=tokens,
                first_event=first_event,
            )
        )


@functools.cache
def _version() -> str:
    return importlib.metadata.version("anyagent")


def _count(errors: Counter[str], error: ErrorRecord) -> None:
    said = error.type if error.code is None else f"{error.type}: {error.code}"
    kind = printable(said if len(said) <= _ERROR_LENGTH else said[: _ERROR_LENGTH - 1] + "…")
    errors[kind if kind in errors or len(errors) < _ERROR_KINDS else _OTHER_ERRORS] += 1


def _between(marks: tuple[_Mark, ...], newest: _Mark, time: float) -> tuple[float, ...]:
    """How many were done and finished, and the tokens, at a `time` that is not before the first mark."""
    place = bisect.bisect_right(marks, time, key=operator.attrgetter("time"))
    before = marks[place - 1]
    after = marks[place] if place < len(marks) else newest
    share = (time - before.time) / (after.time - before.time) if after.time > before.time else 0.0
    return tuple(
        earlier + share * (later - earlier) for earlier, later in zip(before[1:], after[1:], strict=True)
    )
