"""Drawing plots as SVG: elements, colours, the frame with its axes.

Every element has the look of light mode in attributes of its own, so a plot is readable where no style sheet
is applied. A style sheet goes before attributes, and `DARK` is one.
"""

from __future__ import annotations

import dataclasses
from html import escape
from typing import TYPE_CHECKING, ClassVar, Final

from .._metrics.words import printable

if TYPE_CHECKING:
    from .axes import Axis

__all__ = ["DARK", "Frame", "element", "plot", "text", "width_of"]

_LIGHT: Final[dict[str, dict[str, str]]] = {
    "words": {"fill": "#424a53"},
    "halo": {"fill": "#1f2328", "stroke": "#ffffff", "stroke-width": "3", "paint-order": "stroke"},
    "grid": {"stroke": "#d8dee4"},
    "axis": {"stroke": "#6e7781"},
    "line0": {"stroke": "#0072b2", "stroke-width": "1.8", "fill": "none"},
    "line1": {"stroke": "#c04f00", "stroke-width": "1.8", "fill": "none", "stroke-dasharray": "6 3"},
    "line2": {"stroke": "#007a5a", "stroke-width": "1.8", "fill": "none", "stroke-dasharray": "2 2.5"},
    "area0": {"fill": "#0072b2", "fill-opacity": "0.14"},
    "area1": {"fill": "#c04f00", "fill-opacity": "0.16"},
    "bar": {"fill": "#0072b2", "fill-opacity": "0.75"},
    "bar1": {"fill": "#c04f00"},
    "p50": {"stroke": "#1f2328", "stroke-width": "1.6"},
    "p90": {"stroke": "#1f2328", "stroke-width": "1.6", "stroke-dasharray": "6 3"},
    "p99": {"stroke": "#1f2328", "stroke-width": "1.6", "stroke-dasharray": "2 2.5"},
    "mark": {"fill": "#8250a8"},
}
_DARK: Final[dict[str, dict[str, str]]] = {
    "words": {"fill": "#b1bac4"},
    "halo": {"fill": "#e6edf3", "stroke": "#161b22"},
    "grid": {"stroke": "#30363d"},
    "axis": {"stroke": "#8b949e"},
    "line0": {"stroke": "#56b4e9"},
    "line1": {"stroke": "#f0984d"},
    "line2": {"stroke": "#3fc79a"},
    "area0": {"fill": "#56b4e9"},
    "area1": {"fill": "#f0984d"},
    "bar": {"fill": "#56b4e9"},
    "bar1": {"fill": "#f0984d"},
    "p50": {"stroke": "#e6edf3"},
    "p90": {"stroke": "#e6edf3"},
    "p99": {"stroke": "#e6edf3"},
    "mark": {"fill": "#c9a0ee"},
}
DARK: Final = "".join(
    f"svg .{name}{{{';'.join(f'{key}:{value}' for key, value in looks.items())}}}"
    for name, looks in _DARK.items()
)
"""The rules of dark mode."""

_FONT: Final = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_LETTER: Final = 6.8  # the width, at most and on average, that is kept free for one


def element(name: str, content: str = "", look: str | None = None, **attributes: float | str) -> str:
    """An element; `look` names its colours, and ``_`` in an attribute's name stands for a hyphen."""
    given = {} if look is None else {"class": look} | _LIGHT[look]
    for key, value in attributes.items():
        given[key.replace("_", "-")] = value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
    written = "".join(f' {key}="{escape(value)}"' for key, value in given.items())
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def text(said: str, x: float, y: float, anchor: str = "start", look: str = "words") -> str:
    """A line of text, which ends at `x`, has its middle there, or starts there (the default)."""
    return element("text", escape(printable(said)), look, x=x, y=y, text_anchor=anchor)


def width_of(said: str) -> float:
    """How wide a line of text may be."""
    return _LETTER * len(said)


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """Where things are in a plot whose upper `head` is left to other things."""

    across: Axis
    up: Axis
    head: float

    width: ClassVar[float] = 520
    height: ClassVar[float] = 250
    left: ClassVar[float] = 62
    right: ClassVar[float] = 506
    bottom: ClassVar[float] = 208

    def x(self, value: float) -> float:
        """Where `value` is across the plot."""
        return self.left + self.across.share(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Where `value` is in height."""
        return self.bottom - self.up.share(value) * (self.bottom - self.head)

    def axes(self) -> str:
        """Both axes, with their ticks, the grid, and what they show."""
        middle = (self.left + self.right) / 2
        parts = [text(self.up.caption, 4, 14), text(self.across.caption, middle, self.height - 6, "middle")]
        for value, said in self.up.ticks:
            y = self.y(value)
            parts.append(element("line", look="grid", x1=self.left, x2=self.right, y1=y, y2=y))
            parts.append(text(said, self.left - 8, y + 4, "end"))
        for value, said in self.across.ticks:
            x = self.x(value)
            parts.append(element("line", look="axis", x1=x, x2=x, y1=self.bottom, y2=self.bottom + 5))
            half = width_of(said) / 2
            parts.append(text(said, min(x, self.width - half), self.bottom + 19, "middle"))
        parts.append(
            element("line", look="axis", x1=self.left, x2=self.right, y1=self.bottom, y2=self.bottom)
        )
        return "".join(parts)


def plot(title: str, frame: Frame, content: str) -> str:
    """A whole plot; `title` is for those who cannot see it."""
    return element(
        "svg",
        element("title", escape(printable(title))) + frame.axes() + content,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {frame.width} {frame.height}",
        width=frame.width,
        height=frame.height,
        role="img",
        font_family=_FONT,
        font_size=12,
    )
