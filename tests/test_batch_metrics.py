"""What is measured of a batch: distributions, the run over time, live numbers, the summary."""

from __future__ import annotations

import datetime
import itertools
import math
import random
import statistics
import sys
import threading
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anyagent.batch import ErrorRecord
from anyagent.batch._metrics.histogram import Histogram, lower_edge, quantile
from anyagent.batch._metrics.metrics import Metrics, Summary, as_text
from anyagent.batch._metrics.series import CAPACITY, WIDTH, Interval, Series, coarser
from anyagent.batch._metrics.words import duration, percentage, printable, rate

from .properties import REPEATABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

DURATIONS = st.floats(min_value=1e-6, max_value=86_400)
BUSY = ErrorRecord("AgentError", "busy", "try later")
LOST = ErrorRecord("Disconnected", 1006, "gone")
INVALID = ErrorRecord("ValueError", None, "no prompt")


def answer(
    metrics: Metrics,
    end: float,
    *,
    first_event: float = 0.2,
    between: float = 0.01,
    events: int = 5,
    tokens: int | None = 7,
    queued: float = 1.0,
) -> None:
    """A prompt was queued so long before `end`, and answered by one attempt that took half a second."""
    sent = end - 0.5
    begun = sent + first_event
    metrics.attempt(
        sent=sent,
        first_event=begun,
        last_event=begun + between * (events - 1),
        end=end,
        events=events,
        tokens=tokens,
        error=None,
    )
    metrics.result(end, None, tokens, end - queued)


def failed_attempt(
    metrics: Metrics, end: float, error: ErrorRecord, *, sent: float | None = None, tokens: int | None = None
) -> None:
    metrics.attempt(
        sent=sent, first_event=None, last_event=None, end=end, events=0, tokens=tokens, error=error
    )


