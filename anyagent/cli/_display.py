"""What the command shows: answers on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
from typing import TYPE_CHECKING, Final, cast

import msgspec
from rich.console import Console
from rich.text import Text

from .. import om

if TYPE_CHECKING:
    from typing import TextIO

__all__ = ["Display", "OutputClosed", "OutputFailed"]

_MOMENT: Final = 0.1  # seconds
_REORDERING: Final = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # makes text read as what it is not
_PICTURES: Final = (
    {code: 0x2400 + code for code in range(0x20)}
    | {0x7F: 0x2421}
    | dict.fromkeys((*range(0x80, 0xA0), *_REORDERING), 0xFFFD)
)
_PICTURES_IN_TEXT: Final = {code: _PICTURES[code] for code in _PICTURES if chr(code) not in "\n\t"}
_CONTROL_IN_JSON: Final = re.compile(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # JSON escapes the rest


class OutputClosed(Exception):
    """Nobody reads standard output any more."""


class OutputFailed(Exception):
    """Standard output cannot be written, for the reason that is its text."""


class Display:
    """The two standard streams of one run of the command.

    What comes from an agent may hold control characters, with which a terminal can be told to do things.
    So a terminal is shown pictures of them, where a file or pipe gets the text unchanged.

    With `as_json`, standard output gets every event as a line of JSON. Standard error never fails.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self._as_json = as_json
        self._out = _Stream(sys.stdout)
        self._err = _Stream(sys.stderr)
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    def event(self, event: om.AgentEvent) -> None:
        """Show an event of an answer, or its terminal. What an `om.Error` says is for `note` to show.

        Raises `OutputClosed` or `OutputFailed`.
        """
        if self._as_json:
            self._json(event)
            if isinstance(event, om.EventToolCall):
                self._tool_call(event)
            return
        match event:
            case om.EventTextChunk(text=text):
                self._text(text)
            case om.EventReasoningChunk(text=text):
                self._aside(text)
            case om.EventToolCall():
                self._tool_call(event)
            case om.Error():
                self.end_line()
            case om.EventEnd():
                self.end_line()
                if event.status != "completed":
                    self.note(f"the agent says that its answer is {event.status}")
                self._aside(f"[{event.tokens_used} token{'s' if event.tokens_used != 1 else ''}]\n")

    def note(self, text: str) -> None:
        """Say something in a line of its own on standard error; a terminal's line is ended for it."""
        with contextlib.suppress(OutputClosed, OutputFailed):
            self.end_line(only_terminals=True)
        if self._err.terminal:
            text = text.translate(_PICTURES)  # one line, whatever the agent would make of it
        self._complain(f"anyagent: {text}\n")

    def block(self, text: str) -> None:
        """Say several lines on standard error."""
        self._complain(text.translate(_PICTURES_IN_TEXT) if self._err.terminal else text)

    def json_note(self, data: object) -> None:
        """Say something as a line of JSON on standard error."""
        self._complain(_json_line(msgspec.json.encode(data), self._err))

    def paint(self, text: str) -> None:
        """Write harmless text, control sequences and all, to a terminal that is standard error.

        It ends at the beginning of a line.
        """
        self._complain(text)
        for stream in (self._out, self._err):
            stream.mid_line &= not stream.terminal

    def size(self) -> os.terminal_size:
        """Columns and lines of the terminal that is standard error."""
        return self._err.size()

    @property
    def paintable(self) -> bool:
        """Whether standard error is a terminal whose cursor can be moved."""
        return self._err.terminal and os.environ.get("TERM", "dumb") != "dumb"

    @property
    def answers_on_terminal(self) -> bool:
        """Whether standard output is a terminal."""
        return self._out.terminal

    def page(self, text: str) -> None:
        """Print several lines on standard output. Raises `OutputClosed` or `OutputFailed`."""
        self._out.write(text.translate(_PICTURES_IN_TEXT) if self._out.terminal else text)

    def line(self, text: str) -> None:
        """Print a line on standard output. Raises `OutputClosed` or `OutputFailed`."""
        self._out.write(text + "\n")

    def hint(self, text: str) -> None:
        """A note for a person, left out where standard error is no terminal."""
        if self._err.terminal:
            self.note(text)

    def end_line(self, *, only_terminals: bool = False) -> None:
        """Begin a new line wherever the last one was left open. Raises `OutputClosed` or `OutputFailed`."""
        if self._out.mid_line and (self._out.terminal or not only_terminals):
            self._out.write("\n")
            if self._out.terminal:
                self._err.mid_line = False
        if self._err.mid_line:
            self._complain("\n")

    def interrupted(self) -> None:
        """The terminal may have echoed a Ctrl-C, and so be in the middle of a line."""
        for stream in (self._out, self._err):
            stream.mid_line |= stream.terminal

    def last_line(self) -> None:
        """End the line in which a terminal has echoed a Ctrl-C; for a signal handler that ends the process.

        It neither waits nor uses what the code that it interrupts may be using.
        """
        with contextlib.suppress(OSError, ValueError):
            self._err.write_now(b"\n")

    def discard_unwritten(self) -> None:
        """Give up what a stream did not take, or the interpreter would try again when it exits."""
        self._out.discard_unwritten()
        self._err.discard_unwritten()

    def _json(self, event: om.AgentEvent) -> None:
        data = om.encode(cast("om.ServerMessage", event))
        data = msgspec.json.format(data, indent=-1)  # an Unknown's may be of many lines
        self._out.write(_json_line(data, self._out))

    def _text(self, text: str) -> None:
        if self._err.mid_line and self._out.terminal:
            self._complain("\n")
        self._out.write(text.translate(_PICTURES_IN_TEXT) if self._out.terminal else text)

    def _aside(self, text: str) -> None:
        """Text for a person, dim; left out where standard error is no terminal."""
        if not (text and self._err.terminal):
            return
        if self._out.terminal and self._out.mid_line:
            self._complain("\n")
            self._out.mid_line = False
        with contextlib.suppress(OSError):
            self._console.print(Text(text.translate(_PICTURES_IN_TEXT), style="dim"), end="")
        self._err.mid_line = not text.endswith("\n")

    def _tool_call(self, call: om.EventToolCall) -> None:
        self.note(f"the agent called the tool {call.name}, and was told that there are none")

    def _complain(self, text: str) -> None:
        with contextlib.suppress(OutputClosed, OutputFailed):
            self._err.write(text)


