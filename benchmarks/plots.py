"""The results as figures, for a README: PNG and SVG, the same bytes for the same results."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Final, TypeAlias

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, NullLocator

from ._style import GREY, STYLES, Style, logarithmic, mixed, plain, settings
from .clients import NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from .results import Results, Row

__all__ = ["draw"]

_Key: TypeAlias = tuple[str, str]  # scenario and variant
_FLOOR: Final = "floor"
_ONE_BY_ONE: Final = "aiohttp + pydantic: the class that anyagent replaces, one request after the other"
_WIDTH: Final = 8.0  # inches: 1,600 pixels, crisp where a README shows it 800 wide


def draw(results: Results, directory: Path) -> list[Path]:
    """Write the figures that `results` has rows for into `directory`; returns the paths, PNG and SVG."""
    written: list[Path] = []
    figures: dict[str, Callable[[Results], Figure | None]] = {
        "cost": _cost,
        "in_flight": _in_flight,
        "size": _size,
        "latency": _latency,
        "batch": _batch,
    }
    with settings():
        for name, make in figures.items():
            figure = make(results)
            if figure is None:
                continue
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
                path = directory / (name + suffix)
                figure.savefig(path, metadata=metadata, facecolor="white")
                written.append(path)
    return written


def _cost(results: Results) -> Figure | None:
    panels = {
        "32 in flight, bursts": ("burst", "streamed"),
        "1,000 in flight, streamed": ("interleaved", "streamed-1000"),
        "1,000 in flight, collected": ("interleaved", "collected-1000"),
    }
    floor_line = "dashed line: msgspec, decoding the same messages and nothing else; "
    return _bars(results, "CPU time per chunk of answer, in µs (less is better)", panels, floor_line)


def _batch(results: Results) -> Figure | None:
    panels = {"answers of 200 chunks": ("batch", "long"), "answers of 20 chunks": ("batch", "short")}
    title = "CPU time per prompt, from a file to a file, 256 in flight, in µs (less is better)"
    return _bars(results, title, panels)


def _bars(results: Results, title: str, panels: dict[str, _Key], note: str = "") -> Figure | None:
    chart = _by_client(results, title, panels)
    if chart is None:
        return None
    figure, axes, clients = chart
    rows = [results.row(*key, name) for key in axes for name in [*clients, _FLOOR]]
    values = [value for row in rows if row is not None for value in row.values]
    for key, ax in axes.items():
        if max(values) > 8 * min(values):
            logarithmic(ax, _below(min(values)), max(values), 0.34)
        else:
            ax.set_xlim(0, max(values) * 1.3)
        for position, name in enumerate(clients):
            _bar(ax, position, name, results, key)
        floor = results.row(*key, _FLOOR)
        if floor is not None:
            ax.axvline(floor.median, color="#000000", linewidth=1, linestyle=(0, (3, 2)))
    _note(figure, f"{note}black tips: lowest and highest run\n{_ONE_BY_ONE}")
    return figure


def _bar(ax: Axes, position: int, name: str, results: Results, key: _Key) -> None:
    style = STYLES[name]
    row = results.row(*key, name)
    if row is None:
        _absent(ax, position, name, results, key)
        return
    ax.barh(position, row.median, height=0.66, color=style.shown)
    low, high = min(row.values), max(row.values)
    ax.plot([low, high], [position, position], color="#222222", linewidth=1, solid_capstyle="butt")
    ax.annotate(
        _number(row.median),
        (high, position),
        (4, 0),
        textcoords="offset points",
        va="center",
        size=9,
        weight="bold" if style.ours else "normal",
    )


def _in_flight(results: Results) -> Figure | None:
    counts = (1, 32, 1000, 10000)
    panels = {how: {count: f"{how}-{count}" for count in counts} for how in ("streamed", "collected")}
    return _curves(
        results,
        "interleaved",
        panels,
        "CPU time per chunk, in µs, by the number of requests in flight",
        "requests in flight",
        [f"{count:,}" for count in counts],
    )


def _size(results: Results) -> Figure | None:
    sizes = {16: "16 B", 256: "256 B", 4096: "4 KiB", 65536: "64 KiB"}
    return _curves(
        results,
        "size",
        {"32 in flight, bursts": {size: str(size) for size in sizes}},
        "CPU time per chunk, in µs, by the size of a chunk",
        "text in a chunk",
        list(sizes.values()),
    )


def _curves(
    results: Results,
    scenario: str,
    panels: dict[str, dict[int, str]],
    title: str,
    x_label: str,
    ticks: Sequence[str],
) -> Figure | None:
    panels = {
        panel: variants
        for panel, variants in panels.items()
        if any(results.row(scenario, variant, name) for variant in variants.values() for name in NAMES)
    }
    drawn = [
        row.median
        for variants in panels.values()
        for variant in variants.values()
        for name in [*NAMES, _FLOOR]
        if (row := results.row(scenario, variant, name)) is not None
    ]
    if not panels:
        return None
    figure, axes = _figure(results, f"{title} (less is better)", 5.2, len(panels))
    for ax, (panel, variants) in zip(axes, panels.items(), strict=True):
        ax.set_title(panel)
        ax.grid()
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(_below(min(drawn)), max(drawn) * 1.4)
        ax.xaxis.set_major_locator(FixedLocator(list(variants)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticklabels(ticks)
        ax.set_xlabel(x_label)
        plain(ax.yaxis, (1, 2, 5))
        ends: list[tuple[str, float, float]] = []
        for name in [*reversed(NAMES), _FLOOR]:
            rows = {x: results.row(scenario, variant, name) for x, variant in variants.items()}
            points = [(x, row.median) for x, row in rows.items() if row is not None]
            if points:
                _line(ax, name, points)
                ends.append((name, *points[-1]))
        _label_ends(ax, results, ends)
    _note(figure, _ONE_BY_ONE)
    return figure


def _line(ax: Axes, name: str, points: Sequence[tuple[float, float]]) -> None:
    style = STYLES.get(name)
    xs, ys = zip(*points, strict=True)
    if style is None:
        ax.plot(xs, ys, color="#000000", linewidth=1, linestyle=(0, (3, 2)))
        return
    ax.plot(
        xs,
        ys,
        color=style.shown,
        linestyle=style.dashes,
        linewidth=2.4 if style.ours else 1.3,
        marker=style.marker,
        markersize=6.5 if style.ours else 5.5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        zorder=4 if style.ours else 3,
    )


def _label_ends(ax: Axes, results: Results, ends: list[tuple[str, float, float]]) -> None:
    """Name the lines beside the panel, near their ends, none over another."""
    low, high = (math.log(limit) for limit in ax.get_ylim())
    ends.sort(key=lambda end: end[2])
    wanted = [(math.log(y) - low) / (high - low) for _, _, y in ends]
    for (name, x, y), place in zip(ends, _apart(wanted, 0.047), strict=True):
        style = STYLES.get(name, Style("#000000", ""))
        ax.annotate(
            _label(results, name),
            (x, y),
            (1.075, place),
            textcoords="axes fraction",
            va="center",
            size=8.5,
            weight="bold" if style.ours else "normal",
            color=mixed(style.color, "black", 0.25) if style.ours else "#222222",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": style.shown,
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places as near as can be to the ascending `wanted` ones, at least `gap` apart."""
    blocks: list[tuple[float, int]] = []  # the mean of neighbours that have to share, and how many they are
    for index, place in enumerate(wanted):
        mean, count = place - index * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, many = blocks.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        blocks.append((mean, count))
    shifted = [mean for mean, count in blocks for _ in range(count)]
    return [place + index * gap for index, place in enumerate(shifted)]