def exact(values: Sequence[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1]


# distributions


@REPEATABLE
@given(st.lists(DURATIONS, min_size=1, max_size=300))
@example([1e-6])
@example([86_400.0])
@example([0.1] * 10)
def test_percentiles_are_within_two_percent_and_the_rest_is_exact(values: list[float]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    figures = histogram.percentiles()
    assert figures is not None
    for share, found in ((0.5, figures.p50), (0.9, figures.p90), (0.99, figures.p99)):
        assert found == pytest.approx(exact(values, share), rel=0.02)
    assert figures.mean == pytest.approx(statistics.fmean(values))
    assert (figures.count, figures.min, figures.max) == (len(values), min(values), max(values))
    assert figures.min <= figures.p50 <= figures.p90 <= figures.p99 <= figures.max
    assert figures.min <= figures.mean <= figures.max


def test_percentiles_of_many_durations_are_those_of_their_distribution() -> None:
    drawn = random.Random(1)
    values = [drawn.lognormvariate(-2, 1.5) for _ in range(20_000)]
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    figures = histogram.percentiles()
    assert figures is not None
    assert figures.p99 == pytest.approx(exact(values, 0.99), rel=0.02)


def test_an_empty_distribution_has_no_percentiles() -> None:
    assert Histogram().percentiles() is None


def test_durations_out_of_range_are_counted_at_its_ends() -> None:
    histogram = Histogram()
    for value in (0.0, -1.0, 1e-9, 1e9):
        histogram.record(value)
    figures = histogram.percentiles()
    assert figures is not None
    assert (figures.count, figures.min, figures.max) == (4, -1.0, 1e9)
    assert (histogram.counts[0], histogram.counts[-1]) == (3, 1)
    assert figures.p50 == 0.0


def test_the_memory_of_a_distribution_does_not_grow() -> None:
    histogram = Histogram()
    size = len(histogram.counts)
    for number in range(10_000):
        histogram.record(1e-7 * 1.01**number if number < 3_000 else number)
    assert len(histogram.counts) == size < 1_000


@REPEATABLE
@given(DURATIONS)
def test_a_duration_is_in_its_bucket(value: float) -> None:
    histogram = Histogram()
    histogram.record(value)
    [bucket] = histogram.filled()
    assert lower_edge(bucket) <= value * (1 + 1e-9)
    assert value <= lower_edge(bucket + 1) * (1 + 1e-9)


def test_a_quantile_is_that_of_the_smallest_duration_that_enough_do_not_exceed() -> None:
    counts = {10: 1, 20: 1}
    assert quantile(counts, 0.5) < lower_edge(11)
    assert quantile(counts, 0.51) > lower_edge(20)


# the run over time


def sums(intervals: Sequence[Interval]) -> tuple[float, ...]:
    return (
        sum(each.done for each in intervals),
        sum(each.failed for each in intervals),
        sum(each.retried for each in intervals),
        sum(each.reconnects for each in intervals),
        sum(each.tokens for each in intervals),
        sum(sum(each.first_event.values()) for each in intervals),
    )


def check_adjoining(intervals: Sequence[Interval], end: float) -> None:
    assert intervals[0].begin == 0
    assert intervals[-1].end == pytest.approx(end)
    for earlier, later in itertools.pairwise(intervals):
        assert earlier.end == later.begin


steps = st.lists(
    st.tuples(
        st.sampled_from(["done", "failed", "retried", "sample", "read"]),
        st.floats(0, 2) | st.floats(0, 1_000),
    ),
    max_size=60,
)


@REPEATABLE
@given(steps, st.integers(1, 50))
def test_merging_intervals_loses_nothing(steps: list[tuple[str, float]], most: int) -> None:
    start = 1_000.0
    metrics = Metrics(start)
    now = start
    done = failed = retried = reconnects = 0
    level: tuple[int, int] | None = None
    integral = limits = known = 0.0
    for what, wait in steps:
        now += wait
        if level is not None:
            integral += wait * level[0]
            limits += wait * level[1]
            known += wait
        match what:
            case "done":
                done += 1
                answer(metrics, now)
            case "failed":
                failed += 1
                metrics.result(now, BUSY, None, now)
            case "retried":
                retried += 1
                metrics.retried()
            case "sample":
                reconnects += 1
                level = reconnects % 7, 5 + reconnects % 11
                metrics.sample(now, in_flight=level[0], limit=level[1], reconnects=reconnects)
            case "read":
                metrics.series(now)
    intervals = metrics.series(now)
    elapsed = now - start
    for each in (intervals, coarser(intervals, most)):
        assert sums(each) == (done, failed, retried, reconnects, 7 * done, done)
        assert sum(interval.in_flight_sum for interval in each) == pytest.approx(integral)
        assert sum(interval.limit_sum for interval in each) == pytest.approx(limits)
        assert sum(interval.observed for interval in each) == pytest.approx(known)
        check_adjoining(each, elapsed)
    assert len(intervals) <= CAPACITY
    assert len(coarser(intervals, most)) <= most


def test_what_happens_is_in_the_interval_of_its_time() -> None:
    metrics = Metrics(50.0)
    for now in (50.0, 50.1, 50.13, 50.3, 51.0):
        answer(metrics, now)
    by_begin = {each.begin: each.done for each in metrics.series(51.1) if each.done}
    assert by_begin == {0.0: 2, WIDTH: 1, 2 * WIDTH: 1, 8 * WIDTH: 1}


def test_a_run_of_any_length_has_a_bounded_number_of_intervals() -> None:
    metrics = Metrics(0.0)
    for now in range(0, 3_000_000, 100):
        answer(metrics, float(now))
    intervals = metrics.series(3_000_000.0)
    assert CAPACITY / 2 <= len(intervals) <= CAPACITY
    assert sum(each.done for each in intervals) == 30_000
    widths = {each.seconds for each in intervals[:-1]}
    assert len(widths) == 1


def test_the_last_interval_is_joined_to_the_one_before_while_it_is_short() -> None:
    metrics = Metrics(0.0)
    assert [each.end for each in metrics.series(1.25 * WIDTH)] == [1.25 * WIDTH]
    assert [each.end for each in metrics.series(1.75 * WIDTH)] == [WIDTH, 1.75 * WIDTH]


def test_an_interval_knows_the_mean_and_the_extremes_of_the_limit() -> None:
    metrics = Metrics(0.0)
    metrics.sample(0.0, in_flight=4, limit=8, reconnects=0)
    metrics.sample(WIDTH / 4, in_flight=0, limit=16, reconnects=0)
    metrics.sample(WIDTH / 2, in_flight=2, limit=4, reconnects=0)
    first, second = metrics.series(2 * WIDTH)[:2]
    assert (first.in_flight, first.in_flight_max) == (2.0, 4)
    assert (first.limit, first.limit_min, first.limit_max) == (8.0, 4, 16)
    assert (second.in_flight, second.limit) == (2.0, 4.0)


def test_before_the_first_sample_the_limit_is_not_known() -> None:
    series = Series()
    series.advance(WIDTH)
    series.set_level(1, 2)
    series.advance(3 * WIDTH)
    first, *rest = series.intervals()
    assert (first.in_flight, first.limit) == (None, None)
    assert {(each.in_flight, each.limit) for each in rest} == {(1, 2)}


def test_joining_an_interval_without_a_limit_keeps_the_extremes_of_the_other() -> None:
    known = Interval(1.0, 2.0)
    known.observe(1.0, 3, 9)
    unknown = Interval(0.0, 1.0)
    for both in (unknown.joined(known), known.joined(Interval(2.0, 3.0))):
        assert (both.limit_min, both.limit_max, both.limit) == (9, 9, 9)


def test_an_interval_knows_the_times_to_first_event_of_the_attempts_that_ended_in_it() -> None:
    metrics = Metrics(0.0)
    answer(metrics, 0.01, first_event=0.1)
    answer(metrics, WIDTH + 0.01, first_event=0.4)
    first, second = metrics.series(2 * WIDTH)[:2]
    assert first.first_event_quantile(0.9) == pytest.approx(0.1, rel=0.02)
    assert second.first_event_quantile(0.9) == pytest.approx(0.4, rel=0.02)
    assert Interval(0.0, 1.0).first_event_quantile(0.5) is None


# live numbers


def test_live_rates_are_those_of_the_last_ten_seconds() -> None:
    metrics = Metrics(100.0)
    for number in range(1, 2_241):  # 100 a second for 20 seconds, then 20 a second for 12
        now = 100 + (number / 100 if number <= 2_000 else 20 + (number - 2_000) / 20)
        answer(metrics, now, tokens=3)
    live = metrics.live(now)
    assert live.requests_per_second == live.finished_per_second == pytest.approx(20, rel=0.02)
    assert live.tokens_per_second == pytest.approx(60, rel=0.02)
    assert (live.done, live.failed, live.tokens) == (2_240, 0, 6_720)


@pytest.mark.parametrize("late", [0.0, 0.03, 0.06, 0.09, 0.12])
def test_live_rates_of_an_even_run_are_even(late: float) -> None:
    metrics = Metrics(100.0)
    for number in range(int((15 + late) * 160)):
        answer(metrics, 100 + number / 160)
    assert metrics.live(115 + late).requests_per_second == pytest.approx(160, rel=0.002)


def test_live_rates_are_those_since_the_start_in_the_first_ten_seconds() -> None:
    metrics = Metrics(100.0)
    for number in range(1, 21):
        answer(metrics, 100 + number / 10)
    metrics.result(102.0, BUSY, None, 100.0)
    metrics.retried()
    live = metrics.live(102.0)
    assert live.requests_per_second == pytest.approx(10)
    assert live.finished_per_second == pytest.approx(10.5)
    assert (live.done, live.failed, live.retried) == (20, 1, 1)


@pytest.mark.parametrize("now", [100.0, 99.0])
def test_live_rates_are_zero_before_any_time_has_passed(now: float) -> None:
    metrics = Metrics(100.0)
    answer(metrics, 100.0)
    assert metrics.live(now).requests_per_second == 0.0


def test_live_rates_fall_to_zero_when_nothing_is_finished_any_more() -> None:
    metrics = Metrics(0.0)
    for number in range(100):
        answer(metrics, number / 10)
    for now in range(10, 40):
        metrics.sample(float(now), in_flight=1, limit=1, reconnects=0)
    assert metrics.live(40.0).requests_per_second == 0.0


def test_live_numbers_may_be_read_in_another_thread() -> None:
    metrics = Metrics(0.0)
    failures: list[Exception] = []
    clock = [0.0]
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                live = metrics.live(clock[0])
                assert 0 <= live.requests_per_second < 100_000
        except Exception as exc:
            failures.append(exc)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        reader = threading.Thread(target=read)
        reader.start()
        for number in range(5_000):
            clock[0] = number / 1_000
            answer(metrics, clock[0])
        stop.set()
        reader.join(30)
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert not reader.is_alive()


# the summary


def test_the_summary_has_the_figures_of_the_run() -> None:
    metrics = Metrics(10.0)
    failed_attempt(metrics, 11.0, BUSY, sent=10.9)
    metrics.retried()
    answer(metrics, 12.0, first_event=0.2, between=0.03, tokens=40, queued=2.0)
    failed_attempt(metrics, 13.0, LOST, tokens=5)
    metrics.result(13.0, LOST, None, 12.0)
    metrics.sample(13.5, in_flight=1, limit=2, reconnects=3)
    summary = metrics.summary(14.0, skipped=9, settings={"input": "a.jsonl"})
    assert (summary.done, summary.failed, summary.skipped, summary.retried) == (1, 1, 9, 1)
    assert (summary.attempts, summary.reconnects, summary.tokens, summary.lost_tokens) == (3, 3, 40, 5)
    assert summary.elapsed == 4.0
    assert (summary.requests_per_second, summary.tokens_per_second) == (0.25, 10.0)
    assert summary.errors == {"Disconnected: 1006": 1}
    assert summary.attempt_errors == {"AgentError: busy": 1, "Disconnected: 1006": 1}
    assert summary.settings == {"input": "a.jsonl"}
    assert summary.first_event is not None
    assert summary.first_event.count == 1
    assert summary.first_event.p50 == pytest.approx(0.2)
    assert summary.between_events is not None
    assert summary.between_events.count == 1
    assert summary.between_events.p50 == pytest.approx(0.03)
    assert summary.attempt is not None
    assert [summary.attempt.min, summary.attempt.max] == pytest.approx([0.1, 0.5])
    assert summary.end_to_end is not None
    assert (summary.end_to_end.min, summary.end_to_end.max) == (1.0, 2.0)


def test_an_answer_of_one_event_has_no_time_between_events() -> None:
    metrics = Metrics(0.0)
    answer(metrics, 1.0, events=1)
    summary = metrics.summary(1.0)
    assert summary.first_event is not None
    assert summary.between_events is None


def test_the_names_in_json_say_the_units() -> None:
    metrics = Metrics(0.0)
    answer(metrics, 1.0)
    summary = metrics.summary(2.0)
    encoded = msgspec.json.encode(summary)
    said = msgspec.json.decode(encoded)
    assert said["elapsed_seconds"] == 2.0
    assert said["first_event_seconds"]["count"] == 1
    assert {"between_events_seconds", "attempt_seconds", "end_to_end_seconds"} < said.keys()
    assert said["started"].endswith("Z")
    began, ended = (datetime.datetime.fromisoformat(said[name]) for name in ("started", "ended"))
    assert (ended - began).total_seconds() == 2.0
    assert msgspec.json.decode(encoded, type=Summary) == summary


def test_a_run_that_took_no_time_has_a_summary() -> None:
    summary = Metrics(5.0).summary(5.0)
    assert (summary.elapsed, summary.requests_per_second, summary.tokens_per_second) == (0.0, 0.0, 0.0)
    assert summary.end_to_end is None


def test_kinds_of_errors_are_bounded_in_number_and_in_length() -> None:
    metrics = Metrics(0.0)
    for number in range(1_000):
        metrics.result(1.0, ErrorRecord("AgentError", f"{number}" + "x" * 1_000, ""), None, 0.0)
    metrics.result(1.0, ErrorRecord("AgentError", "0" + "x" * 1_000, ""), None, 0.0)
    errors = metrics.summary(1.0).errors
    assert len(errors) == 51
    assert errors.pop("other errors") == 950
    assert max(map(len, errors)) <= 60
    assert sum(errors.values()) == 51


def test_a_code_of_an_agent_cannot_move_the_cursor() -> None:
    metrics = Metrics(0.0)
    metrics.result(1.0, ErrorRecord("AgentError", "\x1b[2J\u202e", ""), None, 0.0)
    metrics.result(1.0, INVALID, None, 0.0)
    assert metrics.summary(1.0).errors == {"AgentError: \ufffd[2J\ufffd": 1, "ValueError": 1}


# in words


def check_text(text: str) -> None:
    assert text.endswith("\n")
    assert all(len(line) <= 80 and line == line.rstrip() for line in text.splitlines())


def test_the_text_of_a_long_run() -> None:
    metrics = Metrics(0.0)
    for _ in range(12_300):
        answer(metrics, 185.0, tokens=100)
    for _ in range(45):
        failed_attempt(metrics, 185.0, BUSY, tokens=2)
        metrics.result(185.0, BUSY, None, 184.0)
    metrics.retried()
    metrics.sample(185.0, in_flight=0, limit=1, reconnects=2)
    text = as_text(metrics.summary(185.0, skipped=1_000))
    check_text(text)
    assert text == (
        "12,345 prompts in 3 min 5 s\n"
        "\n"
        "answered        12,300  66.5 per second\n"
        "failed              45  0.4 % of all\n"
        "skipped          1,000  answered before\n"
        "tokens       1,230,000  6,649 per second\n"
        "tokens lost         90  by attempts that failed\n"
        "retried              1  12,345 attempts in all\n"
        "reconnects           2\n"
        "\n"
        "                    p50      p90      p99     mean      max\n"
        "to first event   200 ms   200 ms   200 ms   200 ms   200 ms\n"
        "between events  10.0 ms  10.0 ms  10.0 ms  10.0 ms  10.0 ms\n"
        "one attempt      500 ms   500 ms   500 ms   500 ms   500 ms\n"
        "end to end       1.00 s   1.00 s   1.00 s   1.00 s   1.00 s\n"
        "\n"
        "failed with\n"
        "  AgentError: busy  45\n"
    )


def test_the_text_of_one_prompt_without_tokens() -> None:
    metrics = Metrics(0.0)
    answer(metrics, 1.0, tokens=None)
    text = as_text(metrics.summary(1.0))
    check_text(text)
    assert text.startswith("1 prompt in 1.00 s\n\nanswered  1  1.00 per second\nfailed    0\n\n")
    assert "tokens" not in text


def test_the_text_of_no_prompt() -> None:
    assert as_text(Metrics(0.0).summary(0.012)) == "0 prompts in 12.0 ms\n"


def test_the_text_when_all_had_been_answered_before() -> None:
    text = as_text(Metrics(0.0).summary(0.012, skipped=5))
    assert text == "0 prompts in 12.0 ms\n\nskipped  5  answered before\n"


def test_the_text_of_the_longest_figures_fits() -> None:
    metrics = Metrics(0.0)
    for number in range(15):
        error = ErrorRecord("AgentError", f"{number}" + "x" * 100, "")
        failed_attempt(metrics, 3_599.0, error, sent=0.0, tokens=10**12)
        metrics.result(3_599.0, error, None, 0.0)
    answer(metrics, 3_599.0, first_event=3_599.0, between=3_599.0, tokens=10**12, queued=3_599.0)
    text = as_text(metrics.summary(3_599.0))
    check_text(text)
    assert "59 min 59 s" in text
    lines = text.splitlines()
    assert len(lines[lines.index("failed with") :]) == 12
    assert lines[-1].split() == ["5", "other", "errors", "5"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-1.0, "0 s"),
        (0.0, "0 s"),
        (5e-7, "0.50 µs"),
        (0.000_123_4, "123 µs"),
        (0.000_999_9, "1.00 ms"),
        (0.012_345, "12.3 ms"),
        (0.9996, "1.00 s"),
        (1.234, "1.23 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (185.2, "3 min 5 s"),
        (3_599.6, "1 h 0 min"),
        (7_500.0, "2 h 5 min"),
        (86_399.0, "1 d 0 h"),
        (100 * 86_400.0, "100 d 0 h"),
    ],
)
def test_durations_are_said_with_fitting_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (0.001234, "0.0012"), (0.25, "0.25"), (66.54, "66.5"), (99.97, "100"), (12_345.6, "12,346")],
)
def test_rates_have_three_digits_and_are_whole_from_100_on(value: float, said: str) -> None:
    assert rate(value) == said


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [
        (0, 10, "0 %"),
        (10, 10, "100 %"),
        (1, 3, "33.3 %"),
        (1, 100_000, "< 0.1 %"),
        (99_999, 100_000, "> 99.9 %"),
    ],
)
def test_a_share_is_none_or_all_only_if_it_is(part: int, whole: int, said: str) -> None:
    assert percentage(part, whole) == said


def test_text_without_control_characters_is_shown_as_it_is() -> None:
    assert printable("prompts für 東京.jsonl") == "prompts für 東京.jsonl"
    assert printable("a\x00b\ud800") == "a\ufffdb\ufffd"
