"""``anyagent serve``, run in this process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest

from anyagent.testing import EmbeddedAgent, embedded_agent

from .cli_runner import Terminal, run, run_with, send_signal, someone, started
from .raw_client import connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HANDLERS = """
async def shout(message, reply):
    await reply.text(message.text.upper())

async def fail(message, reply):
    raise ValueError(message.text)

def plain(message, reply):
    pass

ANSWER = 42
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module with handlers in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "handlers_of_a_test.py").write_text(HANDLERS)
    yield "handlers_of_a_test"
    sys.modules.pop("handlers_of_a_test", None)


class Served:
    """Runs ``anyagent serve`` until `number` is sent, and meanwhile sends one prompt."""

    def __init__(
        self, *arguments: str, prompt: str = "Hello!", number: signal.Signals = signal.SIGINT
    ) -> None:
        reader, writer = os.pipe()
        self._prompt, self._number = prompt, number
        with open(reader) as self._stdout, Terminal() as terminal, someone(self._ask):
            with open(writer, "w") as stdout, terminal.open("w") as stderr:
                self.code = run_with("serve", *arguments, stdin=None, stdout=stdout, stderr=stderr)
            self.shown = terminal.shown()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])))

    def _ask(self) -> None:
        try:
            self.url = self._stdout.readline().strip()
            with connect(self.url) as client:
                client.prompt(self._prompt, id="a")
                self.answer = client.receive_answer()
        finally:
            send_signal(self._number)
        self.rest = self._stdout.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_echo_is_served_until_a_signal_stops_it(number: signal.Signals) -> None:
    served = Served("--port", "0", number=number)
    assert served.url.startswith("ws://127.0.0.1:")
    assert [event.get("text") for event in served.answer] == ["Hello!", None]
    assert [event.get("id") for event in served.answer] == ["a", "a"]
    assert served.shown == (
        "anyagent: Ctrl-C stops the agent\r\n"
        "\r\nanyagent: stopping. Another Ctrl-C does not wait for the handlers\r\n"
    )
    assert (served.code, served.rest) == (0, "")


def test_the_single_wire_has_no_ids() -> None:
    served = Served("--port", "0", "--wire", "single")
    assert [event.get("id") for event in served.answer] == [None, None]


def test_a_handler_is_imported_from_the_current_directory(module: str) -> None:
    served = Served(f"{module}:shout", "--port", "0")
    assert served.answer[0]["text"] == "HELLO!"


def test_an_exception_in_a_handler_is_shown_harmlessly_and_the_client_told_its_type(module: str) -> None:
    served = Served(f"{module}:fail", "--port", "0", prompt="\x1b[2J")
    assert served.answer == [{"type": "ERROR", "code": "internal_error", "details": "ValueError", "id": "a"}]
    assert "Traceback" in served.shown
    assert "\r\nValueError: ␛[2J\r\n" in served.shown


def test_an_exception_in_a_handler_reaches_a_pipe_unchanged(module: str) -> None:
    with started("serve", f"{module}:fail", "--port", "0") as process:
        assert process.stdout is not None
        with connect(process.stdout.readline().decode().strip()) as client:
            client.prompt("\x1b[2J", id="a")
            client.receive_answer()
        process.terminate()
        _, err = process.communicate()
    assert err.endswith(b"\nValueError: \x1b[2J\n")


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        ("{}", "the handler must be given as MODULE:HANDLER"),
        ("{}:", "the handler must be given as MODULE:HANDLER"),
        (":shout", "the handler must be given as MODULE:HANDLER"),
        (".{}:shout", "the handler must be given as MODULE:HANDLER"),
        ("{}:shout:shout", "the handler must be given as MODULE:HANDLER"),
        ("no_such_module:shout", "cannot import no_such_module: No module named 'no_such_module'"),
        ("{}:whisper", "{} has no whisper"),
        ("{}:plain", "{}:plain is not an async function"),
        ("{}:ANSWER", "{}:ANSWER is not an async function"),
    ],
)
def test_a_handler_that_cannot_be_used_is_exit_code_2(module: str, handler: str, error: str) -> None:
    outcome = run("serve", handler.format(module), "--port", "0")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"anyagent: {error.format(module)}\n")


def test_an_import_that_the_module_cannot_do_is_exit_code_2(module: str, tmp_path: Path) -> None:
    (tmp_path / "handlers_of_a_test.py").write_text("import no_such_module")
    outcome = run("serve", f"{module}:shout", "--port", "0")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"anyagent: cannot import {module}: No module named 'no_such_module'\n"


def test_any_other_error_in_the_module_comes_out_as_itself(module: str, tmp_path: Path) -> None:
    (tmp_path / "handlers_of_a_test.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        run("serve", f"{module}:shout", "--port", "0")


def test_a_port_in_use_is_exit_code_3() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        outcome = run("serve", "--port", str(port))
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err == f"anyagent: cannot listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "192.0.2.1"])
def test_an_address_that_cannot_be_had_is_exit_code_3(host: str) -> None:
    outcome = run("serve", "--host", host, "--port", "0")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err.startswith(f"anyagent: cannot listen on {host}:0: ")
    assert outcome.err.count("\n") == 1


def test_a_handler_that_does_not_end_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def stubborn_agent(*args: Any, **options: Any) -> Iterator[EmbeddedAgent]:
        with embedded_agent(*args, **options) as agent:
            yield agent
        raise RuntimeError("a handler did not end")

    monkeypatch.setattr("anyagent.cli._serve.embedded_agent", stubborn_agent)
    served = Served("--port", "0")
    assert served.code == 1
    assert served.shown.endswith("handlers\r\nanyagent: a handler did not end\r\n")


def test_a_port_out_of_range_is_exit_code_2() -> None:
    assert run("serve", "--port", "65536").code == 2
