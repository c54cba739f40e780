"""``anyagent chat``, run in this process."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import stat
from typing import TYPE_CHECKING, Any

import pytest

from anyagent import Agent, im
from anyagent.cli._connection import Connection
from anyagent.cli._display import Display
from anyagent.testing import AgentReply, EmbeddedAgent, embedded_agent, faults

from .cli_runner import (
    BACKENDS,
    Gate,
    Terminal,
    hang_after_a_chunk,
    run,
    run_with,
    send_signal,
    someone,
)

if TYPE_CHECKING:
    from pathlib import Path

CONNECTED = "connected. Ctrl-C stops an answer, Ctrl-D leaves\r\n"
PROMPT = ">"  # the editor puts no space behind it, but moves the cursor
CTRL_C, CTRL_D, ENTER, UP = "\x03", "\x04", "\r", "\x1b[A"


def is_cancel(message: im.ClientMessage) -> bool:
    return isinstance(message, im.Cancel)


def prompts(agent: EmbeddedAgent) -> list[im.UserMessage]:
    return [message for message in agent.received if isinstance(message, im.UserMessage)]


# In the editor.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wire", ["native", "single"])
def test_a_chat_is_one_conversation_until_ctrl_d(backend: str, wire: Any) -> None:
    def person() -> None:
        terminal.wait_for(CONNECTED)
        terminal.wait_for(PROMPT)
        terminal.type("one two" + ENTER)
        terminal.wait_for("one two\r\n\x1b[2m[2 tokens]\x1b[0m\r\n")
        terminal.wait_for(PROMPT)
        terminal.type("three" + ENTER)
        terminal.wait_for("three\r\n")
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)

    with embedded_agent(wire=wire) as agent, Terminal() as terminal, someone(person):
        assert terminal.run("chat", "--url", agent.url, "--backend", backend) == 0
    assert [prompt.text for prompt in prompts(agent)] == ["one two", "three"]
    assert len({prompt.conversation for prompt in prompts(agent)} - {None}) == 1
    assert agent.connections_total == 1


def test_two_chats_are_two_conversations() -> None:
    with embedded_agent() as agent:
        for _ in range(2):
            assert run("chat", "--url", agent.url, stdin=b"Hello!\n").code == 0
    assert len({prompt.conversation for prompt in prompts(agent)}) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wire", ["native", "single"])
def test_ctrl_c_stops_the_answer_and_not_the_chat(backend: str, wire: Any) -> None:
    gate = Gate()

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await hang_after_a_chunk(message, reply) if wire == "native" else await finish_later(message, reply)

    async def finish_later(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("whole again" if message.text == "again" else "begun")
        await gate.passed()

    def person() -> None:
        terminal.wait_for(PROMPT)
        terminal.type("Hello!" + ENTER)
        terminal.wait_for("begun")
        send_signal(signal.SIGINT)
        terminal.wait_for("anyagent: stopped\r\n")
        gate.open()  # an agent that cannot be told to stop has to finish
        terminal.wait_for(PROMPT)
        terminal.type("again" + ENTER)
        terminal.wait_for("whole again\r\n")
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)

    with embedded_agent(handler, wire=wire) as agent, Terminal() as terminal, someone(person):
        assert terminal.run("chat", "--url", agent.url, "--backend", backend) == 0
        if wire == "native":
            assert agent.wait_for(is_cancel) == im.Cancel("1")
        agent.wait_for_connections(0)


def test_a_second_ctrl_c_right_after_the_first_does_not_leave_the_chat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Display.note

    def note_and_interrupt(display: Display, text: str) -> None:
        original(display, text)
        signal.raise_signal(signal.SIGINT)

    def person() -> None:
        terminal.wait_for(PROMPT)
        terminal.type("Hello!" + ENTER)
        terminal.wait_for("begun")
        monkeypatch.setattr(Display, "note", note_and_interrupt)
        send_signal(signal.SIGINT)
        terminal.wait_for("anyagent: stopped\r\n")
        terminal.wait_for(PROMPT)
        terminal.type("again" + ENTER)
        terminal.wait_for("whole again\r\n")
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)

    with embedded_agent(hang_after_a_chunk) as agent, Terminal() as terminal, someone(person):
        assert terminal.run("chat", "--url", agent.url) == 0


def test_ctrl_c_at_the_prompt_throws_away_what_is_typed_and_hints_at_ctrl_d() -> None:
    def person() -> None:
        terminal.wait_for(PROMPT)
        terminal.type("never sent" + CTRL_C)
        terminal.wait_for("anyagent: Ctrl-D leaves\r\n")
        terminal.wait_for(PROMPT)
        terminal.type("sent" + ENTER)
        terminal.wait_for("sent\r\n")
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)

    with embedded_agent() as agent, Terminal() as terminal, someone(person):
        assert terminal.run("chat", "--url", agent.url) == 0
    assert [prompt.text for prompt in prompts(agent)] == ["sent"]


def test_arrow_up_brings_back_what_was_entered_and_blank_lines_are_not_sent() -> None:
    def person() -> None:
        terminal.wait_for(PROMPT)
        terminal.type("first" + ENTER)
        terminal.wait_for("first\r\n")
        terminal.wait_for(PROMPT)
        terminal.type("  " + ENTER)
        terminal.wait_for(PROMPT)
        terminal.wait_for(PROMPT)
        terminal.type(UP + UP + " again" + ENTER)
        terminal.wait_for("first again\r\n")
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)

    with embedded_agent() as agent, Terminal() as terminal, someone(person):
        assert terminal.run("chat", "--url", agent.url) == 0
    assert [prompt.text for prompt in prompts(agent)] == ["first", "first again"]


def test_a_history_file_is_written_and_read_and_is_nobody_elses_business(tmp_path: Path) -> None:
    history = tmp_path / "history"

    def first_person() -> None:
        terminal.wait_for(PROMPT)
        terminal.type("a secret" + ENTER)
        terminal.wait_for("a secret\r\n")
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)

    def second_person() -> None:
        terminal.wait_for(PROMPT)
        terminal.type(UP)
        terminal.wait_for("a secret")
        terminal.type(" too" + ENTER)
        terminal.wait_for("a secret too\r\n")
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)

    with embedded_agent() as agent:
        for person in (first_person, second_person):
            with Terminal() as terminal, someone(person):
                assert terminal.run("chat", "--url", agent.url, "--history", str(history)) == 0
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert [line for line in history.read_text().splitlines() if line.startswith("+")] == [
        "+a secret",
        "+a secret too",
    ]


def test_without_a_history_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def person() -> None:
        terminal.wait_for(PROMPT)
        terminal.type("a secret" + ENTER)
        terminal.wait_for("a secret\r\n")
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)

    monkeypatch.chdir(tmp_path)
    with embedded_agent() as agent, Terminal() as terminal, someone(person):
        assert terminal.run("chat", "--url", agent.url, env={"HOME": str(tmp_path)}) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_history_file_that_cannot_be_written_is_exit_code_2(tmp_path: Path) -> None:
    with Terminal() as terminal:
        assert terminal.run("chat", "--history", str(tmp_path)) == 2
        assert terminal.shown() == f"anyagent: --history {tmp_path}: Is a directory\r\n"


def test_the_editor_is_on_the_terminal_while_the_answers_go_to_a_pipe() -> None:
    def person() -> None:
        terminal.wait_for(PROMPT)
        terminal.type("Hello!" + ENTER)
        terminal.wait_for("[1 token]")
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)

    reader, writer = os.pipe()
    with embedded_agent() as agent, Terminal() as terminal, someone(person), open(reader, "rb") as pipe:
        with open(writer, "w") as stdout, terminal.open("r") as stdin, terminal.open("w") as stderr:
            options = ("--url", agent.url)
            assert run_with("chat", *options, stdin=stdin, stdout=stdout, stderr=stderr) == 0
        assert pipe.read() == b"Hello!\n"


def test_the_editor_works_and_gives_no_hints_where_standard_error_is_no_terminal() -> None:
    def person() -> None:
        terminal.wait_for(PROMPT)
        terminal.type("Hello!" + ENTER)
        terminal.wait_for("Hello!\r\n")
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)

    stderr = io.TextIOWrapper(io.BytesIO())
    with embedded_agent() as agent, Terminal() as terminal, someone(person):
        with terminal.open("r") as stdin, terminal.open("w") as stdout:
            options = ("--url", agent.url)
            assert run_with("chat", *options, stdin=stdin, stdout=stdout, stderr=stderr) == 0
        assert stderr.buffer.tell() == 0


def test_a_terminal_that_only_standard_input_is_gets_no_editor() -> None:
    reader, writer = os.pipe()
    with embedded_agent() as agent, Terminal() as terminal, open(reader, "rb") as pipe:
        terminal.type("Hello!\n" + CTRL_D)
        with open(writer, "w") as stdout, terminal.open("r") as stdin:
            options = ("--url", agent.url)
            assert run_with("chat", *options, stdin=stdin, stdout=stdout, stderr=None) == 0
        assert pipe.read() == b"Hello!\n"


def test_sigterm_leaves_the_editor() -> None:
    def person() -> None:
        terminal.wait_for(PROMPT)
        send_signal(signal.SIGTERM)

    with embedded_agent() as agent, Terminal() as terminal, someone(person):
        assert terminal.run("chat", "--url", agent.url) == 143
        agent.wait_for_connections(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_signal_raises_does_not_get_into_the_event_loop(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[object] = []
    original = Connection.open

    class Spy(contextlib.AbstractAsyncContextManager[Agent]):
        def __init__(self, opening: contextlib.AbstractAsyncContextManager[Agent]) -> None:
            self._opening = opening

        async def __aenter__(self) -> Agent:
            return await self._opening.__aenter__()

        async def __aexit__(self, *exc_info: Any) -> bool | None:
            passed.extend(exc_info)
            return await self._opening.__aexit__(*exc_info)

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        send_signal(signal.SIGTERM)
        await reply.hang()

    monkeypatch.setattr(Connection, "open", lambda connection: Spy(original(connection)))
    with embedded_agent(handler) as agent:
        assert run("chat", "--url", agent.url, "--backend", backend, stdin=b"Hello!\n").code == 143
    assert passed == [None, None, None]


# What ends a chat, and what does not.


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_of_the_agent_does_not_end_the_chat(backend: str) -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text(message.text)
        if message.text == "one":
            await reply.error("busy", "later")

    with embedded_agent(handler) as agent:
        outcome = run("chat", "--url", agent.url, "--backend", backend, stdin=b"one\ntwo\n")
    assert (outcome.code, outcome.out) == (0, "one\ntwo\n")
    assert outcome.err == "anyagent: the agent answered with an error: busy: later\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_connection_lost_in_an_answer_is_exit_code_4(backend: str) -> None:
    with embedded_agent(faults.close_mid_answer) as agent:
        outcome = run("chat", "--url", agent.url, "--backend", backend, stdin=b"one\ntwo\n")
    assert (outcome.code, outcome.out) == (4, "partial\n")
    assert outcome.err == "anyagent: disconnected (code 1011, request started): fault\n"


def test_a_connection_lost_between_answers_is_exit_code_4() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("whole")
        await reply.end()
        await reply.close(1012, "restart")

    def person() -> None:
        terminal.wait_for(PROMPT)
        terminal.type("one" + ENTER)
        terminal.wait_for("whole\r\n")
        agent.wait_for_connections(0)
        terminal.wait_for(PROMPT)
        terminal.type("two" + ENTER)
        terminal.wait_for("anyagent: disconnected (code 1012, request not sent): restart\r\n")

    with embedded_agent(handler) as agent, Terminal() as terminal, someone(person):
        assert terminal.run("chat", "--url", agent.url) == 4


def test_a_broken_protocol_is_exit_code_5() -> None:
    with embedded_agent(faults.bad_json) as agent:
        assert run("chat", "--url", agent.url, stdin=b"one\ntwo\n").code == 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_connecting_can_be_interrupted(backend: str) -> None:
    def interrupt() -> None:
        agent.wait_for_connections(1)
        send_signal(signal.SIGINT)

    with embedded_agent(status=None) as agent, someone(interrupt):
        assert run("chat", "--url", agent.url, "--backend", backend).code == 130
        agent.wait_for_connections(0)


# Without an editor.


def test_lines_that_are_piped_in_are_prompts_until_they_end() -> None:
    with embedded_agent() as agent:
        outcome = run("chat", "--url", agent.url, stdin="один\r\n\n  \nlast".encode())
    assert (outcome.code, outcome.out, outcome.err) == (0, "один\nlast\n", "")
    assert [prompt.text for prompt in prompts(agent)] == ["один", "last"]


def test_no_url_is_the_embedded_agent() -> None:
    outcome = run("chat", stdin=b"Hello!\n")
    assert (outcome.code, outcome.out) == (0, "Hello!\n")
    assert outcome.err == "anyagent: no --url is given, so the embedded agent answers, which echoes\n"


def test_a_closed_standard_input_is_at_its_end() -> None:
    assert run_with("chat", stdin=None, stdout=None, stderr=None) == 0


def test_a_line_that_is_not_utf8_is_exit_code_2() -> None:
    outcome = run("chat", stdin=b"one\n\xff\n")
    assert (outcome.code, outcome.out) == (2, "one\n")
    assert outcome.err.endswith("anyagent: the prompt is not valid UTF-8\n")


@pytest.mark.parametrize("backend", BACKENDS)
def test_sigint_stops_the_answer_and_the_next_line_is_asked(backend: str) -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        if message.text == "Hello!":
            send_signal(signal.SIGINT)
        await hang_after_a_chunk(message, reply)

    with embedded_agent(handler) as agent:
        outcome = run("chat", "--url", agent.url, "--backend", backend, stdin=b"Hello!\nagain\nmore\n")
        agent.wait_for(is_cancel)
    assert outcome.code == 0
    assert outcome.out.removeprefix("begun").lstrip("\n") == "whole again\nwhole more\n"
    assert outcome.err == "anyagent: stopped\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_line_is_awaited_ends_the_chat(number: signal.Signals, code: int) -> None:
    class Interrupted(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            signal.raise_signal(number)
            raise AssertionError

    with embedded_agent() as agent:
        stdin = io.TextIOWrapper(Interrupted())
        assert run_with("chat", "--url", agent.url, stdin=stdin, stdout=None, stderr=None) == code
        agent.wait_for_connections(0)


def test_an_output_that_nobody_reads_is_exit_code_141_and_the_agent_is_told_to_stop() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stdin = io.TextIOWrapper(io.BytesIO(b"Hello!\n"))
    with embedded_agent(hang_after_a_chunk) as agent:
        with open(writer, "w") as stdout:
            assert run_with("chat", "--url", agent.url, stdin=stdin, stdout=stdout, stderr=None) == 141
        agent.wait_for(is_cancel)
