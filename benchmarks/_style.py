"""How the figures look: colours that the colour-blind can tell apart, markers, axes with plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib.colors import to_hex, to_rgb
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis

__all__ = ["GREY", "STYLES", "Style", "logarithmic", "mixed", "plain", "settings"]

GREY: Final = "#5c5c5c"


@dataclass(frozen=True)
class Style:
    color: str
    marker: str
    dashes: str | tuple[float, tuple[float, ...]] = "-"
    ours: bool = False

    @property
    def shown(self) -> str:
        """The colour, muted for the peers. Not by transparency, which would show what is behind."""
        return self.color if self.ours else mixed(self.color, "white", 0.45)


# Okabe and Ito's palette, which the colour-blind can tell apart; a library on uvloop is dashed.
STYLES: Final = {
    "anyagent-asyncio": Style("#0072B2", "o", ours=True),
    "anyagent-uvloop": Style("#56B4E9", "D", (0, (4, 1.2)), ours=True),
    "anyagent-trio": Style("#D55E00", "s", ours=True),
    "replaced": Style("#666666", "X", (0, (1, 1.2))),
    "aiohttp": Style("#009E73", "^"),
    "aiohttp-uvloop": Style("#009E73", "v", (0, (4, 1.6))),
    "websockets": Style("#E69F00", "P"),
    "picows": Style("#CC79A7", "<"),
    "picows-uvloop": Style("#CC79A7", ">", (0, (4, 1.6))),
    "httpx-ws": Style("#000000", "*", (0, (5, 1, 1, 1))),
    "trio-websocket": Style("#000000", "d"),
}


def settings() -> AbstractContextManager[None]:
    return mpl.rc_context(
        {
            "svg.hashsalt": "anyagent",
            "savefig.dpi": 200,
            "font.family": "DejaVu Sans",  # comes with matplotlib
            "font.size": 9.5,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#8c8c8c",
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.8,
            "xtick.color": GREY,
            "ytick.color": GREY,
            "xtick.labelcolor": "#222222",
            "ytick.labelcolor": "#222222",
        }
    )


def logarithmic(ax: Axes, low: float, high: float, room: float) -> None:
    """The x axis from `low` to `high`, and for numbers behind the marks `room` of that more."""
    ax.set_xscale("log")
    ax.set_xlim(low, high * (high / low) ** room)
    ax.set_xlabel("µs, logarithmic", size=8.5, color=GREY)
    decades = math.log10(high / low) * (1 + room)
    plain(ax.xaxis, (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.9 else (1,))


def plain(axis: XAxis | YAxis, labelled: tuple[float, ...]) -> None:
    """Numbers as people write them; small ticks for those that are not `labelled`."""
    axis.set_major_locator(LogLocator(subs=labelled))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(LogLocator(subs=range(2, 10)))
    axis.set_minor_formatter(NullFormatter())


def mixed(color: str, other: str, share: float) -> str:
    pairs = zip(to_rgb(color), to_rgb(other), strict=True)
    red, green, blue = ((1 - share) * ours + share * theirs for ours, theirs in pairs)
    return to_hex((red, green, blue))
