"""``anyagent batch`` in a process of its own, at a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import signal
import struct
import termios
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from anyagent import im
from anyagent.testing import AgentReply, EmbeddedAgent, echo, embedded_agent

from .cli_runner import BACKENDS, DEADLINE, Gate, Terminal, exit_code, started
from .terminal_screen import Screen

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

CTRL_C, CTRL_S, CTRL_Q = "\x03", "\x13", "\x11"
PROMPTS = 50
BOARD = ("failed", "retried", "skipped", "in flight", "limit", "requests/s", "tokens/s", "elapsed", "left")
SUMMARY = "prompts in"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current directory with a file of prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    Path("prompts.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "text": f"prompt {n}"}) + "\n" for n in range(PROMPTS))
    )


async def answer_some_and_hang(message: im.UserMessage, reply: AgentReply) -> None:
    """Answers the first ten; of the others it only begins the answer."""
    if int(message.text.removeprefix("prompt ")) < 10:
        await echo(message, reply)
    else:
        await reply.text("begun")
        await reply.hang()


@contextlib.contextmanager
def batch(
    agent: EmbeddedAgent, terminal: Terminal, *options: str, columns: int = 80, **more: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """The command at `terminal`, with four prompts in flight."""
    fcntl.ioctl(terminal.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    arguments = ("prompts.jsonl", "-o", "a.jsonl", "--url", agent.url, "--in-flight", "4", *options)
    with started("batch", *arguments, terminal=terminal, **more) as process:
        yield process


def rows() -> list[dict[str, Any]]:
    """The rows of the output, each of them whole."""
    data = Path("a.jsonl").read_text()
    assert data == "" or data.endswith("\n")
    return [json.loads(line) for line in data.splitlines()]


def is_cancel(message: im.ClientMessage) -> bool:
    return isinstance(message, im.Cancel)


def asked(agent: EmbeddedAgent) -> int:
    return sum(isinstance(message, im.UserMessage) for message in agent.received)


def pictures(shown: str, columns: int) -> list[list[str]]:
    """What was to be seen each time that the board was about to be painted over, and in the end.

    Until the end, no line was longer than the terminal is wide.
    """
    seen = Screen(columns)
    *before, end = re.split(r"(?=\r\x1b\[\d+A)", shown)
    after = []
    for part in before:
        seen.feed(part)
        after.append(seen.lines)
    assert seen.wrapped == []
    seen.feed(end)
    return [*after, seen.lines]


@pytest.mark.parametrize("columns", [120, 80, 40])
def test_a_board_while_it_runs_and_a_summary_at_the_end(columns: int) -> None:
    gate = Gate()

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        if message.text == f"prompt {PROMPTS - 1}":
            await gate.passed()
        await echo(message, reply)

    with embedded_agent(handler) as agent, Terminal() as terminal:
        with batch(agent, terminal, columns=columns) as process:
            terminal.wait_for("49 of 50 ")
            gate.open()
            assert exit_code(process) == 0
        shown = terminal.shown()
    *boards, end = pictures(shown, columns)
    for board in boards:
        assert max(map(len, board)) < columns
        for figure in BOARD:
            assert any(figure in line for line in board)
    assert any(re.fullmatch("49 of 50 .* 98 %", board[0]) for board in boards)
    assert SUMMARY in end[0]
    assert end[-2:] == ["anyagent: the answers are in a.jsonl", ""]
    assert "%" not in "".join(end[0])
    assert len(rows()) == PROMPTS


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_once_leaves_some_time_and_then_the_same_command_goes_on(backend: str) -> None:
    with embedded_agent(answer_some_and_hang) as agent, Terminal() as terminal:
        with batch(agent, terminal, "--grace", "0.1", "--backend", backend) as process:
            terminal.wait_for("10 of 50 ")
            terminal.type(CTRL_C)
            terminal.wait_for(
                "anyagent: stopping: no new prompt; waiting up to 0.1 s for the 4 in flight\r\n"
            )
            terminal.wait_for("anyagent: Ctrl-C again ends at once\r\n")
            assert exit_code(process) == 130
        agent.wait_for(is_cancel)
        agent.wait_for_connections(0)
        assert asked(agent) == 14
        *_, end = pictures(terminal.shown(), 80)
    assert end[:3] == [
        "anyagent: stopping: no new prompt; waiting up to 0.1 s for the 4 in flight",
        "anyagent: Ctrl-C again ends at once",
        end[2],
    ]
    assert end[2].startswith("10 prompts in ")
    assert end[-3:] == [
        "anyagent: the answers are in a.jsonl",
        "anyagent: the same command goes on where this one stopped",
        "",
    ]
    assert sorted(row["text"] for row in rows()) == [f"prompt {number}" for number in range(10)]
    with embedded_agent() as agent, Terminal() as terminal, batch(agent, terminal) as process:
        assert exit_code(process) == 0
        assert asked(agent) == PROMPTS - 10
    assert sorted(int(row["id"]) for row in rows()) == list(range(PROMPTS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_twice_ends_at_once(backend: str) -> None:
    with embedded_agent(answer_some_and_hang) as agent, Terminal() as terminal:
        with batch(agent, terminal, "--grace", "1000", "--backend", backend) as process:
            terminal.wait_for("10 of 50 ")
            terminal.type(CTRL_C)
            terminal.wait_for("anyagent: Ctrl-C again ends at once\r\n")
            terminal.wait_for("left")  # the board is there again
            terminal.type(CTRL_C)
            assert exit_code(process) == 130
        shown = terminal.shown()
    *_, end = pictures(shown.replace("^C", ""), 80)
    assert shown.endswith("^C\r\n")  # a line of its own for the shell
    assert "\x1b[?25l" not in shown  # the cursor was never hidden
    assert end[2].startswith("10 of 50 ")
    assert len(rows()) == 10


def test_ctrl_c_twice_ends_at_once_also_at_a_terminal_that_is_stopped() -> None:
    with (
        embedded_agent(answer_some_and_hang) as agent,
        Terminal() as terminal,
        batch(agent, terminal, "--grace", "1000") as process,
    ):
        terminal.wait_for("10 of 50 ")
        termios.tcflow(terminal.slave, termios.TCOOFF)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert exit_code(process) in (130, 143)  # the first may arrive last
        termios.tcflow(terminal.slave, termios.TCOON)
    assert len(rows()) == 10


def test_a_terminal_that_is_stopped_does_not_stop_the_batch() -> None:
    gate = Gate()

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        if message.text == "prompt 10":
            await gate.passed()
        await echo(message, reply)

    with embedded_agent(handler) as agent, Terminal() as terminal, batch(agent, terminal) as process:
        terminal.wait_for("in flight")
        terminal.type(CTRL_S)
        gate.open()
        agent.wait_for(lambda message: isinstance(message, im.UserMessage) and message.id == str(PROMPTS))
        agent.wait_for_connections(0, DEADLINE)
        assert len(rows()) == PROMPTS
        terminal.type(CTRL_Q)
        assert exit_code(process) == 0


def test_what_is_shown_is_harmless() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.error("bad\x1b[2J\x9b", "\x1b[2J")

    with embedded_agent(handler) as agent, Terminal() as terminal:
        with batch(agent, terminal, "-o", "a\x1b[2J.jsonl") as process:
            assert exit_code(process) == 1
        *_, end = pictures(terminal.shown(), 80)  # which knows of no sequence that clears the screen
    assert any(line.startswith("  AgentError: bad") for line in end)
    assert "anyagent: the answers are in a␛[2J.jsonl" in end
    assert end[-2].startswith("anyagent: 50 of the prompts failed; ")
