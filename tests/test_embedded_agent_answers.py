"""How the embedded agent answers a request: events, terminals, tool calls."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

import pytest

from anyagent import im, om
from anyagent.testing import AgentReply, embedded_agent

from .raw_client import DEADLINE, connect, end, error, text_chunk

if TYPE_CHECKING:
    from collections.abc import Sequence

Wire = Literal["native", "single"]
WIRES: Sequence[Wire] = ("native", "single")


# Answers.


@pytest.mark.parametrize("text", ["", "word", "two words", "  led\tand\n\nfollowed  ", " \n", "日本 語 🙂"])
def test_echo_answers_with_chunks_that_join_to_the_prompt(text: str) -> None:
    with embedded_agent() as agent, connect(agent.url) as client:
        client.prompt(text, id="a")
        *chunks, terminal = client.receive_answer()
    assert "".join(chunk["text"] for chunk in chunks) == text
    assert terminal == end(len(chunks), id="a")


def test_echo_sends_a_chunk_for_each_word() -> None:
    with embedded_agent() as agent, connect(agent.url) as client:
        client.prompt(" three short  words", id="a")
        assert client.receive_answer() == [
            text_chunk(" ", id="a"),
            text_chunk("three ", id="a"),
            text_chunk("short  ", id="a"),
            text_chunk("words", id="a"),
            end(4, id="a"),
        ]


def test_reasoning_is_sent_and_not_counted_as_tokens() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.reasoning("hmm")
        await reply.text("yes")

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        assert client.receive_answer() == [
            {"type": "AGENT_EVENT_REASONING_CHUNK", "id": "a", "text": "hmm"},
            text_chunk("yes", id="a"),
            end(1, id="a"),
        ]


def test_a_handler_can_say_how_many_tokens_were_used() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        reply.tokens_used = 1_234

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        assert client.receive_answer() == [end(1_234, id="a")]


def test_a_handler_can_end_the_request_with_an_error() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.error("overloaded", "later", retry_after=1.5)

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        assert client.receive() == error("overloaded", "later", id="a", retry_after=1.5)
        client.prompt("?", id="b")
        assert client.receive() == error("overloaded", "later", id="b", retry_after=1.5)


def test_nothing_of_a_request_can_be_sent_after_its_end() -> None:
    refused: list[str] = []

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        assert not reply.ended
        await reply.end("incomplete")
        assert reply.ended
        for send in (
            lambda: reply.text("more"),
            lambda: reply.reasoning("more"),
            lambda: reply.tool_call("tool", "{}"),
            lambda: reply.error("code", "details"),
            lambda: reply.end(),
        ):
            with pytest.raises(RuntimeError, match="the request has ended"):
                await send()
            refused.append("refused")

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        for request_id in ("a", "b"):
            client.prompt("?", id=request_id)
            assert client.receive() == end(0, id=request_id, status="incomplete")
    assert refused == ["refused"] * 10


def test_a_handler_can_send_any_struct_and_any_message_as_they_are() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.send(om.EventTextChunk(id="another", text="x", seq=7))
        await reply.send(om.EventEnd(tokens_used=9))
        await reply.raw("text")
        await reply.raw(b"binary")

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        assert client.receive() == text_chunk("x", id="another", seq=7)
        assert client.receive() == end(9)
        assert client.websocket.recv(timeout=DEADLINE) == "text"
        assert client.websocket.recv(timeout=DEADLINE) == b"binary"
        assert client.receive() == end(0, id="a")


class Outcome(BaseException):
    """What a test framework raises to fail a test is no `Exception` either."""


@pytest.mark.parametrize("failure", [ValueError, ExceptionGroup, Outcome, asyncio.CancelledError])
@pytest.mark.parametrize("wire", WIRES)
def test_a_handler_that_raises_ends_its_request_with_the_name_of_the_type_alone(
    wire: Wire, failure: type[BaseException]
) -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        if message.text == "fail":
            raise ExceptionGroup("secret", [ValueError()]) if failure is ExceptionGroup else failure("secret")
        await reply.text("fine")

    with embedded_agent(handler, wire=wire) as agent, connect(agent.url) as client:
        fields = {"id": "a"} if wire == "native" else {}
        client.prompt("fail", **fields)
        assert client.receive() == error("internal_error", failure.__name__, **fields)
        client.prompt("again", **fields)
        assert client.receive_answer() == [text_chunk("fine", **fields), end(1, **fields)]


def test_a_handler_that_raises_after_its_end_sends_no_second_terminal() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.end()
        raise ValueError

    with embedded_agent(handler, wire="single") as agent, connect(agent.url) as client:
        client.prompt("?")
        client.prompt("?")
        client.send(type="CANCEL", id="ignored")
        assert [client.receive(), client.receive()] == [end(0), end(0)]


# Tool calls.


async def use_tool(message: im.UserMessage, reply: AgentReply) -> None:
    await reply.text(await reply.tool_call("shout", '{"text":"hi"}'))


@pytest.mark.parametrize("wire", WIRES)
def test_a_tool_call_returns_the_output_that_the_client_sends(wire: Wire) -> None:
    fields = {"id": "a"} if wire == "native" else {}
    with embedded_agent(use_tool, wire=wire) as agent, connect(agent.url) as client:
        client.prompt("?", **fields)
        call = client.receive()
        call_id = call.pop("call_id")
        assert call == {
            "type": "AGENT_EVENT_TOOL_CALL",
            "name": "shout",
            "arguments": '{"text":"hi"}',
            **fields,
        }
        client.send(type="TOOL_RESULT", call_id=call_id, output="HI", **fields)
        assert client.receive_answer() == [text_chunk("HI", **fields), end(1, **fields)]


def test_tool_results_are_told_apart_by_request_and_call_and_others_are_ignored() -> None:
    with embedded_agent(use_tool) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        client.prompt("?", id="b")
        calls = {call["id"]: call["call_id"] for call in (client.receive(), client.receive())}
        assert len(set(calls.values())) == 2
        client.send(type="TOOL_RESULT", id="a", call_id="unheard of", output="wrong")
        client.send(type="TOOL_RESULT", id="a", call_id=calls["b"], output="wrong")
        client.send(type="TOOL_RESULT", id="b", call_id=calls["b"], output="for b")
        client.send(type="TOOL_RESULT", id="b", call_id=calls["b"], output="too late")
        assert client.receive_answer() == [text_chunk("for b", id="b"), end(1, id="b")]
        client.send(type="TOOL_RESULT", id="a", call_id=calls["a"], output="for a")
        assert client.receive_answer() == [text_chunk("for a", id="a"), end(1, id="a")]


def test_a_result_for_a_cancelled_tool_call_is_ignored() -> None:
    with embedded_agent(use_tool) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        call_id = client.receive()["call_id"]
        client.send(type="CANCEL", id="a")
        assert client.receive() == end(0, id="a", status="cancelled")
        client.send(type="TOOL_RESULT", id="a", call_id=call_id, output="late")
        client.prompt("?", id="a")
        assert client.receive()["call_id"] != call_id


def test_a_cancelled_tool_call_leaves_nothing_behind() -> None:
    left: list[int] = []

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        try:
            await reply.tool_call("tool", "{}")
        finally:
            left.append(len(reply._tool_calls._open))

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        client.receive()
        client.send(type="CANCEL", id="a")
        client.receive_answer()
    assert left == [0]
