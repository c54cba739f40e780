"""What a batch shows of itself, piece by piece: the board on a terminal, lines, and lines of JSON."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import re
import struct
import sys
import termios
import threading
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from anyagent.batch._files.run import Progress
from anyagent.batch._metrics.metrics import Metrics
from anyagent.cli._batch_display import Board, JSONLines, Lines, View, board, view_for, watched
from anyagent.cli._display import Display

from .cli_runner import DEADLINE, Terminal
from .terminal_screen import Screen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

START = Progress(
    total=None,
    skipped=0,
    done=0,
    failed=0,
    retried=0,
    in_flight=0,
    limit=16,
    elapsed=0.0,
    eta=None,
    requests_per_second=0.0,
    tokens_per_second=0.0,
)
MIDDLE = Progress(
    total=10_000,
    skipped=100,
    done=4_200,
    failed=12,
    retried=40,
    in_flight=61,
    limit=64,
    elapsed=36.4,
    eta=48.6,
    requests_per_second=118.24,
    tokens_per_second=2_363.4,
)
END = dataclasses.replace(MIDDLE, done=9_888, in_flight=0, elapsed=3_725.0, eta=0.0)
SUMMARY = Metrics(0.0).summary(1.0)


def drawn(progress: Progress, width: int) -> list[str]:
    """The lines of a board, without styles."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    with console.capture() as capture:
        for line in board(progress, width):
            console.print(line, no_wrap=True, overflow="crop")
    return capture.get().splitlines()


class Standard:
    """A `Display` whose standard error is a pipe."""

    def __init__(self) -> None:
        self._data = io.BytesIO()
        stream = io.TextIOWrapper(self._data, "utf-8")
        with mock.patch.multiple(sys, stdout=None, stderr=stream):
            self.display = Display()
        self._stream = stream  # which would close the data

    @property
    def lines(self) -> list[str]:
        return self._data.getvalue().decode().splitlines()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as terminal:
        yield terminal


