"""The axes of plots: how far they go, where their ticks are, and what is written there."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final

from .._metrics.histogram import SHORTEST

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Axis", "amounts", "durations", "durations_by_magnitude", "times"]

_MOST_TICKS: Final = 5  # up a plot
_MOST_TIMES: Final = 7  # across it
_SPARSE: Final = (1.0,)
_USUAL: Final = (1.0, 2.0, 5.0)
_DENSE: Final = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)

_LARGE: Final = ((1e9, "G"), (1e6, "M"), (1.0, ""))
_UNITS: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_DAY: Final = 86_400
_TIME_UNITS: Final = (
    (180.0, 1, "seconds"),
    (10_800.0, 60, "minutes"),
    (259_200.0, 3_600, "hours"),
    (math.inf, _DAY, "days"),
)
_TIME_STEPS: Final = (
    *(digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 5)),
    *(10, 20, 30, 60, 120, 300, 600, 1_200, 1_800, 3_600, 7_200, 14_400, 21_600, 43_200),
    *(digit * 10.0**power * _DAY for power in range(9) for digit in (1, 2, 5)),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """An axis from `low` to `high`, with `ticks` and what is written there; `caption` says what it shows."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    caption: str
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """How far along the axis `value` is: 0 at its begin, 1 at its end."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def amounts(highest: float, caption: str, *, whole: bool = False) -> Axis:
    """From 0 to `highest` of something, or a little more; `whole`: a part of one is nothing."""
    step = _step(highest / _MOST_TICKS, 1.0 if whole else 0.0)
    size, sign = next((size, sign) for size, sign in _LARGE if highest >= size or not sign)
    return _from_zero(highest, step, lambda value: f"{value / size:,.6g}{sign}", caption)


def durations(highest: float, caption: str) -> Axis:
    """From 0 to `highest` seconds, or a little more."""
    unit, name = _unit(highest)
    step = _step(highest / unit / _MOST_TICKS) * unit
    return _from_zero(highest, step, lambda value: f"{value / unit:,.6g} {name}", caption)


def durations_by_magnitude(low: float, high: float, caption: str) -> Axis:
    """From `low` to `high` seconds, on a logarithmic scale; `SHORTEST` stands for what is shorter."""
    decades = math.log10(high / low)
    digits = _DENSE if decades < 0.8 else _USUAL if decades < 2.4 else _SPARSE
    each = 1 if decades < 8 else 2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, each)
    values = [digit * 10.0**power for power in powers for digit in digits]
    ticks = []
    for value in values:
        if max(low, SHORTEST) * 0.999 <= value <= high * 1.001:
            unit, name = _unit(value)
            less = "≤ " if low < value < SHORTEST * 1.001 else ""
            ticks.append((value, f"{less}{value / unit:,.6g} {name}"))
    return Axis(low, high, tuple(ticks), caption, logarithmic=True)


def times(span: float) -> Axis:
    """`span` seconds from the start of the run on."""
    unit, name = next((unit, name) for longest, unit, name in _TIME_UNITS if span <= longest)
    step = next(step for step in _TIME_STEPS if span / step <= _MOST_TIMES)
    count = int(span / step * 1.000001)
    ticks = tuple((number * step, f"{number * step / unit:,.6g}") for number in range(count + 1))
    return Axis(0.0, span, ticks, f"{name} since the start")


def _from_zero(highest: float, step: float, said: Callable[[float], str], caption: str) -> Axis:
    count = max(1, math.ceil(highest / step - 1e-6))
    ticks = tuple((number * step, said(number * step) if number else "0") for number in range(count + 1))
    return Axis(0.0, count * step, ticks, caption)


def _step(least: float, smallest: float = 0.0) -> float:
    """The first of 1, 2, 5, 10, 20, 50... (or 0.5, 0.2...) that is not less than `least`."""
    if least <= smallest:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * 0.999999)


def _unit(seconds: float) -> tuple[float, str]:
    return next((unit, name) for unit, name in _UNITS if seconds >= unit * 0.999999 or unit == SHORTEST)
