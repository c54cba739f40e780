"""``anyagent chat``: a conversation, in the terminal's line editor or read from a pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import uuid
from functools import partial
from typing import TYPE_CHECKING

from anyio.from_thread import start_blocking_portal

from ..errors import AgentError
from ._ask import decode
from ._errors import UsageError, describe
from ._relay import relay, send_answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TextIO

    from ._connection import Connection
    from ._display import Display
    from ._signals import Signals

__all__ = ["chat"]


def chat(connection: Connection, history: Path | None, display: Display, signals: Signals) -> None:
    """Ask whatever is entered, until the end of the input; `history` is a file for the editor.

    Raises what can go wrong, as `_errors.run` expects it. A SIGINT stops an answer; without an editor, one
    that arrives between answers is raised.
    """
    editor = _is_terminal(sys.stdin) and (_is_terminal(sys.stdout) or _is_terminal(sys.stderr))
    read_line = _open_editor(history, display, signals) if editor else partial(_read_plain_line, signals)
    with contextlib.ExitStack() as stack:
        if editor:
            _restore_terminal(stack)
        served = stack.enter_context(connection.served(display))
        portal = stack.enter_context(start_blocking_portal(served.backend))
        opening = portal.wrap_async_context_manager(served.open())
        with signals.raised():
            agent = opening.__enter__()  # if interrupted, it is cancelled with the portal
        stack.callback(opening.__exit__, None, None, None)  # what a signal raises would end the event loop
        answer = partial(send_answer, agent, conversation=uuid.uuid4().hex)
        if editor:
            display.hint("connected. Ctrl-C stops an answer, Ctrl-D leaves")
        while (line := read_line()) is not None:
            if not line.strip():
                continue
            try:
                relay(portal, signals, partial(answer, line), display.event)
            except KeyboardInterrupt:
                signals.forget_interrupt()
                display.interrupted()
                display.end_line()
                display.note("stopped")
            except AgentError as exc:
                display.note(describe(exc))


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _restore_terminal(stack: contextlib.ExitStack) -> None:
    """See to it that the terminal is left as it is: a signal may hit the editor while it changes settings."""
    with contextlib.suppress(ImportError):  # on Windows
        import termios

        stack.callback(termios.tcsetattr, sys.stdin, termios.TCSANOW, termios.tcgetattr(sys.stdin))


def _read_plain_line(signals: Signals) -> str | None:
    """The next line of standard input; ``None`` at its end."""
    with signals.raised():
        data = b"" if sys.stdin is None else sys.stdin.buffer.readline()
    return decode(data).rstrip("\r\n") if data else None


def _open_editor(history: Path | None, display: Display, signals: Signals) -> Callable[[], str | None]:
    """A function that has a line edited; ``None`` is the wish to leave."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.input import create_input
    from prompt_toolkit.output import create_output

    if history is not None:
        try:  # prompts are nobody else's business
            os.close(os.open(history, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        except OSError as exc:
            raise UsageError(f"--history {history}: {exc.strerror}") from exc
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory() if history is None else FileHistory(history),
        input=create_input(),
        output=create_output(always_prefer_tty=True),
    )

    def read_line() -> str | None:
        while True:
            try:
                with signals.raised([signal.SIGTERM]):  # the editor takes SIGINT over while it runs
                    return session.prompt("> ")
            except KeyboardInterrupt:
                display.hint("Ctrl-D leaves")
            except EOFError:
                return None
            finally:
                signals.forget_interrupt()

    return read_line
