"""The report of a batch: a page that is well formed, needs nothing else, and shows the figures of the run."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import random
import re
from html import unescape
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anyagent.batch import ErrorRecord
from anyagent.batch._metrics.histogram import Percentiles
from anyagent.batch._metrics.metrics import Metrics
from anyagent.batch._metrics.words import duration
from anyagent.batch._report.axes import Axis, amounts, durations, durations_by_magnitude, times
from anyagent.batch._report.page import html
from anyagent.batch._report.plots import distribution
from anyagent.batch._report.svg import Frame, width_of

from .properties import REPEATABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anyagent.batch._metrics.metrics import Summary

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta"}
NASTY = """</title></style><script src="http://evil.example/x.js">&'"\x00\x1b\ud800\u202e"""


class Page(HTMLParser):
    """Reads a page and refuses elements that are not nested."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and "style" not in self.open:
            self.words.append(data.strip())


def page_of(
    metrics: Metrics, end: float, *, skipped: int = 0, settings: dict[str, str] | None = None
) -> tuple[str, Summary]:
    summary = metrics.summary(end, skipped=skipped, settings=settings)
    return html(summary, metrics.series(end), metrics.latencies), summary


def plots_of(page: str) -> list[ElementTree.Element]:
    return [
        ElementTree.fromstring(each)
        for each in re.findall(r"<svg.*?</svg>", page, re.DOTALL)
        if "<title>" in each
    ]


def plot_of(page: str, heading: str) -> ElementTree.Element:
    [found] = re.findall(rf"<h3>{heading}</h3>(<svg.*?</svg>)", page, re.DOTALL)
    return ElementTree.fromstring(found)


def texts_of(plot: ElementTree.Element) -> list[str]:
    return [each.text or "" for each in plot.iter(f"{SVG}text")]


def looks_of(plot: ElementTree.Element) -> list[str]:
    return [each.get("class", "") for each in plot.iter()]


def ask(
    metrics: Metrics,
    end: float,
    took: float,
    *,
    events: int = 9,
    tokens: int | None = 50,
    error: ErrorRecord | None = None,
) -> None:
    """One prompt with one attempt; the first event comes after half of the time, unless it fails."""
    sent = end - took
    begun = None if error else sent + took / 2
    metrics.attempt(
        sent=sent,
        first_event=begun,
        last_event=None if error else end,
        end=end,
        events=0 if error else events,
        tokens=None if error else tokens,
        error=error,
    )
    metrics.result(end, error, tokens, sent)


def nothing() -> tuple[Metrics, float]:
    return Metrics(7.0), 7.0


def nothing_for_a_while() -> tuple[Metrics, float]:
    metrics = Metrics(7.0)
    metrics.sample(7.0, in_flight=0, limit=16, reconnects=0)
    return metrics, 9.0


def one_row() -> tuple[Metrics, float]:
    metrics = Metrics(7.0)
    ask(metrics, 9.4, 2.0)
    return metrics, 9.4


def an_instant() -> tuple[Metrics, float]:
    metrics = Metrics(7.0)
    metrics.sample(7.0, in_flight=1, limit=16, reconnects=0)
    ask(metrics, 7.001, 0.0)
    return metrics, 7.001


def short() -> tuple[Metrics, float]:
    drawn = random.Random(1)
    metrics = Metrics(0.0)
    for number in range(1_000):
        now = number / 800
        if number % 100 == 0:
            metrics.sample(now, in_flight=number // 20, limit=10 + number // 20, reconnects=0)
        ask(metrics, now, drawn.lognormvariate(-4, 0.5))
    return metrics, 1.25


def long() -> tuple[Metrics, float]:
    drawn = random.Random(2)
    metrics = Metrics(0.0)
    for number in range(4_000):
        now = number * 50.0
        limit = 30 + int(20 * math.sin(number / 140))
        metrics.sample(now, in_flight=limit - 1, limit=limit, reconnects=number // 1_800)
        ask(metrics, now, drawn.lognormvariate(0, 0.5))
        if number % 10 == 0:
            metrics.retried()
    return metrics, 200_000.0


def all_failed() -> tuple[Metrics, float]:
    metrics = Metrics(0.0)
    metrics.sample(0.0, in_flight=3, limit=4, reconnects=1)
    for number in range(500):
        ask(metrics, number / 10, 0.3, error=ErrorRecord("AgentError", number % 3, ""))
    return metrics, 50.0


def bimodal() -> tuple[Metrics, float]:
    drawn = random.Random(3)
    metrics = Metrics(0.0)
    for number in range(2_000):
        ask(metrics, number / 20, drawn.choice([0.01, 8.0]) * drawn.uniform(0.8, 1.2), tokens=None)
    return metrics, 100.0


def constant() -> tuple[Metrics, float]:
    metrics = Metrics(0.0)
    for number in range(100):
        ask(metrics, number / 20, 0.125, events=1)
    return metrics, 5.0


def skewed() -> tuple[Metrics, float]:
    metrics = Metrics(0.0)
    for number in range(100):
        ask(metrics, number / 20, 1_000.0 if number == 50 else 0.001234)
    return metrics, 5.0


def at_once() -> tuple[Metrics, float]:
    metrics = Metrics(0.0)
    for number in range(100):
        ask(metrics, number / 20, 0.0 if number % 2 else 3.0)
    return metrics, 5.0


RUNS: list[Callable[[], tuple[Metrics, float]]] = [
    nothing,
    nothing_for_a_while,
    one_row,
    an_instant,
    short,
    long,
    all_failed,
    bimodal,
    constant,
    skewed,
    at_once,
]


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: run.__name__)
def run(request: pytest.FixtureRequest) -> tuple[str, Summary]:
    """The page of a run, and its summary."""
    return page_of(*request.param(), skipped=3, settings={"input": "a.jsonl"})


# the page


def test_a_page_is_well_formed(run: tuple[str, Summary]) -> None:
    page, _ = run
    read = Page(page)
    assert page.startswith("<!DOCTYPE html>\n<html lang=")
    assert [tag for tag, _ in read.elements].count("h1") == 1
    document = page.removeprefix("<!DOCTYPE html>\n")
    assert ElementTree.fromstring(document).tag == "html"


def test_a_page_needs_nothing_else_and_runs_nothing(run: tuple[str, Summary]) -> None:
    page, _ = run
    assert not re.search(r"https?://", page.replace('xmlns="http://www.w3.org/2000/svg"', ""))
    assert "url(" not in page
    assert "@import" not in page
    for tag, attributes in Page(page).elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "use", "image", "base", "a"}
        assert not {"src", "href", "xlink:href", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)


def test_a_page_forbids_all_but_its_own_style_sheet(run: tuple[str, Summary]) -> None:
    page, _ = run
    [policy] = [
        attributes["content"]
        for tag, attributes in Page(page).elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    [style] = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"style-src 'sha256-{digest}'" in policy


def test_a_page_is_light_and_dark(run: tuple[str, Summary]) -> None:
    page, _ = run
    light, dark = page.split("@media (prefers-color-scheme: dark)")
    for plot in plots_of(page):
        for each in plot.iter():
            if look := each.get("class"):
                assert f"svg .{look}{{" in dark
                assert each.get("fill") or each.get("stroke")
    assert "--page: #" in light


def test_the_figures_of_a_page_are_those_of_the_summary(run: tuple[str, Summary]) -> None:
    page, summary = run
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?) <small>", page))
    assert tiles["answered"] == f"{summary.done:,}"
    assert tiles["failed"] == f"{summary.failed:,}"
    assert tiles["skipped"] == "3"
    assert tiles["retried"] == f"{summary.retried:,}"
    assert tiles["reconnects"] == f"{summary.reconnects:,}"
    for name, latency in (("time to first event", summary.first_event), ("end to end", summary.end_to_end)):
        assert tiles.get(name) == (latency and duration(latency.p50))
    words = Page(page).words
    assert duration(summary.elapsed) in unescape(page)
    for _, figures in summary.latencies:
        if figures:
            for value in (figures.p50, figures.p90, figures.p99, figures.mean, figures.min, figures.max):
                assert duration(value) in words
    for kind, count in summary.errors.items():
        at = words.index(kind)
        assert words[at + 2] == f"{count:,}"
        assert words[at + 1] == f"{summary.attempt_errors[kind]:,}"
    at = words.index("input")
    assert words[at + 1] == "a.jsonl"


def test_a_plot_without_anything_in_it_is_replaced_by_the_reason(run: tuple[str, Summary]) -> None:
    page, _ = run
    plain = re.findall(r"<h3>.*?</h3>(.*?)</div>", page, re.DOTALL)
    assert plain
    for content in plain:
        assert re.fullmatch(r'<p class="soft">[A-Z].*\.</p>|<svg.*</svg>', content, re.DOTALL)
    for plot in plots_of(page):
        drawn = {look for look in looks_of(plot) if look.startswith(("line", "bar"))}
        assert drawn


def boxes(plot: ElementTree.Element) -> Iterator[tuple[str, float, float, float]]:
    """Every text of a plot with its baseline and where it begins and ends."""
    for each in plot.iter(f"{SVG}text"):
        said = each.text or ""
        x, width = float(each.get("x", "")), width_of(said)
        begin = {"start": x, "middle": x - width / 2, "end": x - width}[each.get("text-anchor", "")]
        yield said, float(each.get("y", "")), begin, begin + width


def test_no_text_is_outside_its_plot_or_on_another(run: tuple[str, Summary]) -> None:
    page, _ = run
    for plot in plots_of(page):
        found = list(boxes(plot))
        for said, y, begin, end in found:
            assert -2 <= begin < end + 1e-9 <= Frame.width + 2 or not said, said
            assert 10 <= y <= Frame.height
        for (said, y, begin, end), (other, other_y, other_begin, other_end) in itertools.combinations(
            found, 2
        ):
            beside = end <= other_begin + 1 or other_end <= begin + 1
            assert beside or abs(y - other_y) >= 12 or not (said and other), (said, other)


def test_everything_drawn_is_inside_its_plot(run: tuple[str, Summary]) -> None:
    page, _ = run
    for plot in plots_of(page):
        for path in plot.iter(f"{SVG}path"):
            for command, numbers in re.findall(r"([MHVL])([-\d. ]+)", path.get("d", "")):
                values = [float(number) for number in numbers.split()]
                across = {"V": []}.get(command, values[:1])
                up = values[len(across) :]
                assert all(-1 <= value <= Frame.width for value in across)
                assert all(0 <= value <= Frame.height for value in up)
        for bar in plot.iter(f"{SVG}rect"):
            assert float(bar.get("width", "")) > 0
            assert float(bar.get("height", "")) >= 1
            assert float(bar.get("x", "")) >= Frame.left
            assert float(bar.get("y", "")) >= 0


# what is in it


def test_a_run_with_everything_has_every_plot() -> None:
    page, _ = page_of(*long())
    assert len(plots_of(page)) == 9
    assert texts_of(plot_of(page, "Requests in flight, and their limit"))[-2:] == [
        "limit (mean, range)",
        "in flight (mean)",
    ]
    assert "area1" in looks_of(plot_of(page, "Requests in flight, and their limit"))
    assert "days since the start" not in page
    assert "hours since the start" in page


def test_reconnects_are_marked_where_there_were_some() -> None:
    with_some, _ = page_of(*long())
    without, _ = page_of(*short())
    assert looks_of(plot_of(with_some, "Answers per second")).count("mark") == 3  # two, and the legend
    assert "mark" not in looks_of(plot_of(without, "Answers per second"))
    assert "reconnect" not in texts_of(plot_of(without, "Answers per second"))


def test_percentiles_are_marked_in_the_distributions() -> None:
    page, summary = page_of(*bimodal())
    assert summary.end_to_end is not None
    plot = plot_of(page, "End to end, with waiting and retries")
    for name in ("p50", "p90", "p99"):
        assert f"{name} {duration(getattr(summary.end_to_end, name))}" in texts_of(plot)
        assert name in looks_of(plot)


def test_the_bars_of_a_distribution_are_as_high_as_there_are_durations() -> None:
    metrics = Metrics(0.0)
    for number in range(100):
        ask(metrics, 1.0, 0.001 if number < 75 else 1.0)
    page, _ = page_of(metrics, 1.0)
    heights = [float(each.get("height", "")) for each in plot_of(page, "One attempt").iter(f"{SVG}rect")]
    assert len(heights) == 2
    assert heights[0] / heights[1] == pytest.approx(3, rel=0.01)


def test_buckets_that_make_one_bar_are_counted_together() -> None:
    figures = Percentiles(count=4, p50=1.0, p90=1.0, p99=1.0, mean=1.0, min=1.0, max=1.0)
    plot = ElementTree.fromstring(distribution("", {100: 1, 101: 2, 300: 1}, figures, "prompts"))
    heights = [float(each.get("height", "")) for each in plot.iter(f"{SVG}rect")]
    assert len(heights) == 2
    assert heights[0] / heights[1] == pytest.approx(3, rel=0.01)


def test_times_to_first_event_far_apart_are_on_a_logarithmic_scale() -> None:
    heading = "Time to first event, of the attempts that ended"
    far, _ = page_of(*bimodal())
    near, _ = page_of(*constant())
    assert "logarithmic scale" in texts_of(plot_of(far, heading))
    assert "logarithmic scale" not in texts_of(plot_of(near, heading))


def test_the_curves_of_a_run_with_few_prompts_have_few_intervals() -> None:
    metrics = Metrics(0.0)
    for number in range(30):
        ask(metrics, float(number), 0.5)
    page, _ = page_of(metrics, 30.0)
    [line] = [
        each
        for each in plot_of(page, "Answers per second").iter(f"{SVG}path")
        if each.get("class") == "line0"
    ]
    assert 10 <= line.get("d", "").count("H") <= 20


def test_errors_are_sorted_by_how_often_they_were_met() -> None:
    metrics = Metrics(0.0)
    for number in range(9):
        error = ErrorRecord("AgentError", "rare" if number < 2 else "usual", "")
        metrics.attempt(
            sent=0.0, first_event=None, last_event=None, end=1.0, events=0, tokens=None, error=error
        )
    metrics.result(1.0, ErrorRecord("ValueError", None, ""), None, 0.0)
    page, _ = page_of(metrics, 2.0)
    words = Page(page).words
    places = [words.index(kind) for kind in ("AgentError: usual", "AgentError: rare", "ValueError")]
    assert places == sorted(places)
    widths = [float(width) for width in re.findall(r'class="bar1?"[^>]* width="([\d.]+)"', page)]
    assert widths[-6:] == pytest.approx([160, 0, 160 * 2 / 7, 0, 0, 160 / 7], abs=0.1)


def test_what_comes_from_an_agent_or_a_file_name_is_escaped() -> None:
    metrics, end = all_failed()
    metrics.result(end, ErrorRecord("AgentError", NASTY, NASTY), None, end)
    page, _ = page_of(metrics, end, settings={NASTY: NASTY})
    read = Page(page)
    assert "script" not in {tag for tag, _ in read.elements}
    assert not set(page) & {"\x00", "\x1b", "\ud800", "\u202e"}
    shown = NASTY
    for each in "\x00\x1b\ud800\u202e":
        shown = shown.replace(each, "\ufffd")
    assert read.words[-2:] == [shown, shown]
    assert page.encode()


# axes


@REPEATABLE
@given(st.floats(1e-3, 1e12), st.booleans())
def test_an_axis_of_amounts_begins_at_zero_and_reaches_the_highest(highest: float, whole: bool) -> None:
    axis = amounts(highest, "", whole=whole)
    check_ticks(axis, most=7)
    assert axis.ticks[0] == (0, "0")
    assert highest <= axis.high * (1 + 1e-5)
    assert axis.high <= max(2.0 * highest, 1.0)
    if whole:
        assert all(value == pytest.approx(round(value)) for value, _ in axis.ticks)


@REPEATABLE
@given(st.floats(1e-6, 1e6))
def test_an_axis_of_durations_begins_at_zero_and_reaches_the_highest(highest: float) -> None:
    axis = durations(highest, "")
    check_ticks(axis, most=7)
    assert highest <= axis.high * (1 + 1e-5)


@REPEATABLE
@given(st.floats(1e-3, 1e9))
@example(180.0)
@example(259_200.0)
def test_an_axis_of_times_ends_with_the_run(span: float) -> None:
    axis = times(span)
    check_ticks(axis, most=8)
    assert axis.high == span
    assert axis.caption.endswith(" since the start")


@REPEATABLE
@given(st.floats(1e-7, 2e4), st.floats(3.1, 1e11))
def test_the_ticks_of_a_logarithmic_axis_are_apart(low: float, factor: float) -> None:
    axis = durations_by_magnitude(low, min(max(low * factor, 3.1e-6), 1e5), "")
    check_ticks(axis, most=10)
    frame = Frame(axis, amounts(1, ""), 0)
    for (value, said), (following, other) in itertools.pairwise(axis.ticks):
        apart = frame.x(following) - frame.x(value)
        assert apart > (width_of(said) + width_of(other)) / 2


def check_ticks(axis: Axis, most: int) -> None:
    assert 2 <= len(axis.ticks) <= most
    values = [value for value, _ in axis.ticks]
    assert values == sorted(set(values))
    assert len({said for _, said in axis.ticks}) == len(values)
    assert all(-0.001 <= axis.share(value) <= 1.001 for value in values)


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        (amounts(0.9, ""), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (amounts(3, "", whole=True), ["0", "1", "2", "3"]),
        (amounts(12_000, ""), ["0", "5,000", "10,000", "15,000"]),
        (amounts(2_400_000, ""), ["0", "0.5M", "1M", "1.5M", "2M", "2.5M"]),
        (durations(0.9, ""), ["0", "200 ms", "400 ms", "600 ms", "800 ms", "1,000 ms"]),
        (durations(0.000_04, ""), ["0", "10 µs", "20 µs", "30 µs", "40 µs"]),
        (times(100), ["0", "20", "40", "60", "80", "100"]),
        (times(200), ["0", "0.5", "1", "1.5", "2", "2.5", "3"]),
        (times(10_000_000), ["0", "20", "40", "60", "80", "100"]),
        (
            durations_by_magnitude(0.01, 1.0, ""),
            ["10 ms", "20 ms", "50 ms", "100 ms", "200 ms", "500 ms", "1 s"],
        ),
        (durations_by_magnitude(0.001, 10.0, ""), ["1 ms", "10 ms", "100 ms", "1 s", "10 s"]),
        (durations_by_magnitude(9e-7, 3e-6, ""), ["≤ 1 µs", "1.5 µs", "2 µs", "3 µs"]),
        (durations_by_magnitude(1.0, 4.0, ""), ["1 s", "1.5 s", "2 s", "3 s", "4 s"]),
    ],
)
def test_ticks_are_said_with_units(axis: Axis, said: list[str]) -> None:
    assert [each for _, each in axis.ticks] == said