@pytest.fixture
def at_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> Iterator[Display]:
    """A `Display` whose standard error is `terminal`."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("LINES", raising=False)
    with terminal.open("w") as stderr:
        monkeypatch.setattr(sys, "stdin", None)
        monkeypatch.setattr(sys, "stdout", None)
        monkeypatch.setattr(sys, "stderr", stderr)
        yield Display()


def resize(terminal: Terminal, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def show_on(terminal: Terminal, act: Callable[[], None]) -> str:
    """What `act` shows."""
    before = len(terminal.shown())
    act()
    return terminal.shown()[before:]


# The board.


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (
            119,
            [
                "4,312 of 10,000 ... 43 %",
                "failed                    12   in flight                 61   tokens/s               2,363",
                "retried                   40   limit                     64   elapsed                 0:36",
                "skipped                  100   requests/s               118   left                    0:49",
            ],
        ),
        (
            79,
            [
                "4,312 of 10,000 ... 43 %",
                "failed                12   in flight             61   tokens/s           2,363",
                "retried               40   limit                 64   elapsed             0:36",
                "skipped              100   requests/s           118   left                0:49",
            ],
        ),
        (
            39,
            [
                "4,312 of 10,000 ... 43 %",
                "failed          12   requests/s     118",
                "retried         40   tokens/s     2,363",
                "skipped        100   elapsed       0:36",
                "in flight       61   left          0:49",
                "limit           64",
            ],
        ),
        (
            24,
            [
                "4,312 of 10,000 (43 %)",
                "failed                12",
                "retried               40",
                "skipped              100",
                "in flight             61",
                "limit                 64",
                "requests/s           118",
                "tokens/s           2,363",
                "elapsed             0:36",
                "left                0:49",
            ],
        ),
    ],
)
def test_the_board_has_as_many_columns_as_there_is_room_for(width: int, expected: list[str]) -> None:
    head, *rest = drawn(MIDDLE, width)
    assert [re.sub(" +━+[╸╺ ]*", " ... ", head), *rest] == expected
    assert len(head) == len(rest[0]) or width < 38


numbers = st.integers(0, 99_999)
figures = st.floats(0, 99_999)


@given(
    st.builds(
        Progress,
        total=st.none() | numbers,
        skipped=numbers,
        done=numbers,
        failed=numbers,
        retried=numbers,
        in_flight=numbers,
        limit=numbers,
        elapsed=figures,
        eta=st.none() | figures,
        requests_per_second=figures,
        tokens_per_second=figures,
    ),
    st.integers(1, 200),
)
def test_no_line_of_a_board_is_wider_than_asked_for(progress: Progress, width: int) -> None:
    lines = drawn(progress, width)
    assert max(map(len, lines)) <= width
    if width >= 38:
        for figure in (
            progress.failed,
            progress.retried,
            progress.skipped,
            progress.in_flight,
            progress.limit,
        ):
            assert f" {figure:,}" in "\n".join(lines)


def test_a_board_before_the_input_has_been_counted() -> None:
    assert drawn(START, 79) == [
        "0 rows so far",
        "failed                 0   in flight              0   tokens/s             0.0",
        "retried                0   limit                 16   elapsed             0:00",
        "skipped                0   requests/s           0.0   left                   -",
    ]


@pytest.mark.parametrize(
    ("total", "done", "expected"),
    [(0, 0, "0 of 0 .* 100 %"), (1000, 999, " 99 %"), (1000, 1000, " 100 %")],
)
def test_a_batch_is_at_100_percent_when_there_is_nothing_left(total: int, done: int, expected: str) -> None:
    head = drawn(dataclasses.replace(START, total=total, done=done), 39)[0]
    assert re.search(f"{expected}$", head)


def test_hours_are_shown_when_there_are_some() -> None:
    assert "1:02:05" in drawn(END, 79)[2]


def test_a_board_is_painted_over_itself_and_is_gone_in_the_end(
    terminal: Terminal, at_terminal: Display
) -> None:
    stages = iter([START, START, MIDDLE, END, END])
    view = Board(at_terminal, lambda: next(stages))
    seen = Screen(80)
    seen.feed(show_on(terminal, view.show))
    assert seen.lines == [*drawn(START, 79), ""]
    seen.feed(show_on(terminal, lambda: view.note("Attention\x1b[2J!")))
    assert seen.lines == ["anyagent: Attention␛[2J!", *drawn(START, 79), ""]
    seen.feed("^C")
    seen.feed(show_on(terminal, view.show))
    assert seen.lines == ["anyagent: Attention␛[2J!", *drawn(MIDDLE, 79), ""]
    seen.feed(show_on(terminal, view.show))
    assert seen.lines == ["anyagent: Attention␛[2J!", *drawn(END, 79), ""]
    seen.feed(show_on(terminal, view.close))
    assert seen.lines == ["anyagent: Attention␛[2J!", ""]
    seen.feed(show_on(terminal, lambda: view.conclude("complete", SUMMARY, Path("a\x07b"))))
    assert seen.lines == [
        "anyagent: Attention␛[2J!",
        "0 prompts in 1.00 s",
        "",
        "anyagent: the answers are in a␇b",
        "",
    ]
    assert seen.wrapped == []


@pytest.mark.parametrize(("rows", "columns"), [(24, 120), (24, 40), (3, 80), (1, 20)])
def test_a_board_fits_the_terminal(terminal: Terminal, at_terminal: Display, rows: int, columns: int) -> None:
    resize(terminal, rows, columns)
    view = Board(at_terminal, lambda: MIDDLE)
    seen = Screen(columns)
    for _ in range(2):
        seen.feed(show_on(terminal, view.show))
    assert seen.lines == [*drawn(MIDDLE, columns - 1)[: rows - 1], ""]
    assert seen.wrapped == []


def test_a_board_follows_the_size_of_the_terminal(terminal: Terminal, at_terminal: Display) -> None:
    view = Board(at_terminal, lambda: MIDDLE)
    seen = Screen(120)
    seen.feed(show_on(terminal, view.show))
    resize(terminal, 24, 120)
    seen.feed(show_on(terminal, view.show))
    assert seen.lines == [*drawn(MIDDLE, 119), ""]


def test_a_board_needs_no_utf8(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with terminal.open("w", encoding="ascii") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        view = Board(Display(), lambda: MIDDLE)
        shown = show_on(terminal, view.show)
    assert "?" not in shown
    assert "-----" in shown


# Lines.


def test_a_line_of_text() -> None:
    standard = Standard()
    view = Lines(standard.display, lambda: MIDDLE)
    view.show()
    view.note("Attention!")
    view.close()
    assert standard.lines == [
        "anyagent: 4,312 of 10,000 (43 %), 12 failed, 40 retried, 100 skipped, 118 requests/s, "
        "2,363 tokens/s, 61 in flight of at most 64, 0:36 elapsed, 0:49 left",
        "anyagent: Attention!",
    ]


def test_a_line_of_text_before_anything_is_known() -> None:
    standard = Standard()
    Lines(standard.display, lambda: START).show()
    assert standard.lines == [
        "anyagent: 0 rows so far, 0 failed, 0 retried, 0 skipped, 0.0 requests/s, 0.0 tokens/s, "
        "0 in flight of at most 16, 0:00 elapsed",
    ]


def test_lines_end_with_where_the_batch_is_and_how_to_go_on() -> None:
    standard = Standard()
    Lines(standard.display, lambda: MIDDLE).conclude("stopped", SUMMARY, Path("answers.jsonl"))
    assert standard.lines[0].startswith("anyagent: 4,312 of 10,000 (43 %), ")
    assert standard.lines[1:] == [
        "0 prompts in 1.00 s",
        "",
        "anyagent: the answers are in answers.jsonl",
        "anyagent: the same command goes on where this one stopped",
    ]


@pytest.mark.parametrize("kind", [Lines, JSONLines])
def test_in_the_end_the_total_is_known_also_if_it_was_not_before(kind: type[View]) -> None:
    standard = Standard()
    kind(standard.display, lambda: dataclasses.replace(START, done=3)).conclude("complete", SUMMARY, None)
    assert re.search(r"3 of 3 \(100 %\).*0:00 left|\"total\":3,.*\"eta\":0.0", standard.lines[0])


def test_nothing_is_said_about_a_file_where_there_is_none() -> None:
    standard = Standard()
    Lines(standard.display, lambda: MIDDLE).conclude("stopped", SUMMARY, None)
    assert standard.lines[1:] == ["0 prompts in 1.00 s", ""]


def test_where_nothing_came_of_it_the_reason_is_enough() -> None:
    standard = Standard()
    Lines(standard.display, lambda: START).conclude("failed", SUMMARY, Path("answers.jsonl"))
    assert standard.lines == []


# Lines of JSON.


def test_lines_of_json() -> None:
    standard = Standard()
    view = JSONLines(standard.display, lambda: MIDDLE)
    view.show()
    view.close()
    view.conclude("stopped", SUMMARY, Path("answers.jsonl"))
    progress, end = map(json.loads, standard.lines)
    figures = dataclasses.asdict(MIDDLE)
    assert progress == {"event": "progress"} | figures
    summary = end.pop("summary")
    assert end == {"event": "end", "outcome": "stopped"} | figures
    assert (summary["done"], summary["elapsed_seconds"]) == (0, 1.0)


def test_figures_are_rounded_in_json() -> None:
    standard = Standard()
    JSONLines(standard.display, lambda: dataclasses.replace(MIDDLE, elapsed=1.23456)).show()
    assert json.loads(standard.lines[0])["elapsed"] == 1.235


def test_notes_are_told_from_json_by_how_they_begin() -> None:
    standard = Standard()
    JSONLines(standard.display, lambda: MIDDLE).note("Attention!")
    assert standard.lines == ["anyagent: Attention!"]


def test_control_characters_in_json_are_escaped_on_a_terminal(
    terminal: Terminal, at_terminal: Display
) -> None:
    shown = show_on(terminal, lambda: at_terminal.json_note({"a": "\x9b31m\u202e\x1b"}))
    assert shown == '{"a":"\\u009b31m\\u202e\\u001b"}\r\n'


# Quiet, and the choice.


def test_a_quiet_view_shows_notes_only() -> None:
    standard = Standard()
    view = View(standard.display, lambda: MIDDLE)
    view.show()
    view.note("Attention!")
    view.close()
    view.conclude("stopped", SUMMARY, Path("answers.jsonl"))
    assert standard.lines == ["anyagent: Attention!"]


def test_a_terminal_gets_a_board_and_anything_else_lines(
    terminal: Terminal, at_terminal: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert view_for(at_terminal, quiet=False, as_json=False) is Board
    assert view_for(at_terminal, quiet=True, as_json=False) is View
    assert view_for(at_terminal, quiet=False, as_json=True) is JSONLines
    assert view_for(Standard().display, quiet=False, as_json=False) is Lines
    monkeypatch.setenv("TERM", "dumb")
    assert view_for(at_terminal, quiet=False, as_json=False) is Lines


# The thread.


class Recorder(View):
    """Knows how often it was asked to show something, and in which threads."""

    first = every = 0.0

    def __init__(self, enough: int) -> None:
        self.threads: set[threading.Thread] = set()
        self.often_enough = threading.Event()
        self.shown = 0
        self.closed = False
        self._enough = enough

    def show(self) -> None:
        self.shown += 1
        self.threads.add(threading.current_thread())
        if self.shown == self._enough:
            self.often_enough.set()

    def close(self) -> None:
        self.closed = True


def test_a_view_is_shown_again_and_again_by_a_thread_of_its_own() -> None:
    view = Recorder(3)
    with watched(view):
        assert view.often_enough.wait(DEADLINE)
        assert not view.closed
    (thread,) = view.threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()
    assert view.closed


def test_a_view_that_is_not_due_yet_is_not_shown() -> None:
    class Patient(Recorder):
        first = DEADLINE

    view = Patient(1)
    with watched(view):
        pass
    assert (view.shown, view.closed) == (0, True)


def test_a_terminal_that_is_stopped_does_not_hold_up_what_goes_on(
    terminal: Terminal, at_terminal: Display
) -> None:
    drawn_once = threading.Event()

    def progress() -> Progress:
        drawn_once.set()
        return MIDDLE

    termios.tcflow(terminal.slave, termios.TCOOFF)  # as Ctrl-S does
    with watched(Board(at_terminal, progress)):
        assert drawn_once.wait(DEADLINE)
        at_terminal.last_line()  # nor does this wait
        termios.tcflow(terminal.slave, termios.TCOON)
        terminal.wait_for("4,312 of 10,000")


# The last line of a process that is ended by a second signal.


def test_the_last_line_ends_the_one_that_a_terminal_has_begun(
    terminal: Terminal, at_terminal: Display
) -> None:
    assert show_on(terminal, at_terminal.last_line) == "\r\n"


def test_there_is_no_last_line_where_there_is_no_terminal() -> None:
    standard = Standard()
    standard.display.last_line()
    assert standard.lines == []


def test_the_last_line_never_fails(terminal: Terminal) -> None:
    with terminal.open("w") as stderr, mock.patch.object(sys, "stderr", stderr):
        display = Display()
    display.last_line()
    assert terminal.shown() == ""


def test_without_a_terminal_the_size_is_that_of_most() -> None:
    with mock.patch.multiple(sys, stdout=None, stderr=None):
        assert Display().size() == (80, 24)
    assert Standard().display.size() == (80, 24)


# What is printed on standard output.


def test_a_page_is_harmless_on_a_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal.open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        display = Display()
        assert display.answers_on_terminal
        display.page("a\x1b[2J\nb\n")
    assert terminal.shown() == "a␛[2J\r\nb\r\n"
