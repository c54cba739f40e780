"""How the embedded agent keeps requests apart, cancels them and refuses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from websockets.exceptions import ConnectionClosed

from anyagent.testing import AgentReply, embedded_agent

from .raw_client import connect, end, error, text_chunk

if TYPE_CHECKING:
    from anyagent import im


async def hang(message: im.UserMessage, reply: AgentReply) -> None:
    await reply.hang()


async def use_tool(message: im.UserMessage, reply: AgentReply) -> None:
    await reply.text(await reply.tool_call("tool", "{}"))


async def hang_if_told(message: im.UserMessage, reply: AgentReply) -> None:
    if message.text == "hang":
        await reply.hang()
    await reply.text(message.text)


def test_requests_with_ids_are_answered_at_the_same_time() -> None:
    with embedded_agent(hang_if_told) as agent, connect(agent.url) as client:
        client.prompt("hang", id="a")
        client.prompt("Hello", id="b")
        assert client.receive_answer() == [text_chunk("Hello", id="b"), end(1, id="b")]


def test_requests_without_ids_are_answered_one_after_the_other() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text(await reply.tool_call(message.text, "{}"))

    with embedded_agent(handler, wire="single") as agent, connect(agent.url) as client:
        for name in ("one", "two", "three"):
            client.prompt(name)
        for name in ("one", "two", "three"):
            call = client.receive()
            assert call["name"] == name
            client.send(type="TOOL_RESULT", call_id=call["call_id"], output=name.upper())
            assert client.receive_answer() == [text_chunk(name.upper()), end(1)]


def test_the_single_wire_ignores_ids_and_cancels() -> None:
    ids: list[str | None] = []

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        ids.append(reply.id)
        await reply.text(await reply.tool_call("tool", "{}"))

    with embedded_agent(handler, wire="single") as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        call = client.receive()
        assert "id" not in call
        client.send(type="CANCEL", id="a")
        client.send(type="TOOL_RESULT", call_id=call["call_id"], output="still here")
        assert client.receive_answer() == [text_chunk("still here"), end(1)]
    assert ids == [None]


def test_the_native_wire_answers_a_request_without_an_id_without_one() -> None:
    with embedded_agent() as agent, connect(agent.url) as client:
        client.prompt("Hello")
        assert client.receive_answer() == [text_chunk("Hello"), end(1)]


def test_a_cancel_cancels_the_handler_and_ends_the_request_as_cancelled() -> None:
    cancelled: list[str | None] = []

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        try:
            await reply.text("partial")
            await reply.hang()
        except anyio.get_cancelled_exc_class():
            cancelled.append(reply.id)
            raise

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        assert client.receive() == text_chunk("partial", id="a")
        client.send(type="CANCEL", id="unheard of")
        client.send(type="CANCEL", id="a")
        client.send(type="CANCEL", id="a")
        assert client.receive() == end(1, id="a", status="cancelled")
        assert cancelled == ["a"]


def test_a_handler_that_sends_without_a_pause_is_cancelled_all_the_same() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        while True:
            await reply.text("more")

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        assert client.receive() == text_chunk("more", id="a")
        client.send(type="CANCEL", id="a")
        assert client.receive_answer()[-1]["status"] == "cancelled"


def test_a_handler_that_finishes_in_spite_of_a_cancel_has_completed() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        try:
            await reply.hang()
        except anyio.get_cancelled_exc_class():
            reply.tokens_used = 5

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        client.send(type="CANCEL", id="a")
        assert client.receive() == end(5, id="a")


def test_a_cancel_is_ignored_without_the_feature() -> None:
    with embedded_agent(use_tool, features=["ids"]) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        call_id = client.receive()["call_id"]
        client.send(type="CANCEL", id="a")
        client.send(type="TOOL_RESULT", id="a", call_id=call_id, output="still here")
        assert client.receive_answer() == [text_chunk("still here", id="a"), end(1, id="a")]


def test_a_request_beyond_the_limit_is_refused_as_busy() -> None:
    with embedded_agent(hang_if_told, max_in_flight=2) as agent, connect(agent.url) as client:
        client.prompt("hang", id="a")
        client.prompt("hang", id="b")
        client.prompt("Hello", id="c")
        assert client.receive() == error("busy", "2 requests are in flight", id="c")


def test_the_limit_counts_neither_cancelled_nor_answered_requests() -> None:
    with embedded_agent(hang_if_told, max_in_flight=1) as agent, connect(agent.url) as client:
        client.prompt("hang", id="a")
        client.send(type="CANCEL", id="a")
        client.prompt("Hello", id="b")
        messages = [client.receive(), client.receive(), client.receive()]
        assert end(0, id="a", status="cancelled") in messages
        assert [message for message in messages if message["id"] == "b"] == [
            text_chunk("Hello", id="b"),
            end(1, id="b"),
        ]
        client.prompt("Hello", id="c")
        assert client.receive_answer() == [text_chunk("Hello", id="c"), end(1, id="c")]


def test_a_cancelled_request_that_takes_its_time_does_not_free_the_id_of_its_successor() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        try:
            await reply.hang()
        finally:
            with anyio.CancelScope(shield=True):
                await reply.tool_call(message.text, "{}")

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("first", id="a")
        client.send(type="CANCEL", id="a")
        call_id = client.receive()["call_id"]
        client.prompt("second", id="a")
        client.send(type="TOOL_RESULT", id="a", call_id=call_id, output="")
        assert client.receive() == end(0, id="a", status="cancelled")
        client.prompt("third", id="a")
        assert client.receive()["code"] == "duplicate_id"
        client.send(type="CANCEL", id="a")
        call = client.receive()
        assert call["name"] == "second"
        client.send(type="TOOL_RESULT", id="a", call_id=call["call_id"], output="")
        assert client.receive() == end(0, id="a", status="cancelled")


def test_the_id_of_a_live_request_is_refused_and_that_of_an_ended_one_is_not() -> None:
    with embedded_agent(use_tool) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        call_id = client.receive()["call_id"]
        client.prompt("?", id="a")
        assert client.receive() == error("duplicate_id", "a request with this id is in flight", id="a")
        client.send(type="TOOL_RESULT", id="a", call_id=call_id, output="done")
        assert client.receive_answer() == [text_chunk("done", id="a"), end(1, id="a")]
        client.prompt("?", id="a")
        assert client.receive()["type"] == "AGENT_EVENT_TOOL_CALL"


@pytest.mark.parametrize(
    "data", ["no JSON", '{"type":"NO_SUCH_TYPE"}', '{"type":"USER_MESSAGE"}', "[" * 9_999]
)
def test_a_message_that_is_none_of_a_client_closes_the_connection(data: str) -> None:
    with embedded_agent(hang) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        client.websocket.send(data)
        with pytest.raises(ConnectionClosed) as caught:
            client.receive()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1002
        agent.wait_for_connections(0)
