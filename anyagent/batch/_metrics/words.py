"""Figures and texts as people read them."""

from __future__ import annotations

__all__ = ["duration", "percentage", "printable", "rate"]


def duration(seconds: float) -> str:
    """With three significant digits, and from a minute on in two units: 12.3 ms, 1.23 s, 3 min 5 s."""
    rounded = float(f"{max(seconds, 0.0):.3g}")
    if rounded >= 60:
        return _long(seconds)
    if rounded >= 1:
        return f"{_digits(rounded)} s"
    if rounded >= 1e-3:
        return f"{_digits(rounded * 1e3)} ms"
    return f"{_digits(rounded * 1e6)} µs" if rounded else "0 s"


def rate(value: float) -> str:
    """A number with three significant digits, and whole from 100 on: 12,345, 66.5, 0.25."""
    return _digits(value) if value >= 0.01 else f"{value:.2g}"


def percentage(part: int, whole: int) -> str:
    """The share of `part` in `whole`, which is not 0."""
    share = 100 * part / whole
    if share in (0, 100):
        return f"{share:.0f} %"
    return "< 0.1 %" if share < 0.1 else "> 99.9 %" if share > 99.9 else f"{share:.1f} %"


def printable(text: str) -> str:
    """Without what a terminal or a page would act upon, or could not show."""
    return text if text.isprintable() else "".join(each if each.isprintable() else "\ufffd" for each in text)


def _digits(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f}"


def _long(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, rest = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {rest} min"
    days, rest = divmod(round(seconds / 3600), 24)
    return f"{days:,} d {rest} h"
