"""The command in a process of its own: signals, terminals, pipes, and nothing left behind."""

from __future__ import annotations

import os
import signal
from functools import partial
from operator import eq
from typing import TYPE_CHECKING

import pytest

from anyagent import im
from anyagent.testing import AgentReply, embedded_agent

from .cli_runner import BACKENDS, DEADLINE, Gate, Terminal, exit_code, hang_after_a_chunk, started
from .raw_client import connect

if TYPE_CHECKING:
    import subprocess

CTRL_C, CTRL_D, ENTER, UP = "\x03", "\x04", "\r", "\x1b[A"
PROMPT = ">"


def is_cancel(message: im.ClientMessage) -> bool:
    return isinstance(message, im.Cancel)


def read_from(process: subprocess.Popen[bytes], size: int) -> bytes:
    assert process.stdout is not None
    data = b""
    while len(data) < size and (more := process.stdout.read(size - len(data))):
        data += more
    return data


# ask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ask_ends_on_a_signal_after_telling_the_agent(
    backend: str, number: signal.Signals, code: int
) -> None:
    with (
        embedded_agent(hang_after_a_chunk) as agent,
        started("ask", "--url", agent.url, "--backend", backend, "Hello!") as process,
    ):
        assert read_from(process, 5) == b"begun"
        process.send_signal(number)
        assert exit_code(process) == code
        agent.wait_for(is_cancel)
        agent.wait_for_connections(0)
        assert process.communicate() == (b"", b"")


@pytest.mark.parametrize("backend", BACKENDS)
def test_ask_ends_on_ctrl_c_at_a_terminal_with_a_line_of_its_own_for_the_shell(backend: str) -> None:
    with (
        embedded_agent(hang_after_a_chunk) as agent,
        Terminal() as terminal,
        started("ask", "--url", agent.url, "--backend", backend, "Hello!", terminal=terminal) as process,
    ):
        terminal.wait_for("begun")
        terminal.type(CTRL_C)
        assert exit_code(process) == 130
        agent.wait_for(is_cancel)
        assert terminal.shown() == "begun^C\r\n"


def test_ask_can_be_interrupted_while_nobody_takes_the_answer() -> None:
    chunk = "x" * 2**16

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        while True:
            await reply.text(chunk)

    with embedded_agent(handler) as agent, started("ask", "--url", agent.url, "Hello!") as process:
        read_from(process, 1)
        process.send_signal(signal.SIGINT)
        assert exit_code(process) == 130
        agent.wait_for_connections(0)


def test_ask_ends_quietly_when_its_reader_has_gone() -> None:
    gate = Gate()

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("begun")
        await gate.passed()
        await reply.text("nobody reads this")
        await reply.hang()

    with embedded_agent(handler) as agent, started("ask", "--url", agent.url, "Hello!") as process:
        assert read_from(process, 5) == b"begun"
        assert process.stdout is not None
        process.stdout.close()
        gate.open()
        assert exit_code(process) == 141
        agent.wait_for(is_cancel)
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_ask_leaves_a_signal_alone_that_it_was_started_to_ignore() -> None:
    gate = Gate()

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("begun, ")
        await gate.passed()
        await reply.text("done")

    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a job in the background
    try:
        with (
            embedded_agent(handler) as agent,
            started("ask", "--url", agent.url, "Hello!", restore_signals=False) as process,
        ):
            assert read_from(process, 7) == b"begun, "
            process.send_signal(signal.SIGINT)
            gate.open()
            assert process.communicate(timeout=DEADLINE) == (b"done\n", b"")
            assert process.returncode == 0
    finally:
        signal.signal(signal.SIGINT, previous)


# chat


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chat_at_a_terminal_with_ctrl_c_and_arrow_up_and_ctrl_d(backend: str) -> None:
    with (
        embedded_agent(hang_after_a_chunk) as agent,
        Terminal() as terminal,
        started("chat", "--url", agent.url, "--backend", backend, terminal=terminal) as process,
    ):
        for number in range(3):
            terminal.wait_for(PROMPT)
            terminal.type(f"Hello {number}" + ENTER)
            terminal.wait_for("begun")
            terminal.type(CTRL_C)
            terminal.wait_for("^C\r\nanyagent: stopped\r\n")
            agent.wait_for(partial(eq, im.Cancel(str(number + 1))))
        terminal.wait_for(PROMPT)
        terminal.type("unfinished" + CTRL_C)
        terminal.wait_for("anyagent: Ctrl-D leaves\r\n")
        terminal.wait_for(PROMPT)
        terminal.type("again" + ENTER)
        terminal.wait_for("whole again\r\n")
        terminal.wait_for(PROMPT)
        terminal.type(UP + ENTER)
        terminal.wait_for("whole again\r\n")
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)
        assert exit_code(process) == 0
        agent.wait_for_connections(0)
    texts = [message.text for message in agent.received if isinstance(message, im.UserMessage)]
    assert texts == ["Hello 0", "Hello 1", "Hello 2", "again", "again"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chat_without_a_terminal_is_not_ended_by_a_signal_in_an_answer(backend: str) -> None:
    with (
        embedded_agent(hang_after_a_chunk) as agent,
        started("chat", "--url", agent.url, "--backend", backend) as process,
    ):
        assert process.stdin is not None
        process.stdin.write(b"Hello!\n")
        process.stdin.flush()
        assert read_from(process, 5) == b"begun"
        process.send_signal(signal.SIGINT)
        agent.wait_for(is_cancel)
        assert process.communicate(b"again\n", DEADLINE) == (b"\nwhole again\n", b"anyagent: stopped\n")
        assert process.returncode == 0


def test_sigterm_ends_a_chat_and_leaves_the_terminal_as_it_was() -> None:
    with embedded_agent() as agent, Terminal() as terminal:
        settings = terminal.settings()
        with started("chat", "--url", agent.url, terminal=terminal) as process:
            terminal.wait_for(PROMPT)
            assert terminal.settings() != settings
            process.terminate()
            assert exit_code(process) == 143
        assert terminal.settings() == settings
        assert "Error" not in terminal.shown()
        agent.wait_for_connections(0)


# serve


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_on_a_signal_also_with_a_client_connected(number: signal.Signals) -> None:
    with started("serve", "--port", "0") as process:
        assert process.stdout is not None
        with connect(process.stdout.readline().decode().strip()) as client:
            client.prompt("Hello!", id="a")
            assert client.receive()["text"] == "Hello!"
            process.send_signal(number)
            assert exit_code(process) == 0
        assert process.communicate() == (b"", b"")


def test_serve_ends_at_once_on_a_second_ctrl_c(tmp_path: os.PathLike[str]) -> None:
    with open(os.path.join(tmp_path, "stubborn.py"), "w") as module:
        module.write("""
import anyio

async def stay(message, reply):
    with anyio.CancelScope(shield=True):
        try:
            await reply.text("here")
            await reply.hang()
        finally:
            await reply.hang()
""")
    with (
        Terminal() as terminal,
        started("serve", "stubborn:stay", "--port", "0", terminal=terminal, cwd=tmp_path) as process,
    ):
        terminal.wait_for("Ctrl-C stops the agent\r\n")
        with connect(terminal.shown().partition("\r\n")[0]) as client:
            client.prompt("Hello!", id="a")
            assert client.receive()["text"] == "here"
            terminal.type(CTRL_C)
            terminal.wait_for("^C\r\nanyagent: stopping. Another Ctrl-C does not wait for the handlers\r\n")
            terminal.type(CTRL_C)
            assert exit_code(process) == 130