def _json_line(data: bytes, stream: _Stream) -> str:
    line = data.decode() + "\n"
    if stream.terminal:
        line = _CONTROL_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", line)
    return line


class _Stream:
    """A standard stream, or ``None`` where the process was started without it.

    `mid_line`: the last thing written did not end its line.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._unwritten = False
        self.terminal = stream is not None and stream.isatty()
        self.mid_line = False

    def write(self, text: str) -> None:
        """Write all of `text`: to a terminal in its encoding, to anything else in UTF-8."""
        if self._stream is None:
            raise OutputClosed
        if not text:
            return
        encoding = self._stream.encoding if self.terminal else "utf-8"
        self._unwritten = self.mid_line = True  # as far as is known if this is interrupted
        try:
            self._stream.buffer.write(text.encode(encoding, "replace"))
            self._stream.buffer.flush()
        except BrokenPipeError:
            raise OutputClosed from None
        except OSError as exc:
            raise OutputFailed(exc.strerror) from exc
        self._unwritten = False
        self.mid_line = not text.endswith("\n")

    def size(self) -> os.terminal_size:
        """Columns and lines, as far as this is a terminal that knows."""
        columns = lines = 0
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                columns, lines = os.get_terminal_size(self._stream.fileno())
        return os.terminal_size((columns or 80, lines or 24))

    def write_now(self, data: bytes) -> None:
        """Write beneath all buffers, if this is a terminal that takes something within a moment."""
        if self._stream is not None and self.terminal:
            file = self._stream.fileno()
            if select.select([], [file], [], _MOMENT)[1]:
                os.write(file, data)

    def discard_unwritten(self) -> None:
        if self._unwritten and self._stream is not None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
