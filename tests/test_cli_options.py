"""What is common to the commands of ``anyagent``: options, help, secrets, and how signals are taken."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from websockets.sync.server import serve

from anyagent import om
from anyagent.cli import main
from anyagent.cli._connection import Connection
from anyagent.cli._signals import Signals, Terminated
from anyagent.testing import embedded_agent

from .cli_runner import BACKENDS, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from websockets.sync.server import ServerConnection

TOKEN = "s3cr3t"


class Headers:
    """An agent that answers every prompt with a terminal; `seen` is the handshakes' headers."""

    authority = ""

    def __init__(self) -> None:
        self.seen: list[list[tuple[str, str]]] = []

    @property
    def url(self) -> str:
        return f"ws://{self.authority}/"

    def values(self, name: str) -> list[str]:
        (headers,) = self.seen
        return [value for key, value in headers if key.lower() == name]

    def serve_connection(self, websocket: ServerConnection) -> None:
        assert websocket.request is not None
        self.seen.append(list(websocket.request.headers.raw_items()))
        websocket.send(om.encode(om.Status("ready")).decode())
        for _ in websocket:
            websocket.send(om.encode(om.EventEnd(tokens_used=0)).decode())


@pytest.fixture
def headers() -> Iterator[Headers]:
    headers = Headers()
    with serve(headers.serve_connection, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        headers.authority = f"127.0.0.1:{server.socket.getsockname()[1]}"
        yield headers
        server.shutdown()
    thread.join()


# The connection.


@pytest.mark.parametrize("backend", BACKENDS)
def test_headers_are_sent_in_order_and_may_be_repeated(headers: Headers, backend: str) -> None:
    options = ["--header", "X-One: a:b ", "--header", "X-Two:", "--header", "X-One:c"]
    assert run("ask", "--url", headers.url, "--backend", backend, *options, "Hello!").code == 0
    assert headers.values("x-one") == ["a:b", "c"]
    assert headers.values("x-two") == [""]


@pytest.mark.parametrize("command", [["ask", "Hello!"], ["chat"]])
def test_url_and_token_are_taken_from_the_environment(headers: Headers, command: list[str]) -> None:
    outcome = run(*command, env={"ANYAGENT_URL": headers.url, "ANYAGENT_TOKEN": f"{TOKEN}\n"})
    assert (outcome.code, outcome.err) == (0, "")
    assert headers.values("authorization") == [f"Bearer {TOKEN}"]


def test_the_option_beats_the_url_of_the_environment(headers: Headers) -> None:
    assert run("ask", "--url", headers.url, "Hello!", env={"ANYAGENT_URL": "ws://x.invalid"}).code == 0


@pytest.mark.parametrize("name", ["Authorization", "authorization"])
def test_an_explicit_header_beats_the_token_of_the_environment(headers: Headers, name: str) -> None:
    run("ask", "--url", headers.url, "--header", f"{name}: Mine", "x", env={"ANYAGENT_TOKEN": TOKEN})
    assert headers.values("authorization") == ["Mine"]


def test_userinfo_in_the_url_beats_the_token_of_the_environment(headers: Headers) -> None:
    outcome = run("ask", "--url", f"ws://a:b@{headers.authority}", "x", env={"ANYAGENT_TOKEN": TOKEN})
    assert (outcome.code, headers.values("authorization")) == (0, ["Basic YTpi"])


@pytest.mark.parametrize("token", ["", "  "])
def test_an_empty_token_is_none(headers: Headers, token: str) -> None:
    run("ask", "--url", headers.url, "x", env={"ANYAGENT_TOKEN": token})
    assert headers.values("authorization") == []


def test_the_dialect_is_negotiated_unless_it_is_given() -> None:
    with embedded_agent() as agent:
        for options in ([], ["--dialect", "native"], ["--dialect", "single"]):
            run("ask", "--url", agent.url, *options, "x")
        assert [message.id for message in agent.received] == ["1", "1", None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_is_the_one_asked_for(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sniffio

    seen: list[str] = []
    original = Connection.open

    def spy(connection: Connection) -> Any:
        seen.append(sniffio.current_async_library())
        return original(connection)

    monkeypatch.setattr(Connection, "open", spy)
    run("ask", "--backend", backend, "x")
    assert seen == [backend]


# Secrets.


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_the_help_names_the_variables_and_never_their_values(command: str) -> None:
    outcome = run(command, "--help", env={"ANYAGENT_URL": f"wss://x/?{TOKEN}", "ANYAGENT_TOKEN": TOKEN})
    assert "ANYAGENT_TOKEN" in outcome.out
    assert "ANYAGENT_URL" in outcome.out
    assert TOKEN not in outcome.out


@pytest.mark.parametrize(
    ("options", "env"),
    [
        (["--url", f"ws://user:{TOKEN}@127.0.0.1:{{port}}/{TOKEN}?{TOKEN}"], {}),
        (["--url", f"http://user:{TOKEN}@127.0.0.1:{{port}}/{TOKEN}?{TOKEN}"], {}),
        (["--url", f"ws://user:{TOKEN}@127.0.0.1:99999/{TOKEN}?{TOKEN}"], {}),
        (["--url", "ws://127.0.0.1:{port}", "--header", f"Authorization: {TOKEN}"], {}),
        (["--url", "ws://127.0.0.1:{port}", "--header", f"Authorization: {TOKEN}\x07{TOKEN}"], {}),
        (["--url", "ws://127.0.0.1:{port}", "--header", TOKEN], {}),
        (["--url", "ws://127.0.0.1:{port}"], {"ANYAGENT_TOKEN": TOKEN}),
        (["--url", "ws://127.0.0.1:{port}"], {"ANYAGENT_TOKEN": f"{TOKEN}\x07{TOKEN}"}),
        (["--backend", "none"], {"ANYAGENT_TOKEN": TOKEN, "ANYAGENT_URL": f"ws://x/?{TOKEN}"}),
    ],
)
def test_no_error_shows_a_secret(options: list[str], env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    outcome = run("ask", *(option.format(port=port) for option in options), "x", env=env)
    assert outcome.code in (2, 3)
    assert outcome.err != ""
    assert TOKEN not in outcome.err


def test_the_options_show_no_secret_in_their_repr() -> None:
    connection = Connection.parse(f"ws://x/?{TOKEN}", [f"X: {TOKEN}"], None, "trio")
    assert repr(connection) == "Connection(dialect=None, backend='trio')"


# Help and version.


@pytest.mark.parametrize("command", [[], ["ask"], ["chat"], ["serve"]])
def test_the_help_fits_80_columns_and_has_examples(command: list[str]) -> None:
    outcome = run(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert ".." not in outcome.out.replace("[ARGS]...", "").partition("Examples")[0]  # nothing is cut short
    assert "  anyagent " in outcome.out.partition("Examples:\n")[2]


@pytest.mark.parametrize("command", ["ask", "chat", "serve"])
def test_the_help_lists_the_exit_codes(command: str) -> None:
    codes = re.findall(r"^    (\d+) ", run(command, "--help").out, re.MULTILINE)
    assert (
        codes
        == {
            "ask": ["0", "1", "2", "3", "4", "5", "6", "124", "130", "141", "143"],
            "chat": ["0", "2", "3", "4", "5", "6", "130", "141", "143"],
            "serve": ["0", "1", "2", "3", "130", "141", "143"],
        }[command]
    )


def test_no_arguments_show_the_help() -> None:
    outcome = run()
    assert outcome.code in (0, 2)  # it depends on the version of click
    assert "Commands:" in outcome.out + outcome.err


def test_the_version_is_that_of_the_package() -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.out) == (0, f"anyagent {importlib.metadata.version('anyagent')}\n")


def test_the_package_can_be_run_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["__main__.py", "ask", "--help"])
    with pytest.raises(SystemExit) as excinfo:
        importlib.import_module("anyagent.__main__")
    assert excinfo.value.code == 0
    assert capsys.readouterr().out.startswith("Usage: anyagent ask ")


def test_the_command_is_installed() -> None:
    (entry_point,) = importlib.metadata.entry_points(group="console_scripts", name="anyagent")
    assert entry_point.load() is main


@pytest.mark.parametrize("package", ["prompt_toolkit", "rich", "typer"])
def test_a_missing_package_of_the_extra_is_one_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden: Any = None
    monkeypatch.setitem(sys.modules, package, forbidden)
    message = run("--help").code
    assert message == "anyagent: the command needs more packages: pip install 'anyagent[cli]'"


# Signals.


def test_a_signal_outside_the_places_for_it_waits_for_the_next_one() -> None:
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), signals.raised():
            raise AssertionError
        signals.forget_interrupt()
        with signals.raised():
            pass


def test_in_a_place_for_one_signal_another_one_waits() -> None:
    with Signals() as signals:
        with signals.raised([signal.SIGTERM]):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), signals.raised():
            raise AssertionError


def test_an_interrupt_that_is_forgotten_is_not_raised() -> None:
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        signals.forget_interrupt()
        with signals.raised():
            pass


def test_a_termination_cannot_be_forgotten() -> None:
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signals.forget_interrupt()
        with pytest.raises(Terminated) as excinfo, signals.raised():
            raise AssertionError
    assert excinfo.value.code == 143


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_while_the_first_is_dealt_with_ends_the_process(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with Signals() as signals:
        with pytest.raises(KeyboardInterrupt), signals.raised():
            signal.raise_signal(signal.SIGINT)
        assert codes == []
        signal.raise_signal(number)
    assert codes == [code]


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals, signals.raised():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
