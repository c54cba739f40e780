"""What a batch shows of itself: on a terminal a board while it runs, lines anywhere else, and its summary."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from typing import TYPE_CHECKING, ClassVar, Final, Literal, TypeAlias

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..batch._metrics.metrics import as_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import RenderableType

    from ..batch._files.run import Progress
    from ..batch._metrics.metrics import Summary
    from ._display import Display

__all__ = ["Board", "End", "JSONLines", "Lines", "View", "view_for", "watched"]

End: TypeAlias = Literal["complete", "stopped", "failed"]
"""How a batch has ended: all prompts have a result; a signal stopped it; an error did."""

_WIDEST: Final = 90  # columns; further apart, a figure is hard to connect with its name
_WIDE: Final = 60
_NARROW: Final = 38
_GAP: Final = "   "


class View:
    """What standard error gets to see of a batch: as it is, nothing but notes. For any thread.

    `first`, `every`: after how many seconds `show` is called for the first time, and then again and again.
    """

    first: ClassVar = 1.0
    every: ClassVar = 1.0

    def __init__(self, display: Display, progress: Callable[[], Progress]) -> None:
        self._display = display
        self._progress = progress

    def show(self) -> None:
        """Show how far the batch is."""

    def note(self, text: str) -> None:
        """Say something in a line of its own."""
        self._display.note(text)

    def close(self) -> None:
        """The batch has ended."""

    def conclude(self, end: End, summary: Summary, output: Path | None) -> None:
        """Show what came of it, where the answers are, and how to go on. Why it failed is shown later."""


class _Words(View):
    """For people."""

    def conclude(self, end: End, summary: Summary, output: Path | None) -> None:
        if not _something_came_of_it(end, summary):
            return  # why it failed says it all
        self._display.block(as_text(summary) + "\n")
        if output is not None:
            self.note(f"the answers are in {output}")
            if end != "complete":
                self.note("the same command goes on where this one stopped")


class Lines(_Words):
    """A line of text now and then, and one at the end."""

    every = 10.0

    def show(self) -> None:
        self.note(_sentence(self._progress()))

    def conclude(self, end: End, summary: Summary, output: Path | None) -> None:
        if _something_came_of_it(end, summary):
            self.note(_sentence(_ended(self._progress(), end)))
        super().conclude(end, summary, output)


class JSONLines(View):
    """A line of JSON every second, and one at the end, which has the summary."""

    def show(self) -> None:
        self._display.json_note({"event": "progress"} | _rounded(self._progress()))

    def conclude(self, end: End, summary: Summary, output: Path | None) -> None:
        figures = _rounded(_ended(self._progress(), end))
        self._display.json_note({"event": "end", "outcome": end} | figures | {"summary": summary})


class Board(_Words):
    """A few lines on a terminal that are painted again and again, and are gone in the end.

    The cursor stays visible, in the empty line below. So there is nothing to restore however the process
    ends or is suspended, and the ``^C`` that a terminal echoes moves nothing.
    """

    first = 0.0
    every = 0.25

    def __init__(self, display: Display, progress: Callable[[], Progress]) -> None:
        super().__init__(display, progress)
        self._console = Console(stderr=True, highlight=False)
        self._lock = threading.Lock()
        self._height = 0

    def show(self) -> None:
        with self._lock:
            self._display.paint(self._erased() + self._drawn())

    def note(self, text: str) -> None:
        with self._lock:
            shown = self._height > 0
            self._display.paint(self._erased())
            self._display.note(text)
            if shown:
                self._display.paint(self._drawn())

    def close(self) -> None:
        with self._lock:
            self._display.paint(self._erased())

    def _erased(self) -> str:
        height, self._height = self._height, 0
        return f"\r\x1b[{height}A\x1b[J" if height else ""

    def _drawn(self) -> str:
        columns, height = self._display.size()
        self._console.width = width = columns - 1  # in the last column, some terminals begin a new line
        with self._console.capture() as capture:
            for line in board(self._progress(), width):
                self._console.print(line, no_wrap=True, overflow="crop")
        lines = capture.get().splitlines(keepends=True)[: height - 1]  # what scrolls away cannot be erased
        self._height = len(lines)
        return "".join(lines)


def view_for(display: Display, *, quiet: bool, as_json: bool) -> type[View]:
    """What suits standard error, if neither is asked for."""
    if quiet:
        return View
    if as_json:
        return JSONLines
    return Board if display.paintable else Lines


@contextlib.contextmanager
def watched(view: View) -> Iterator[None]:
    """Have `view` show things while the block runs, from a thread of its own.

    A terminal that is stopped, or a pipe that nobody reads, holds up only that thread, until the end.
    """
    ended = threading.Event()

    def watch() -> None:
        seconds = view.first
        while not ended.wait(seconds):
            view.show()
            seconds = view.every

    watching = threading.Thread(target=watch, name="anyagent batch display")
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
        view.close()


def board(progress: Progress, width: int) -> list[RenderableType]:
    """The lines of a `Board`: how far it is, and its figures in as many columns as there is room for."""
    width = min(width, _WIDEST)
    columns = 3 if width >= _WIDE else 2 if width >= _NARROW else 1
    gaps = len(_GAP) * (columns - 1)
    cell = (width - gaps) // columns
    figures = [
        Text.assemble((name, "dim"), (f" {value}".rjust(cell - len(name)), style))
        for name, value, style in _figures(progress)
    ]
    height = math.ceil(len(figures) / columns)
    return [
        _head(progress, cell * columns + gaps),
        *(Text(_GAP).join(figures[row::height]) for row in range(height)),
    ]


def _head(progress: Progress, width: int) -> RenderableType:
    finished = _finished(progress)
    if progress.total is None:
        return Text(f"{finished:,} rows so far")
    if width < _NARROW:
        return Text(f"{finished:,} of {progress.total:,} ({_percent(finished, progress.total)})")
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    grid.width = width
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right", width=5)
    grid.add_row(
        f"{finished:,} of {progress.total:,}",
        ProgressBar(
            total=progress.total or 1,
            completed=finished if progress.total else 1,
            complete_style="green",
            finished_style="green",
        ),
        _percent(finished, progress.total),
    )
    return grid


def _figures(progress: Progress) -> list[tuple[str, str, str]]:
    """Names, values and styles, in the order of reading: down the columns."""
    return [
        ("failed", f"{progress.failed:,}", "red" if progress.failed else ""),
        ("retried", f"{progress.retried:,}", "yellow" if progress.retried else ""),
        ("skipped", f"{progress.skipped:,}", ""),
        ("in flight", f"{progress.in_flight:,}", ""),
        ("limit", f"{progress.limit:,}", ""),
        ("requests/s", _rate(progress.requests_per_second), ""),
        ("tokens/s", _rate(progress.tokens_per_second), ""),
        ("elapsed", _clock(progress.elapsed), ""),
        ("left", "-" if progress.eta is None else _clock(progress.eta), ""),
    ]


def _sentence(progress: Progress) -> str:
    finished = _finished(progress)
    parts = [
        f"{finished:,} rows so far"
        if progress.total is None
        else f"{finished:,} of {progress.total:,} ({_percent(finished, progress.total)})",
        f"{progress.failed:,} failed",
        f"{progress.retried:,} retried",
        f"{progress.skipped:,} skipped",
        f"{_rate(progress.requests_per_second)} requests/s",
        f"{_rate(progress.tokens_per_second)} tokens/s",
        f"{progress.in_flight:,} in flight of at most {progress.limit:,}",
        f"{_clock(progress.elapsed)} elapsed",
    ]
    if progress.eta is not None:
        parts.append(f"{_clock(progress.eta)} left")
    return ", ".join(parts)


def _something_came_of_it(end: End, summary: Summary) -> bool:
    return end != "failed" or summary.done + summary.failed > 0


def _rounded(progress: Progress) -> dict[str, object]:
    return {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in dataclasses.asdict(progress).items()
    }


def _ended(progress: Progress, end: End) -> Progress:
    """`progress`, with the total where that has not been found out in time, or cannot be before the end."""
    if end != "complete":
        return progress
    return dataclasses.replace(progress, total=_finished(progress), eta=0.0)


def _finished(progress: Progress) -> int:
    return progress.skipped + progress.done + progress.failed


def _percent(part: int, whole: int) -> str:
    return f"{100 * part // whole if whole else 100} %"  # rounded down: all is done at 100 %


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:,}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