def _latency(results: Results) -> Figure | None:
    panels = {"one request, idle": ("latency", "idle"), "beside 10,000 chunks a second": ("latency", "load")}
    chart = _by_client(
        results, "From the agent's write to the consumer's line, in µs (less is better)", panels
    )
    if chart is None:
        return None
    figure, axes, clients = chart
    for key, ax in axes.items():
        rows = [row for name in clients if (row := results.row(*key, name)) is not None]
        logarithmic(ax, min(row.median for row in rows) / 1.15, max(map(_p99, rows)), 0.6)
        for position, name in enumerate(clients):
            _dumbbell(ax, position, name, results, key)
    _note(figure, "filled: half of the chunks are faster (p50); hollow: 99 % are (p99)")
    return figure


def _dumbbell(ax: Axes, position: int, name: str, results: Results, key: _Key) -> None:
    style = STYLES[name]
    row = results.row(*key, name)
    if row is None:
        _absent(ax, position, name, results, key)
        return
    p50, p99 = row.median, _p99(row)
    ax.plot([p50, p99], [position, position], color=style.shown, linewidth=2.2)
    ax.plot(p50, position, "o", color=style.shown, markersize=7.5)
    ax.plot(p99, position, "o", markerfacecolor="white", markeredgecolor=style.shown, markersize=7)
    ax.annotate(
        f"{_number(p50)} / {_number(p99)}",
        (p99, position),
        (7, 0),
        textcoords="offset points",
        va="center",
        size=8.5,
        weight="bold" if style.ours else "normal",
    )


