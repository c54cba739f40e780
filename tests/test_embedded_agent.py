"""The embedded agent, seen from clients that speak the wire by hand."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trustme
from websockets.exceptions import ConnectionClosed

import anyagent.testing
from anyagent import im, om
from anyagent.testing import AgentReply, EmbeddedAgent, Handler, echo, embedded_agent
from anyagent.testing import _embedded as embedded_module
from anyagent.testing import _server as server_module
from anyagent.testing._connection import Connection

from .raw_client import DEADLINE, connect, connect_before_status, connect_raw

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

Wire = Literal["native", "single"]
WIRES: Sequence[Wire] = ("native", "single")


def agent_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "anyagent embedded agent"]


async def hang(message: im.UserMessage, reply: AgentReply) -> None:
    await reply.hang()


async def hang_if_told(message: im.UserMessage, reply: AgentReply) -> None:
    if message.text == "hang":
        await reply.hang()
    await reply.text(message.text)


def text_chunk(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "AGENT_EVENT_TEXT_CHUNK", "text": text, **fields}


def end(tokens_used: int, **fields: Any) -> dict[str, Any]:
    return {"type": "AGENT_EVENT_END", "tokens_used": tokens_used, **fields}


def error(code: str, details: str, **fields: Any) -> dict[str, Any]:
    return {"type": "ERROR", "code": code, "details": details, **fields}


# The first message of a connection.


def test_the_native_wire_opens_with_the_features_ids_and_cancel() -> None:
    with embedded_agent() as agent, connect_before_status(agent.url) as client:
        assert client.receive() == {"type": "STATUS", "state": "ready", "features": ["ids", "cancel"]}


def test_the_single_wire_opens_with_a_status_without_features() -> None:
    with embedded_agent(wire="single") as agent, connect_before_status(agent.url) as client:
        assert client.receive() == {"type": "STATUS", "state": "ready"}


def test_the_status_names_the_limit_and_the_overridden_features() -> None:
    with (
        embedded_agent(max_in_flight=3, features=["ids"]) as agent,
        connect_before_status(agent.url) as client,
    ):
        assert client.receive() == {
            "type": "STATUS",
            "state": "ready",
            "features": ["ids"],
            "max_in_flight": 3,
        }


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (om.Status("busy", session="s"), '{"type":"STATUS","state":"busy","session":"s"}'),
        (om.Status("ready"), '{"type":"STATUS","state":"ready"}'),
        (om.Error(code=1, details="no"), '{"type":"ERROR","code":1,"details":"no"}'),
        ("no JSON", "no JSON"),
        (b"binary", b"binary"),
    ],
)
def test_the_first_message_can_be_anything(
    status: om.ServerMessage | str | bytes, expected: str | bytes
) -> None:
    with embedded_agent(status=status) as agent, connect_before_status(agent.url) as client:
        assert client.websocket.recv(timeout=DEADLINE) == expected


def test_the_first_message_can_be_left_out() -> None:
    with embedded_agent(status=None) as agent, connect_before_status(agent.url) as client:
        client.prompt("Hello", id="a")
        assert client.receive() == text_chunk("Hello", id="a")


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


# Many requests, and how they are cancelled.


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


# Connections that end.


@pytest.mark.parametrize("wire", WIRES)
def test_handlers_are_cancelled_when_the_connection_goes_away(wire: Wire) -> None:
    ended: list[str] = []

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        try:
            await reply.text("started")
            await reply.hang()
        finally:
            ended.append(message.text)

    with embedded_agent(handler, wire=wire) as agent:
        with connect(agent.url) as client:
            client.prompt("one", id="a")
            client.prompt("two", id="b")
            assert client.receive()["text"] == "started"
            agent.wait_for(lambda message: message.id == "b")
        agent.wait_for_connections(0)
    assert sorted(ended) == (["one", "two"] if wire == "native" else ["one"])


def test_sending_on_a_lost_connection_does_nothing_in_a_shield_and_is_a_cancellation_elsewhere() -> None:
    progress: list[str] = []

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        try:
            await reply.text("started")
            await reply.hang()
        finally:
            with anyio.CancelScope(shield=True):
                await reply.text("into the void")
            progress.append("shielded")
            with pytest.raises(anyio.get_cancelled_exc_class()):
                await reply.text("into the void")
            progress.append("cancelled")

    with embedded_agent(handler) as agent:
        with connect(agent.url) as client:
            client.prompt("?", id="a")
            assert client.receive()["text"] == "started"
        agent.wait_for_connections(0)
    assert progress == ["shielded", "cancelled"]


def test_a_handler_that_fails_while_the_connection_goes_away_harms_nobody() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        try:
            await reply.text("started")
            await reply.hang()
        finally:
            raise ValueError

    with embedded_agent(handler) as agent, connect(agent.url) as other:
        with connect(agent.url) as client:
            client.prompt("?", id="a")
            assert client.receive()["text"] == "started"
        agent.wait_for_connections(1)
        other.prompt("?", id="a")
        assert other.receive()["text"] == "started"


def test_leaving_the_block_closes_connections_as_going_away_and_joins_the_thread() -> None:
    before = agent_threads()
    with contextlib.ExitStack() as stack:
        agent = stack.enter_context(embedded_agent(hang))
        assert len(agent_threads()) == len(before) + 1
        with connect(agent.url) as client:
            client.prompt("?", id="a")
            agent.wait_for(lambda message: message.id == "a")
            stack.close()
            with pytest.raises(ConnectionClosed) as caught:
                client.receive()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1001
    assert agent_threads() == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", agent.port), timeout=DEADLINE)


def test_an_exception_of_the_block_comes_out_as_itself() -> None:
    before = agent_threads()
    failure = KeyError("mine")
    with pytest.raises(KeyError) as caught, embedded_agent():
        raise failure
    assert caught.value is failure
    assert agent_threads() == before


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_CLOSE_TIMEOUT", 0.05)
    monkeypatch.setattr(server_module, "_GRACE", 0.5)


@pytest.mark.usefixtures("short_patience")
def test_leaving_the_block_waits_neither_for_a_handshake_nor_for_a_close_frame() -> None:
    with contextlib.ExitStack() as stack:
        agent = stack.enter_context(embedded_agent())
        with (
            socket.create_connection(("127.0.0.1", agent.port), DEADLINE) as opening,
            connect_raw(agent.url) as silent,
        ):
            stack.close()
            assert silent.receive_to_eof() == b"\x88\x02\x03\xe9"
            assert opening.recv(1) == b""


@pytest.mark.usefixtures("short_patience")
def test_a_handler_that_shields_itself_is_cancelled_by_force() -> None:
    ended: list[str] = []

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        try:
            with anyio.CancelScope(shield=True):
                await reply.text("started")
                await anyio.sleep_forever()
        finally:
            ended.append(message.text)

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("one", id="a")
        assert client.receive()["text"] == "started"
    assert ended == ["one"]


def test_asynchronous_generators_are_closed_before_the_thread_ends() -> None:
    kept: list[AsyncIterator[int]] = []
    closed: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await anyio.lowlevel.checkpoint()
            closed.append("closed")

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        kept.append(numbers())
        await anext(kept[0])

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        client.receive_answer()
        assert closed == []
    assert closed == ["closed"]


@pytest.mark.usefixtures("short_patience")
def test_a_handler_that_ignores_its_cancellation_is_abandoned_with_an_error() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("started")
        while True:
            with contextlib.suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep_forever()

    before = agent_threads()
    with contextlib.ExitStack() as stack:
        agent = stack.enter_context(embedded_agent(handler))
        with connect(agent.url) as client:
            client.prompt("?", id="a")
            assert client.receive()["text"] == "started"
        with pytest.raises(RuntimeError, match="did not end when it was cancelled"):
            stack.close()
    assert agent_threads() == before


@pytest.mark.usefixtures("short_patience")
def test_a_handler_that_blocks_the_thread_is_reported() -> None:
    release = threading.Event()

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text("started")
        release.wait(DEADLINE)

    before = agent_threads()
    with contextlib.ExitStack() as stack:
        agent = stack.enter_context(embedded_agent(handler))
        with connect_raw(agent.url) as client:
            client.send_frame(0x81, b'{"type":"USER_MESSAGE","text":"?"}')
            client.receive_until(b"started")
        with pytest.raises(RuntimeError, match="blocks the thread"):
            stack.close()
    release.set()
    for thread in set(agent_threads()) - set(before):
        thread.join(DEADLINE)
    assert agent_threads() == before


# Starting.


def test_a_port_in_use_is_an_oserror() -> None:
    before = agent_threads()
    with (
        embedded_agent() as agent,
        pytest.raises(OSError, match="in use") as caught,
        embedded_agent(port=agent.port),
    ):
        pass
    assert caught.value.errno == errno.EADDRINUSE
    assert agent_threads() == before


def test_a_start_that_fails_in_the_thread_comes_out_as_itself() -> None:
    before = agent_threads()
    not_a_context: Any = True
    with pytest.raises(TypeError, match="ssl argument"), embedded_agent(ssl_context=not_a_context):
        pass
    assert agent_threads() == before


def test_an_unknown_wire_is_a_value_error() -> None:
    telegraph: Any = "telegraph"
    with pytest.raises(ValueError, match="'telegraph'"), embedded_agent(wire=telegraph):
        pass


def test_agents_are_independent_of_each_other() -> None:
    with embedded_agent(hang) as first, embedded_agent() as second:
        assert first.port != second.port
        with connect(first.url) as client, connect(second.url) as other:
            client.prompt("one", id="a")
            other.prompt("two", id="a")
            assert other.receive_answer() == [text_chunk("two", id="a"), end(1, id="a")]
            first.wait_for(lambda message: message.id == "a")
        assert [message.text for message in first.received if isinstance(message, im.UserMessage)] == ["one"]


def test_an_agent_can_listen_on_all_interfaces_and_its_url_leads_to_loopback() -> None:
    with embedded_agent(host="0.0.0.0") as agent, connect(agent.url) as client:
        assert agent.url == f"ws://127.0.0.1:{agent.port}"
        client.prompt("Hello", id="a")
        assert client.receive_answer() == [text_chunk("Hello", id="a"), end(1, id="a")]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "ws://127.0.0.1:80"),
        ("0.0.0.0", "ws://127.0.0.1:80"),
        ("::1", "ws://[::1]:80"),
        ("::", "ws://[::1]:80"),
    ],
)
def test_a_url_is_one_to_connect_to(host: str, url: str) -> None:
    assert embedded_module._url("ws", host, 80) == url


def test_an_agent_can_be_served_over_tls() -> None:
    authority = trustme.CA()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)
    with (
        embedded_agent(ssl_context=server_context) as agent,
        connect_raw(agent.url, client_context) as client,
    ):
        assert agent.url == f"wss://127.0.0.1:{agent.port}"
        client.send_frame(0x81, b'{"type":"USER_MESSAGE","text":"Hello"}')
        assert client.receive_until(b"}")[2:] == b'{"type":"AGENT_EVENT_TEXT_CHUNK","text":"Hello"}'
        assert client.receive_until(b"}")[2:] == b'{"type":"AGENT_EVENT_END","tokens_used":1}'


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_agent_can_be_used_from_any_event_loop(backend: str) -> None:
    def talk(agent: EmbeddedAgent) -> list[dict[str, Any]]:
        with connect(agent.url) as client:
            client.prompt("Hello", id="a")
            agent.wait_for(lambda message: message.id == "a")
            return client.receive_answer()

    async def main() -> list[dict[str, Any]]:
        with anyio.fail_after(DEADLINE), embedded_agent() as agent:
            return await anyio.to_thread.run_sync(talk, agent)

    assert anyio.run(main, backend=backend) == [text_chunk("Hello", id="a"), end(1, id="a")]


def test_an_agent_uses_an_event_loop_of_its_own_whatever_the_application_has_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asyncio, "new_event_loop", None)
    loops: list[asyncio.AbstractEventLoop] = []

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        loops.append(asyncio.get_running_loop())

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        client.receive_answer()
    assert [type(loop) for loop in loops] == [asyncio.SelectorEventLoop]
    assert loops[0].is_closed()


def test_small_messages_are_not_held_back_by_nagles_algorithm() -> None:
    options: list[int] = []

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        sock = reply._link.websocket.transport.get_extra_info("socket")
        options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        client.receive_answer()
    assert options == [1]


def test_compression_is_not_negotiated_and_large_prompts_are_taken() -> None:
    prompt = "x" * 3_000_000
    with embedded_agent() as agent, connect(agent.url, compression="deflate") as client:
        assert client.websocket.response is not None
        assert "Sec-WebSocket-Extensions" not in client.websocket.response.headers
        client.prompt(prompt, id="a")
        assert client.receive_answer() == [text_chunk(prompt, id="a"), end(1, id="a")]


# What the agent tells of.


def test_received_messages_are_kept_in_order_of_arrival() -> None:
    with embedded_agent() as agent, connect(agent.url) as one, connect(agent.url) as two:
        one.prompt("first", id="a", conversation="c", metadata={"n": 1})
        agent.wait_for(lambda message: message.id == "a")
        two.send(type="CANCEL", id="b")
        agent.wait_for(lambda message: isinstance(message, im.Cancel))
        one.send(type="TOOL_RESULT", id="a", call_id="x", output="y")
        agent.wait_for(lambda message: isinstance(message, im.ToolResult))
        assert list(agent.received) == [
            im.UserMessage(id="a", text="first", conversation="c", metadata={"n": 1}),
            im.Cancel(id="b"),
            im.ToolResult(id="a", call_id="x", output="y"),
        ]


def test_wait_for_returns_the_oldest_message_that_fits() -> None:
    with embedded_agent() as agent, connect(agent.url) as client:
        for name in ("a", "b", "c"):
            client.prompt(name, id=name)
        assert agent.wait_for(lambda message: message.id == "c").id == "c"
        assert agent.wait_for(lambda message: message.id != "a").id == "b"


def test_waiting_threads_are_woken_by_what_they_wait_for() -> None:
    waiting = threading.Event()

    def is_b(message: im.ClientMessage) -> bool:
        waiting.set()  # what comes now finds the thread asleep
        return message.id == "b"

    with embedded_agent() as agent:
        with connect(agent.url) as client:
            client.prompt("Hello", id="a")
            client.receive_answer()
            waiter = threading.Thread(target=agent.wait_for, args=(is_b, 600), daemon=True)
            waiter.start()
            assert waiting.wait(DEADLINE)
            client.prompt("Hello", id="b")
            waiter.join(DEADLINE)
            assert not waiter.is_alive()
            waiter = threading.Thread(target=agent.wait_for_connections, args=(0, 600), daemon=True)
            waiter.start()
        waiter.join(DEADLINE)
        assert not waiter.is_alive()
        waiter = threading.Thread(target=agent.wait_for_connections, args=(1, 600), daemon=True)
        waiter.start()
        with connect(agent.url):
            waiter.join(DEADLINE)
            assert not waiter.is_alive()


def test_wait_for_gives_up_after_its_timeout() -> None:
    with embedded_agent() as agent, connect(agent.url) as client:
        client.prompt("Hello", id="a")
        client.receive_answer()
        with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
            agent.wait_for(lambda message: message.id == "b", timeout=0.01)
        with pytest.raises(TimeoutError):
            agent.wait_for_connections(2, timeout=0.01)


def test_connections_are_counted() -> None:
    with embedded_agent() as agent:
        assert (agent.connections, agent.connections_total) == (0, 0)
        with connect(agent.url), connect(agent.url):
            assert (agent.connections, agent.connections_total) == (2, 2)
        agent.wait_for_connections(0)
        with connect(agent.url):
            assert (agent.connections, agent.connections_total) == (1, 3)


def test_a_broadcast_reaches_every_connection_whose_status_has_arrived() -> None:
    with embedded_agent() as agent, connect(agent.url) as one, connect(agent.url) as two:
        agent.broadcast(om.GracefulDisconnect(reason="maintenance", deadline=2.5))
        for client in (one, two):
            assert client.receive() == {
                "type": "GRACEFUL_DISCONNECT",
                "reason": "maintenance",
                "deadline": 2.5,
            }


def test_a_broadcast_to_a_new_connection_comes_after_its_status() -> None:
    class Connections(set[Connection]):
        def add(self, connection: Connection) -> None:
            super().add(connection)
            agent.broadcast(om.GracefulDisconnect())

    with embedded_agent() as agent:
        agent._connections = Connections()
        with connect_before_status(agent.url) as client:
            assert client.receive()["type"] == "STATUS"
            assert client.receive()["type"] == "GRACEFUL_DISCONNECT"


def test_a_handler_can_broadcast() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        agent.broadcast(om.Status("busy"))
        await reply.hang()

    with embedded_agent(handler) as agent, connect(agent.url) as one, connect(agent.url) as two:
        one.prompt("?", id="a")
        assert two.receive() == {"type": "STATUS", "state": "busy"}


def test_a_stopped_agent_cannot_broadcast() -> None:
    with embedded_agent() as agent:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        agent.broadcast(om.Status("busy"))


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        raise ValueError(message.text)

    caplog.set_level(logging.DEBUG)
    with embedded_agent(handler) as agent:
        with connect(f"{agent.url}/?token=secret") as client:
            client.prompt("a prompt", id="a")
            assert client.receive()["type"] == "ERROR"
            client.websocket.send("no JSON")
            with pytest.raises(ConnectionClosed):
                client.receive()
        with socket.create_connection(("127.0.0.1", agent.port), DEADLINE) as sock:
            sock.sendall(b"GET /?token=secret HTTP/1.1\r\n\r\n")
            assert b"426 Upgrade Required" in sock.recv(65_536)
    assert [record for record in caplog.records if record.name != "asyncio"] == []
    assert "secret" not in caplog.text
    assert "prompt" not in caplog.text


# The module.


def test_every_public_name_of_the_module_can_be_imported() -> None:
    for name in anyagent.testing.__all__:
        assert getattr(anyagent.testing, name) is not None
    handler: Handler = echo
    assert anyagent.testing.echo is handler


def test_the_module_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = anyagent.testing.no_such_name
