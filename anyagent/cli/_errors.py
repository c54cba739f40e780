"""How the command ends: its exit codes, and one line for each error that is no bug."""

from __future__ import annotations

import contextlib
import enum
from typing import TYPE_CHECKING, Final

from ..errors import AgentError, ConnectError, Disconnected, ProtocolError, SlowConsumerError
from ._display import Display, OutputClosed, OutputFailed
from ._signals import Signals, Terminated

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Aborted",
    "ExitCode",
    "Expired",
    "HandlerStuck",
    "NotListening",
    "NotWritten",
    "RowsFailed",
    "Stopped",
    "UsageError",
    "describe",
    "run",
]


class ExitCode(enum.IntEnum):
    """What the command tells its caller; those above 128 are what a shell reports for a signal."""

    DONE = 0
    AGENT_ERROR = 1
    USAGE = 2
    NOT_CONNECTED = 3
    DISCONNECTED = 4
    PROTOCOL = 5
    OUTPUT = 6
    ABORTED = 7
    TIMEOUT = 124
    INTERRUPTED = 130
    OUTPUT_CLOSED = 141
    TERMINATED = 143


class UsageError(Exception):
    """The command was given something that it cannot work with."""


class NotListening(Exception):
    """The address to serve an agent on cannot be had."""


class HandlerStuck(Exception):
    """An agent that was served did not end, because of its handler."""


class NotWritten(Exception):
    """A file of the command's could not be written."""


class Aborted(Exception):
    """A batch failed too often to be gone on with."""


class RowsFailed(Exception):
    """A batch is finished, and some of its prompts have failed."""


class Stopped(Exception):
    """A signal has stopped a batch, and all that is to be said has been; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


class Expired(Exception):
    """The answer was not complete in time."""


_FAILURES: Final[dict[type[Exception], tuple[ExitCode, str]]] = {
    AgentError: (ExitCode.AGENT_ERROR, "the agent answered with an error: "),
    HandlerStuck: (ExitCode.AGENT_ERROR, ""),
    RowsFailed: (ExitCode.AGENT_ERROR, ""),
    UsageError: (ExitCode.USAGE, ""),
    ConnectError: (ExitCode.NOT_CONNECTED, ""),
    NotListening: (ExitCode.NOT_CONNECTED, ""),
    Disconnected: (ExitCode.DISCONNECTED, ""),
    ProtocolError: (ExitCode.PROTOCOL, "the agent broke the protocol: "),
    OutputFailed: (ExitCode.OUTPUT, "the answer could not be written: "),
    NotWritten: (ExitCode.OUTPUT, ""),
    SlowConsumerError: (ExitCode.OUTPUT, "the answer was not taken as fast as it came: "),
    Aborted: (ExitCode.ABORTED, ""),
    Expired: (ExitCode.TIMEOUT, ""),
}


def describe(exc: Exception) -> str:
    """What `run` says about one of the errors that are no bugs."""
    return f"{_FAILURES[type(exc)][1]}{exc}"


def run(command: Callable[[Display, Signals], None], *, as_json: bool = False) -> ExitCode:
    """Run a command; return the code to exit with. An exception that is a bug passes through."""
    display = Display(as_json=as_json)
    try:
        with Signals(display.last_line) as signals:
            command(display, signals)
    except tuple(_FAILURES) as exc:
        with contextlib.suppress(OutputClosed, OutputFailed):
            display.end_line()
        display.note(describe(exc))
        code = _FAILURES[type(exc)][0]
    except OutputClosed:
        code = ExitCode.OUTPUT_CLOSED
    except Stopped as exc:
        code = ExitCode(128 + exc.number)
    except (KeyboardInterrupt, Terminated) as exc:
        display.interrupted()
        with contextlib.suppress(OutputClosed, OutputFailed):
            display.end_line(only_terminals=True)  # a pipe might not take even that
        code = ExitCode.TERMINATED if isinstance(exc, Terminated) else ExitCode.INTERRUPTED
    else:
        code = ExitCode.DONE
    finally:
        display.discard_unwritten()
    return code