def _absent(ax: Axes, position: int, name: str, results: Results, key: _Key) -> None:
    reasons = {row.key: row.not_applicable for row in results.rows}
    reason = "not applicable" if reasons.get((*key, name)) else "no result"
    ax.text(ax.get_xlim()[0], position, f" {reason}", va="center", color=GREY, size=8)


def _p99(row: Row) -> float:
    return median(row.extra.get("p99", row.values))


def _by_client(
    results: Results, title: str, panels: dict[str, _Key]
) -> tuple[Figure, dict[_Key, Axes], list[str]] | None:
    """A figure with a line for each client that has a result, and the panels in which one has."""
    measured = {panel: key for panel, key in panels.items() if any(results.row(*key, name) for name in NAMES)}
    if not measured:
        return None
    clients = [name for name in NAMES if any(results.row(*key, name) for key in measured.values())]
    figure, axes = _figure(results, title, 1.45 + 0.3 * len(clients), len(measured))
    for ax, panel in zip(axes, measured, strict=True):
        ax.set_title(panel)
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
        ax.set_yticks([])
        ax.set_ylim(len(clients) - 0.4, -0.6)
    axes[0].set_yticks(range(len(clients)), [_label(results, name) for name in clients])
    for name, label in zip(clients, axes[0].get_yticklabels(), strict=True):
        label.set_fontweight("bold" if STYLES[name].ours else "normal")
    return figure, dict(zip(measured.values(), axes, strict=True)), clients


def _figure(results: Results, title: str, height: float, panels: int) -> tuple[Figure, list[Axes]]:
    layout = ConstrainedLayoutEngine(rect=(0.006, 0.44 / height, 0.988, 1 - 0.85 / height), w_pad=0.05)
    figure = Figure(figsize=(_WIDTH, height), layout=layout)
    figure.suptitle(title, x=0.012, y=1 - 0.09 / height, ha="left", va="top", size=11.5, weight="bold")
    repetitions = sorted({len(row.values) for row in results.rows if row.values})
    counts = " or ".join(map(str, repetitions))
    runs = "one run" if repetitions == [1] else f"medians of {counts} runs"
    python = results.machine.get("python", "")
    _note(figure, f"{runs}, {python}" if python else runs, right=True)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    return figure, list(axes)


def _note(figure: Figure, text: str, *, right: bool = False) -> None:
    x, ha = (0.988, "right") if right else (0.012, "left")
    figure.text(x, 0.012, text, ha=ha, va="bottom", size=8.5, color=GREY)


def _below(value: float) -> float:
    return value / 1.6


def _label(results: Results, name: str) -> str:
    """Short, as all but one of the peers have msgspec."""
    return results.label(name).replace(" + msgspec", "")


def _number(value: float) -> str:
    """Two or three digits that count."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"
