"""The two kinds of plot in the report: something over time, and how durations are distributed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final, TypeAlias

from .._metrics.histogram import SHORTEST, lower_edge
from .._metrics.words import duration
from .axes import amounts, durations_by_magnitude, times
from .svg import Frame, element, plot, text, width_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .._metrics.histogram import Percentiles
    from .axes import Axis

__all__ = ["Curve", "Marks", "distribution", "over_time"]

_HEAD: Final = 28.0  # height for the legend
_SAMPLE: Final = 26.0  # width of a curve in the legend
_ROW: Final = 16.0  # height of a percentile's label
_MOST_BARS: Final = 44
_WIDTHS: Final = (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30)  # of a bar, in buckets; they divide a decade
_LEAST_SPAN: Final = 30  # buckets: half a decade


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """What is shown of each interval; ``None``: nothing. `area`: from where to where it is shaded."""

    name: str
    values: Sequence[float | None]
    area: Sequence[tuple[float, float] | None] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Marks:
    """Times, in seconds since the start, at which something happened."""

    name: str
    times: Sequence[float]


Edges: TypeAlias = "Sequence[tuple[float, float]]"
"""When each interval begins and ends, in seconds since the start."""


def over_time(title: str, edges: Edges, curves: Sequence[Curve], up: Axis, marks: Marks | None = None) -> str:
    """Curves that are level during each interval, and marks at the bottom."""
    frame = Frame(times(edges[-1][1]), up, _HEAD)
    parts = [
        _area(frame, edges, curve.area, f"area{place}") for place, curve in enumerate(curves) if curve.area
    ]
    parts += [_line(frame, edges, curve.values, f"line{place}") for place, curve in enumerate(curves)]
    samples = [
        (curve.name, element("line", look=f"line{place}", x1=0, x2=_SAMPLE, y1=10, y2=10))
        for place, curve in enumerate(curves)
    ]
    if marks is not None and marks.times:
        parts += [_triangle(frame.x(time), frame.bottom) for time in marks.times]
        samples.append((marks.name, _triangle(_SAMPLE - 6, 14)))
    return plot(title, frame, "".join(parts) + _legend(frame, samples))


def distribution(title: str, counts: Mapping[int, int], figures: Percentiles, noun: str) -> str:
    """Bars for the `counts` of a histogram's buckets, of which there are some, and the percentiles."""
    low, high, width = _extent(min(counts), max(counts))
    bars: dict[int, int] = {}
    for bucket, count in counts.items():
        place = (bucket - low) // width
        bars[place] = bars.get(place, 0) + count
    across = durations_by_magnitude(lower_edge(low), lower_edge(high), "logarithmic scale")
    frame = Frame(across, amounts(max(bars.values()), noun, whole=True), _HEAD + 2 * _ROW)
    parts = []
    for place, count in sorted(bars.items()):
        begin = frame.x(lower_edge(low + place * width))
        end = frame.x(lower_edge(low + (place + 1) * width))
        top = min(frame.y(count), frame.bottom - 1)  # one of thousands is to be seen, too
        parts.append(
            element(
                "rect", look="bar", x=begin + 0.5, y=top, width=end - begin - 1, height=frame.bottom - top
            )
        )
    labels = []
    for row, name in enumerate(("p99", "p90", "p50")):
        value = getattr(figures, name)
        x = frame.x(max(value, SHORTEST))
        y = 14 + row * _ROW
        parts.append(element("line", look=name, x1=x, x2=x, y1=y + 4, y2=frame.bottom))
        said = f"{name} {duration(value)}"
        labels.append(text(said, max(x - 5, frame.left + width_of(said)), y + 4, "end", "halo"))
    return plot(title, frame, "".join(parts + labels))


def _line(frame: Frame, edges: Edges, values: Sequence[float | None], look: str) -> str:
    path = []
    drawing = False
    for (begin, end), value in zip(edges, values, strict=True):
        if value is not None:
            y = frame.y(value)
            path.append(f"V{y:.1f}" if drawing else f"M{frame.x(begin):.1f} {y:.1f}")
            path.append(f"H{frame.x(end):.1f}")
        drawing = value is not None
    return element("path", look=look, d="".join(path), stroke_linejoin="round")


def _area(frame: Frame, edges: Edges, areas: Sequence[tuple[float, float] | None], look: str) -> str:
    path = []
    for (begin, end), area in zip(edges, areas, strict=True):
        if area is not None and area[0] != area[1]:
            low, high = map(frame.y, area)
            path.append(f"M{frame.x(begin):.1f} {low:.1f}V{high:.1f}H{frame.x(end):.1f}V{low:.1f}Z")
    return element("path", look=look, d="".join(path))


def _triangle(x: float, y: float) -> str:
    return element("path", look="mark", d=f"M{x - 5:.1f} {y:.1f}H{x + 5:.1f}L{x:.1f} {y - 9:.1f}Z")


def _legend(frame: Frame, samples: Sequence[tuple[str, str]]) -> str:
    parts = []
    x = frame.right
    for name, sample in reversed(samples):
        x -= width_of(name)
        parts.append(text(name, x, 14))
        x -= _SAMPLE + 6
        parts.append(element("g", sample, transform=f"translate({x:.1f} 0)"))
        x -= 16
    return "".join(parts)


def _extent(first: int, last: int) -> tuple[int, int, int]:
    """From which bucket to which a plot goes that shows `first` and `last`, and how many make one bar."""
    margin = max(1, (_LEAST_SPAN - (last - first)) // 2)
    low, high = first - margin, last + margin + 1
    width = next(width for width in _WIDTHS if (high - low) / width <= _MOST_BARS)
    return low // width * width, -(-high // width) * width, width
