"""The report of a run: one page of HTML that needs nothing else, and runs nothing."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from .._metrics.histogram import SHORTEST
from .._metrics.series import coarser
from .._metrics.words import duration, percentage, printable, rate
from .axes import amounts, durations, durations_by_magnitude
from .plots import Curve, Marks, distribution, over_time
from .style import POLICY, STYLE
from .svg import element

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .._metrics.histogram import Histogram
    from .._metrics.metrics import Latencies
    from .._metrics.series import Interval
    from .._metrics.summary import Summary

__all__ = ["html"]

_MOST_INTERVALS: Final = 120
_LEAST_INTERVALS: Final = 20
_PROMPTS_PER_INTERVAL: Final = 5
_MUCH: Final = 20  # times another duration: both are seen on a logarithmic scale only


def html(summary: Summary, series: Sequence[Interval], latencies: Latencies) -> str:
    """The page; `series` and `latencies` are those of the `Metrics` that made `summary`."""
    begun, ended = (f"{time:%Y-%m-%d %H:%M:%S}" for time in (summary.started, summary.ended))
    title = f"Batch run of {begun} UTC"
    intervals = _fitting(summary, series)
    sections = (
        _section("Over time", _curves(intervals)),
        _section("Latency", _distributions(latencies) + _latency_table(summary)),
        _section("Attempts and errors", _attempts(summary, intervals) + _errors(summary)),
        _section("Settings", _settings(summary)),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>{title}</h1><p class="soft">to {ended} UTC, {duration(summary.elapsed)}; '
        f"anyagent {escape(summary.version)}</p></header>"
        f"{_tiles(summary)}{''.join(sections)}</main></body></html>\n"
    )


def _tiles(summary: Summary) -> str:
    finished = summary.done + summary.failed
    tiles = [
        ("answered", f"{summary.done:,}", f"of {finished:,}"),
        ("failed", f"{summary.failed:,}", percentage(summary.failed, finished) if finished else ""),
    ]
    if summary.skipped:
        tiles.append(("skipped", f"{summary.skipped:,}", "answered before"))
    tiles.append(("answers per second", rate(summary.requests_per_second), "on average"))
    if summary.tokens:
        tiles.append(("tokens per second", rate(summary.tokens_per_second), f"{summary.tokens:,} in all"))
    for name, figures in (("time to first event", summary.first_event), ("end to end", summary.end_to_end)):
        if figures:
            tiles.append((name, duration(figures.p50), f"p50; p99 is {duration(figures.p99)}"))
    tiles.append(("retried", f"{summary.retried:,}", f"attempts: {summary.attempts:,}"))
    tiles.append(("reconnects", f"{summary.reconnects:,}", "connections replaced"))
    cards = (
        f'<div class="card"><dt>{name}</dt><dd>{figure} <small>{more}</small></dd></div>'
        for name, figure, more in tiles
    )
    return f'<dl class="tiles">{"".join(cards)}</dl>'


def _fitting(summary: Summary, series: Sequence[Interval]) -> list[Interval]:
    """Intervals long enough to be told apart in a plot, and for their rates not to be those of chance."""
    finished = summary.done + summary.failed
    most = min(_MOST_INTERVALS, max(_LEAST_INTERVALS, finished // _PROMPTS_PER_INTERVAL))
    return [interval for interval in coarser(series, most) if interval.seconds]


def _curves(intervals: Sequence[Interval]) -> str:
    if not intervals:
        return _note("The run took no time.")
    return _plots(
        ("Answers per second", _answers(intervals)),
        ("Tokens per second", _tokens(intervals)),
        ("Requests in flight, and their limit", _levels(intervals)),
        ("Time to first event, of the attempts that ended", _first_events(intervals)),
    )


def _edges(intervals: Sequence[Interval]) -> list[tuple[float, float]]:
    return [(interval.begin, interval.end) for interval in intervals]


def _rates(intervals: Sequence[Interval], count: Callable[[Interval], int]) -> list[float]:
    return [count(interval) / interval.seconds for interval in intervals]


def _reconnects(intervals: Sequence[Interval]) -> Marks:
    middles = [(interval.begin + interval.end) / 2 for interval in intervals if interval.reconnects]
    return Marks("reconnect", middles)


def _answers(intervals: Sequence[Interval]) -> str:
    rates = _rates(intervals, lambda interval: interval.done)
    if not any(rates):
        return _note("No prompt was answered.")
    curve = Curve("answers", rates, [(0.0, value) for value in rates])
    up = amounts(max(rates), "per second")
    return over_time("Answers per second over time", _edges(intervals), [curve], up, _reconnects(intervals))


def _tokens(intervals: Sequence[Interval]) -> str:
    rates = _rates(intervals, lambda interval: interval.tokens)
    if not any(rates):
        return _note("No answer came with a number of tokens.")
    curve = Curve("tokens", rates, [(0.0, value) for value in rates])
    up = amounts(max(rates), "per second")
    return over_time("Tokens per second over time", _edges(intervals), [curve], up, _reconnects(intervals))


def _levels(intervals: Sequence[Interval]) -> str:
    in_flight = [interval.in_flight for interval in intervals]
    highest = max(max(interval.limit_max, interval.in_flight_max) for interval in intervals)
    if not highest:
        return _note("How many were in flight is not known.")
    curves = (
        Curve(
            "in flight (mean)", in_flight, [None if value is None else (0.0, value) for value in in_flight]
        ),
        Curve(
            "limit (mean, range)",
            [interval.limit for interval in intervals],
            [
                (interval.limit_min, interval.limit_max) if interval.observed else None
                for interval in intervals
            ],
        ),
    )
    up = amounts(highest, "requests", whole=True)
    return over_time("Requests in flight over time", _edges(intervals), curves, up)


def _first_events(intervals: Sequence[Interval]) -> str:
    curves = [
        Curve(name, [interval.first_event_quantile(share) for interval in intervals])
        for name, share in (("p50", 0.5), ("p90", 0.9))
    ]
    known = [value for curve in curves for value in curve.values if value is not None]
    if not known:
        return _note("No attempt had an event.")
    low, high = max(min(known), SHORTEST), max(*known, SHORTEST)
    if high > _MUCH * low:
        up = durations_by_magnitude(low / 1.5, high * 1.5, "logarithmic scale")
        curves = [
            Curve(curve.name, [None if value is None else max(value, low) for value in curve.values])
            for curve in curves
        ]
    else:
        up = durations(high, "")
    return over_time("Time to first event over time", _edges(intervals), curves, up, _reconnects(intervals))


def _failures(intervals: Sequence[Interval]) -> str:
    retried = _rates(intervals, lambda interval: interval.retried)
    failed = _rates(intervals, lambda interval: interval.failed)
    if not any(retried) and not any(failed):
        return _note("No prompt failed, and none was tried again.")
    curves = Curve("retried", retried, [(0.0, value) for value in retried]), Curve("failed", failed)
    up = amounts(max(*retried, *failed), "per second")
    return over_time("Failures and retries over time", _edges(intervals), curves, up, _reconnects(intervals))


def _distributions(latencies: Latencies) -> str:
    return _plots(
        ("Time to first event", _distribution(latencies.first_event, "attempts", "No attempt had an event.")),
        (
            "Between events, on average of an answer",
            _distribution(latencies.between_events, "attempts", "No attempt had more than one event."),
        ),
        ("One attempt", _distribution(latencies.attempt, "attempts", "No attempt was sent.")),
        (
            "End to end, with waiting and retries",
            _distribution(latencies.end_to_end, "prompts", "No prompt was finished."),
        ),
    )


def _distribution(histogram: Histogram, noun: str, otherwise: str) -> str:
    figures = histogram.percentiles()
    if figures is None:
        return _note(otherwise)
    return distribution("Distribution of durations", histogram.filled(), figures, noun)


def _latency_table(summary: Summary) -> str:
    columns = ("count", "p50", "p90", "p99", "mean", "min", "max")
    rows = [
        (
            name.capitalize(),
            f"{figures.count:,}",
            *(duration(getattr(figures, column)) for column in columns[1:]),
        )
        for name, figures in summary.latencies
        if figures
    ]
    return _table(("", *columns), rows) if rows else ""


def _attempts(summary: Summary, intervals: Sequence[Interval]) -> str:
    finished = summary.done + summary.failed
    table = _table(
        ("", "number"),
        (
            ("Prompts finished", f"{finished:,}"),
            ("Attempts", f"{summary.attempts:,}"),
            ("Attempts that failed", f"{sum(summary.attempt_errors.values()):,}"),
            ("Retried", f"{summary.retried:,}"),
            ("Attempts for each prompt", rate(summary.attempts / finished) if finished else "-"),
            ("Tokens of attempts that failed", f"{summary.lost_tokens:,}"),
            ("Reconnects", f"{summary.reconnects:,}"),
        ),
    )
    plot = f'<div class="card"><h3>Failures and retries per second</h3>{_failures(intervals)}</div>'
    return f'<div class="plots">{plot}{table}</div>'


def _errors(summary: Summary) -> str:
    attempts = summary.attempt_errors
    kinds = attempts | {kind: max(count, attempts.get(kind, 0)) for kind, count in summary.errors.items()}
    if not kinds:
        return _note("No attempt failed.")
    most = max(kinds.values())
    rows = [
        (
            escape(printable(kind)),
            f"{attempts.get(kind, 0):,}",
            f"{summary.errors.get(kind, 0):,}",
            _bars(attempts.get(kind, 0) / most, summary.errors.get(kind, 0) / most),
        )
        for kind in sorted(kinds, key=lambda kind: -kinds[kind])
    ]
    return _table(("Reason", "attempts", "prompts", "attempts, and prompts below"), rows)


def _bars(attempts: float, prompts: float) -> str:
    """Two bars, one above the other, of these shares of the whole width."""
    return element(
        "svg",
        element("rect", look="bar", x=0, y=0, width=160 * attempts, height=7)
        + element("rect", look="bar1", x=0, y=9, width=160 * prompts, height=7),
        xmlns="http://www.w3.org/2000/svg",
        viewBox="0 0 160 16",
        width=160,
        height=16,
        aria_hidden="true",
    )


def _settings(summary: Summary) -> str:
    if not summary.settings:
        return _note("None were given.")
    rows = [(escape(printable(name)), escape(printable(value))) for name, value in summary.settings.items()]
    return _table(("Setting", "value"), rows, look="words")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _plots(*plots: tuple[str, str]) -> str:
    cards = (f'<div class="card"><h3>{title}</h3>{content}</div>' for title, content in plots)
    return f'<div class="plots">{"".join(cards)}</div>'


def _note(said: str) -> str:
    return f'<p class="soft">{said}</p>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], look: str = "figures") -> str:
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    table = f'<table class="{look}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="card scroll">{table}</div>'
