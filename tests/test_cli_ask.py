"""``anyagent ask``, run in this process."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest

from anyagent import im, om
from anyagent.cli import _relay
from anyagent.testing import AgentReply, embedded_agent, faults

from .cli_runner import (
    BACKENDS,
    Gate,
    Terminal,
    hang_after_a_chunk,
    run,
    run_with,
    send_signal,
    someone,
    started,
)

if TYPE_CHECKING:
    from anyagent.testing import Handler


def is_prompt(message: im.ClientMessage) -> bool:
    return isinstance(message, im.UserMessage)


def is_cancel(message: im.ClientMessage) -> bool:
    return isinstance(message, im.Cancel)


def answering(*texts: str, status: str = "completed") -> Handler:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        for text in texts:
            await reply.text(text)
        await reply.end(status)

    return handler


def ask_at_a_terminal(handler: Handler, *options: str) -> str:
    """What is shown."""
    with embedded_agent(handler) as agent, Terminal() as terminal:
        assert terminal.run("ask", "--url", agent.url, *options, "Hello!") in (0, 1)
        return terminal.shown()


# What goes where.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wire", ["native", "single"])
def test_the_answer_goes_to_standard_output_and_nothing_to_standard_error(backend: str, wire: Any) -> None:
    with embedded_agent(wire=wire) as agent:
        outcome = run("ask", "--url", agent.url, "--backend", backend, "Hello, agent!")
    assert (outcome.code, outcome.out, outcome.err) == (0, "Hello, agent!\n", "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_url_the_embedded_agent_answers_and_standard_error_says_so(backend: str) -> None:
    outcome = run("ask", "--backend", backend, "Hello!")
    assert (outcome.code, outcome.out) == (0, "Hello!\n")
    assert outcome.err == "anyagent: no --url is given, so the embedded agent answers, which echoes\n"


def test_the_answer_is_printed_as_it_arrives() -> None:
    gate = Gate()

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("first, ")
        await gate.passed()
        await reply.text("then the rest")

    with embedded_agent(handler) as agent, started("ask", "--url", agent.url, "Hello!") as process:
        assert process.stdout is not None
        assert process.stdout.read(7) == b"first, "
        gate.open()
        assert process.communicate() == (b"then the rest\n", b"")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["no newline"], "no newline\n"),
        (["a newline\n"], "a newline\n"),
        (["two\n\n"], "two\n\n"),
        (["one ", "", "two", ""], "one two\n"),
        ([], ""),
        ([""], ""),
    ],
)
def test_the_output_ends_with_a_newline_that_is_added_only_if_it_is_missing(
    texts: list[str], expected: str
) -> None:
    with embedded_agent(answering(*texts)) as agent:
        assert run("ask", "--url", agent.url, "Hello!").out == expected


def test_an_answer_longer_than_any_buffer_arrives_whole() -> None:
    text = " ".join(str(number) for number in range(100_000))
    outcome = run("ask", "-", stdin=text.encode())
    assert outcome.out == text + "\n"


def test_reasoning_and_the_tokens_used_are_shown_dim_on_a_terminal() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.reasoning("Well, ")
        await reply.reasoning("well.")
        await reply.text("Yes")
        await reply.reasoning("Or ")
        await reply.reasoning("no?\n")
        await reply.reasoning("")
        await reply.text(", indeed.")

    seen = ask_at_a_terminal(handler)
    assert re.sub(r"\x1b\[2m(.*?)\x1b\[0m", r"<\1>", seen, flags=re.DOTALL).splitlines() == [
        "<Well, ><well.>",
        "Yes",
        "<Or ><no?>",
        ", indeed.",
        "<[2 tokens]>",
    ]


def test_reasoning_is_left_out_where_standard_error_is_no_terminal() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.reasoning("Well...")
        await reply.text("Yes.")

    with embedded_agent(handler) as agent:
        outcome = run("ask", "--url", agent.url, "Hello!")
    assert (outcome.out, outcome.err) == ("Yes.\n", "")


def test_reasoning_is_shown_on_a_terminal_while_the_answer_goes_to_a_pipe() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("Yes")
        await reply.reasoning("Well...")
        await reply.text(".")

    reader, writer = os.pipe()
    with embedded_agent(handler) as agent, Terminal() as terminal, open(reader, "rb") as pipe:
        with open(writer, "w") as stdout, terminal.open("w") as stderr:
            options = ("--url", agent.url, "Hello!")
            assert run_with("ask", *options, stdin=None, stdout=stdout, stderr=stderr) == 0
        assert terminal.shown() == "\x1b[2mWell...\x1b[0m\r\n\x1b[2m[2 tokens]\x1b[0m\r\n"
        assert pipe.read() == b"Yes.\n"


def test_an_answer_that_the_agent_did_not_complete_is_noted() -> None:
    with embedded_agent(answering("Half an ans", status="incomplete")) as agent:
        outcome = run("ask", "--url", agent.url, "Hello!")
    assert (outcome.code, outcome.out) == (0, "Half an ans\n")
    assert outcome.err == "anyagent: the agent says that its answer is incomplete\n"


# Control characters.

EVIL = "a\x1b]0;title\x07b\r\x00\x7f\x9b31m\u202ed\u2066\tc\nd"
HARMLESS = "a␛]0;title␇b␍␀␡\ufffd31m\ufffdd\ufffd\tc\r\nd"  # the terminal itself turns \n into \r\n


def test_control_characters_reach_a_pipe_unchanged() -> None:
    with embedded_agent(answering(EVIL)) as agent:
        assert run("ask", "--url", agent.url, "Hello!").out == EVIL + "\n"


def test_control_characters_in_an_answer_become_pictures_on_a_terminal() -> None:
    seen = ask_at_a_terminal(answering(EVIL))
    assert seen.startswith(HARMLESS + "\r\n")


def test_control_characters_in_reasoning_become_pictures_on_a_terminal() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.reasoning(EVIL.replace("\t", ""))  # which rich would turn into spaces

    seen = ask_at_a_terminal(handler)
    assert HARMLESS.replace("\t", "").partition("\r\n")[0] in seen


def test_an_error_of_the_agent_is_one_harmless_line_on_a_terminal() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("Half")
        await reply.error("bad\x1b[0m", "one\ntwo\x9bthree")

    seen = ask_at_a_terminal(handler)
    assert seen == "Half\r\nanyagent: the agent answered with an error: bad␛[0m: one␊two\ufffdthree\r\n"


def test_an_error_of_the_agent_reaches_a_pipe_unchanged() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.error("bad", "\x1b[31mred\x9b")

    with embedded_agent(handler) as agent:
        outcome = run("ask", "--url", agent.url, "Hello!")
    assert outcome.err == "anyagent: the agent answered with an error: bad: \x1b[31mred\x9b\n"


def test_the_name_of_a_tool_is_harmless_on_a_terminal() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("Let me see: ")
        await reply.tool_call("\x1b[2Jclear", "{}")

    seen = ask_at_a_terminal(handler)
    assert seen.startswith("Let me see: \r\nanyagent: the agent called the tool ␛[2Jclear, and")


def test_control_characters_in_json_are_escaped_on_a_terminal_and_the_json_is_the_same() -> None:
    seen = ask_at_a_terminal(answering(EVIL), "--json")
    line = seen.partition("\r\n")[0]
    assert not any(character < " " or "\x7f" <= character < "\xa0" for character in line)
    assert json.loads(line)["text"] == EVIL


def test_what_the_encoding_of_a_terminal_lacks_is_replaced() -> None:
    with embedded_agent(answering("naïve\x1b")) as agent, Terminal() as terminal:
        with terminal.open("w", encoding="ascii") as stdout:
            assert run_with("ask", "--url", agent.url, "x", stdin=None, stdout=stdout, stderr=None) == 0
        terminal.wait_for("na?ve?\r\n")


def test_a_pipe_gets_utf8_whatever_the_encoding_of_the_stream() -> None:
    data = io.BytesIO()
    stdout = io.TextIOWrapper(data, "ascii")
    assert run_with("ask", "naïve", stdin=None, stdout=stdout, stderr=None) == 0
    assert data.getvalue() == "naïve\n".encode()


# JSON.


def test_json_is_one_event_a_line_with_the_end_last() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.reasoning("Well...")
        await reply.text("Yes\n")

    with embedded_agent(handler) as agent:
        outcome = run("ask", "--json", "--url", agent.url, "Hello!")
    assert [json.loads(line) for line in outcome.out.splitlines()] == [
        {"type": "AGENT_EVENT_REASONING_CHUNK", "text": "Well...", "id": "1"},
        {"type": "AGENT_EVENT_TEXT_CHUNK", "text": "Yes\n", "id": "1"},
        {"type": "AGENT_EVENT_END", "tokens_used": 1, "id": "1"},
    ]
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize(("wire", "fields"), [("native", {"id": "1"}), ("single", {})])
def test_json_ends_with_the_error_if_the_agent_answers_with_one(wire: Any, fields: dict[str, str]) -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("Half")
        await reply.error("busy", "later", retry_after=2.5)

    with embedded_agent(handler, wire=wire) as agent:
        outcome = run("ask", "--json", "--url", agent.url, "Hello!")
    assert [json.loads(line) for line in outcome.out.splitlines()] == [
        {"type": "AGENT_EVENT_TEXT_CHUNK", "text": "Half", **fields},
        {"type": "ERROR", "code": "busy", "details": "later", "retry_after": 2.5, **fields},
    ]
    assert outcome.code == 1
    assert outcome.err == "anyagent: the agent answered with an error: busy: later (retry after 2.5 s)\n"


def test_json_puts_an_event_of_an_unknown_type_in_one_line_too() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.raw(f'{{\n  "type": "NEW",\r\n  "id": "{reply.id}",\n  "list": [\n1, 2]\n}}')

    with embedded_agent(handler) as agent:
        outcome = run("ask", "--json", "--url", agent.url, "Hello!")
    assert outcome.out.splitlines()[0] == '{"type":"NEW","id":"1","list":[1,2]}'


def test_an_event_of_an_unknown_type_is_passed_over_without_json() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.raw(f'{{"type": "NEW", "id": "{reply.id}"}}')
        await reply.text("Yes.")

    with embedded_agent(handler) as agent:
        outcome = run("ask", "--url", agent.url, "Hello!")
    assert (outcome.code, outcome.out, outcome.err) == (0, "Yes.\n", "")


# Tools.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_tool_call_is_answered_with_an_error_and_noted_and_the_answer_goes_on(
    backend: str, option: list[str]
) -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("Let me see: ")
        await reply.text(await reply.tool_call("weather", '{"city": "Kyiv"}'))

    with embedded_agent(handler) as agent:
        outcome = run("ask", "--url", agent.url, "--backend", backend, *option, "Hello!")
    assert outcome.code == 0
    assert outcome.err == "anyagent: the agent called the tool weather, and was told that there are none\n"
    if option:
        assert '"name":"weather"' in outcome.out
        assert '"text":"error: this client has no tools"' in outcome.out
    else:
        assert outcome.out == "Let me see: error: this client has no tools\n"


def test_a_tool_call_that_the_agent_does_not_wait_for_is_no_error() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        call = om.encode(om.EventToolCall(call_id="1", name="weather", arguments="{}", id=reply.id))
        end = om.encode(om.EventEnd(tokens_used=0, id=reply.id))
        reply.end_silently()
        frames = (bytes([0x81, len(message)]) + message for message in (call, end))
        reply.write(b"".join(frames))  # together, so that the end is there when the call is seen

    with embedded_agent(handler) as agent:
        outcome = run("ask", "--url", agent.url, "Hello!")
    assert (outcome.code, outcome.out) == (0, "")
    assert "weather" in outcome.err


# The prompt.


def test_a_prompt_of_a_dash_is_read_from_standard_input_as_it_is() -> None:
    with embedded_agent() as agent:
        run("ask", "--url", agent.url, "-", stdin="  два\n三\n".encode())
        assert agent.wait_for(is_prompt) == im.UserMessage(id="1", text="  два\n三\n")


@pytest.mark.parametrize(
    ("arguments", "stdin", "error"),
    [
        (["ask", ""], b"", "the prompt is empty"),
        (["ask", " \n"], b"", "the prompt is empty"),
        (["ask", "-"], b"\n", "the prompt is empty"),
        (["ask", "-"], b"caf\xe9", "the prompt is not valid UTF-8"),
        (["ask", "caf\udce9"], b"", "the prompt is not valid UTF-8"),
        (["ask", "--timeout", "0", "x"], b"", "--timeout must be a positive number of seconds"),
        (["ask", "--timeout", "nan", "x"], b"", "--timeout must be a positive number of seconds"),
        (["ask", "--timeout", "inf", "x"], b"", "--timeout must be a positive number of seconds"),
        (["ask", "--url", "http://x", "x"], b"", "the URL must begin with ws:// or wss://"),
        (["ask", "--url", "", "x"], b"", "the URL must begin with ws:// or wss://"),
        (["ask", "--url", "ws://x", "--header", "nonsense", "x"], b"", "--header must be NAME:VALUE"),
        (
            ["ask", "--url", "ws://x", "--header", "a b: c", "x"],
            b"",
            "a header's name holds a character that RFC 9110 does not allow",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], stdin: bytes, error: str) -> None:
    outcome = run(*arguments, stdin=stdin)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"anyagent: {error}\n")


def test_a_closed_standard_input_is_an_empty_prompt() -> None:
    assert run_with("ask", "-", stdin=None, stdout=None, stderr=None) == 2


@pytest.mark.parametrize(
    "arguments", [["ask"], ["ask", "--backend", "curio", "x"], ["ask", "--nonsense", "x"]]
)
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Error: " in outcome.err


# Exit codes.


def test_an_error_of_the_agent_is_exit_code_1_after_what_had_arrived() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("Half an ans")
        await reply.error("overloaded", "too much to do")

    with embedded_agent(handler) as agent:
        outcome = run("ask", "--url", agent.url, "Hello!")
    assert (outcome.code, outcome.out) == (1, "Half an ans\n")
    assert outcome.err == "anyagent: the agent answered with an error: overloaded: too much to do\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_connection_is_exit_code_3(backend: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    outcome = run("ask", "--url", f"ws://127.0.0.1:{port}", "--backend", backend, "Hello!")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err == f"anyagent: could not connect to 127.0.0.1:{port}: connection refused\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lost_connection_is_exit_code_4_after_what_had_arrived(backend: str) -> None:
    with embedded_agent(faults.close_mid_answer) as agent:
        outcome = run("ask", "--url", agent.url, "--backend", backend, "Hello!")
    assert (outcome.code, outcome.out) == (4, "partial\n")
    assert outcome.err == "anyagent: disconnected (code 1011, request started): fault\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_protocol_is_exit_code_5(backend: str) -> None:
    with embedded_agent(faults.bad_json) as agent:
        outcome = run("ask", "--url", agent.url, "--backend", backend, "Hello!")
    assert (outcome.code, outcome.out) == (5, "partial\n")
    assert outcome.err.startswith("anyagent: the agent broke the protocol: a message is not one JSON object")
    assert outcome.err.count("\n") == 1


def test_a_full_disk_is_exit_code_6_and_the_agent_is_told_to_stop() -> None:
    with (
        embedded_agent(hang_after_a_chunk) as agent,
        open("/dev/full", "w") as full,
        open(os.devnull) as null,
    ):
        assert run_with("ask", "--url", agent.url, "Hello!", stdin=null, stdout=full, stderr=None) == 6
        agent.wait_for(is_cancel)


def test_an_answer_that_is_not_taken_for_too_long_is_exit_code_6(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    chunk = "x" * 2**20

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        for _ in range(200):
            await reply.text(chunk)

    def read_when_told_to_stop() -> bytes:
        agent.wait_for(is_cancel, 15)
        with open(reader, "rb") as pipe:
            return pipe.read()

    monkeypatch.setattr(_relay, "_EVENTS_AHEAD", 1)
    with (
        embedded_agent(handler) as agent,
        someone(read_when_told_to_stop),
        open(writer, "w") as stdout,
        open(os.devnull, "w") as stderr,
    ):
        assert run_with("ask", "--url", agent.url, "Hello!", stdin=None, stdout=stdout, stderr=stderr) == 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"status": None}])
def test_the_timeout_is_exit_code_124_be_it_the_answer_or_the_connection_that_is_late(
    backend: str, options: dict[str, Any]
) -> None:
    with embedded_agent(hang_after_a_chunk, **options) as agent:
        outcome = run("ask", "--url", agent.url, "--backend", backend, "--timeout", "0.2", "Hello!")
        agent.wait_for_connections(0)
    assert outcome.code == 124
    assert outcome.err == "anyagent: the answer was not complete within 0.2 s\n"


def test_an_answer_within_the_timeout_is_no_different() -> None:
    assert run("ask", "--timeout", "60", "Hello!").out == "Hello!\n"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_agent_and_closes_the_connection(
    backend: str, number: signal.Signals, code: int
) -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("begun")
        send_signal(number)
        await reply.hang()

    before = signal.getsignal(number)
    with embedded_agent(handler) as agent:
        outcome = run("ask", "--url", agent.url, "--backend", backend, "Hello!")
        agent.wait_for(is_cancel)
        agent.wait_for_connections(0)
    assert (outcome.code, outcome.err) == (code, "")
    assert outcome.out in ("", "begun")
    assert signal.getsignal(number) is before


def test_an_interrupted_line_is_ended_on_a_terminal() -> None:
    def interrupt() -> None:
        terminal.wait_for("begun")
        send_signal(signal.SIGINT)
        terminal.wait_for("\r\n")

    with embedded_agent(hang_after_a_chunk) as agent, Terminal() as terminal, someone(interrupt):
        assert terminal.run("ask", "--url", agent.url, "Hello!") == 130


def test_reading_the_prompt_can_be_interrupted() -> None:
    class Interrupted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError

    stdin = io.TextIOWrapper(Interrupted())
    assert run_with("ask", "-", stdin=stdin, stdout=None, stderr=None) == 130


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_connection_that_does_not_come_about_can_be_interrupted(backend: str) -> None:
    def interrupt() -> None:
        agent.wait_for_connections(1)
        send_signal(signal.SIGINT)

    with embedded_agent(status=None) as agent, someone(interrupt):
        assert run("ask", "--url", agent.url, "--backend", backend, "Hello!").code == 130


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_that_nobody_reads_is_exit_code_141_without_a_word(backend: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with embedded_agent(hang_after_a_chunk) as agent, Terminal() as terminal:
        with open(writer, "w") as stdout, terminal.open("w") as stderr:
            options = ("--url", agent.url, "--backend", backend, "Hello!")
            assert run_with("ask", *options, stdin=None, stdout=stdout, stderr=stderr) == 141
        agent.wait_for(is_cancel)
        assert terminal.shown() == ""


def test_a_closed_standard_output_is_as_one_that_nobody_reads() -> None:
    assert run_with("ask", "Hello!", stdin=None, stdout=None, stderr=None) == 141


def test_a_standard_error_that_cannot_be_written_changes_nothing() -> None:
    out_reader, out_writer = os.pipe()
    err_reader, err_writer = os.pipe()
    os.close(err_reader)
    with open(out_reader, "rb") as pipe:
        with open(out_writer, "w") as stdout, open(err_writer, "w") as stderr:
            assert run_with("ask", "Hello!", stdin=None, stdout=stdout, stderr=stderr) == 0
        assert pipe.read() == b"Hello!\n"


def test_an_exception_that_is_a_bug_is_no_line_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    async def bug(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("anyagent.cli._ask.send_answer", bug)
    with pytest.raises(ZeroDivisionError):
        run("ask", "Hello!")
