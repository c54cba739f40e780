"""Runs the command: in this process, in a process of its own, and either way also at a terminal."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import io
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TextIO
from unittest import mock

import anyio.to_thread
import pytest

from anyagent.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from anyagent import im
    from anyagent.testing import AgentReply

DEADLINE = 20.0

BACKENDS = ("asyncio", "trio")

_START = """
import fcntl, runpy, sys, termios
if sys.stdin.isatty():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that the keys Ctrl-C and Ctrl-Z are signals
sys.argv[0] = "anyagent"
runpy.run_module("anyagent", run_name="__main__")
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: object
    out: str
    err: str


def run(*arguments: str, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> Outcome:
    """Run the command in this process, with pipes for standard streams."""
    out, err = _TextBuffer(), _TextBuffer()
    code = run_with(*arguments, stdin=_TextBuffer(stdin), stdout=out, stderr=err, env=env)
    return Outcome(code, out.text, err.text)


def run_with(
    *arguments: str,
    stdin: TextIO | None,
    stdout: TextIO | None,
    stderr: TextIO | None,
    env: Mapping[str, str] | None = None,
) -> object:
    """Run the command in this process and return its exit code. Its environment is `env` and little else."""
    environment = {
        "PATH": os.environ["PATH"],
        "TERM": "xterm-256color",
        "COLUMNS": "80",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # a terminal of a test does not answer it
        **(env or {}),
    }
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        mock.patch.multiple(sys, stdin=stdin, stdout=stdout, stderr=stderr),
        _deadline(),
        pytest.raises(SystemExit) as excinfo,
    ):
        main(arguments)
    return excinfo.value.code


@contextlib.contextmanager
def someone(act: Callable[[], object]) -> Iterator[None]:
    """Let `act` run in a thread beside the block; what it raises comes out."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act)
        try:
            yield
        finally:
            acting.result(DEADLINE)


def send_signal(number: signal.Signals) -> None:
    """Send a signal to this process, as a Ctrl-C in the shell or a `kill` does."""
    signal.pthread_kill(threading.main_thread().ident or 0, number)


class Terminal:
    """A terminal of 24 lines and 80 columns, and the person at it."""

    def __init__(self) -> None:
        self._master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self._seen = ""
        self._read_to = 0
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Terminal:
        self._reader.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self.slave)
        self._reader.join(DEADLINE)
        os.close(self._master)

    def settings(self) -> object:
        return termios.tcgetattr(self.slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> None:
        """Wait until `text` is shown, after what was waited for before."""
        with self._changed:
            if not self._changed.wait_for(lambda: text in self._seen[self._read_to :], DEADLINE / 2):
                raise TimeoutError(f"{text!r} is not in {self._seen[self._read_to :]!r}")
            self._read_to = self._seen.index(text, self._read_to) + len(text)

    def shown(self) -> str:
        """All that has been shown, once it has really arrived."""
        os.write(self.slave, b"\x00")  # which nothing else writes: it would be seen as a picture
        self.wait_for("\x00")
        return self._seen[: self._read_to - 1].replace("\x00", "")

    def open(self, mode: Literal["r", "w"], encoding: str = "utf-8") -> TextIO:
        """A standard stream that is this terminal."""
        return os.fdopen(self.slave, mode, closefd=False, encoding=encoding)

    def run(self, *arguments: str, env: Mapping[str, str] | None = None) -> object:
        """Run the command in this process, with this terminal for standard streams."""
        with self.open("r") as stdin, self.open("w") as stdout, self.open("w") as stderr:
            return run_with(*arguments, stdin=stdin, stdout=stdout, stderr=stderr, env=env)

    def _read(self) -> None:
        data = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while True:
                data += os.read(self._master, 65536)
                with self._changed:
                    self._seen = data.decode(errors="replace")
                    self._changed.notify_all()


@contextlib.contextmanager
def started(
    *arguments: str, terminal: Terminal | None = None, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the command, at a terminal or with (unbuffered) pipes.

    It is killed if the block leaves it behind.
    """
    streams: Any = subprocess.PIPE if terminal is None else terminal.slave
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANYAGENT_")}
    environment |= {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", _START, *arguments],
        stdin=streams,
        stdout=streams,
        stderr=streams,
        bufsize=0,
        env=environment,
        start_new_session=True,
        **options,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def exit_code(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process to end. With a thread or an event loop left over, it would not."""
    return process.wait(DEADLINE)


class Gate:
    """Closed until `open` is called, from any thread; a handler waits for it with `passed`."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def open(self) -> None:
        self._event.set()

    async def passed(self) -> None:
        if not await anyio.to_thread.run_sync(self._event.wait, DEADLINE):
            raise TimeoutError


async def hang_after_a_chunk(message: im.UserMessage, reply: AgentReply) -> None:
    """Answers "again" and "more" with a whole answer, anything else with the beginning of one."""
    if message.text in ("again", "more"):
        await reply.text(f"whole {message.text}")
        return
    await reply.text("begun")
    await reply.hang()


class _TextBuffer(io.TextIOWrapper):
    def __init__(self, data: bytes = b"") -> None:
        self._bytes = io.BytesIO(data)
        super().__init__(self._bytes, "utf-8")

    @property
    def text(self) -> str:
        return self._bytes.getvalue().decode()


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    def expire(*_: object) -> NoReturn:
        raise TimeoutError("the command did not end")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
