"""How connections to the embedded agent end, and how it ends itself."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.lowlevel
import pytest
from websockets.exceptions import ConnectionClosed

from anyagent.testing import AgentReply, embedded_agent
from anyagent.testing import _server as server_module

from .raw_client import DEADLINE, connect, connect_raw

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from anyagent import im

Wire = Literal["native", "single"]
WIRES: Sequence[Wire] = ("native", "single")


def agent_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "anyagent embedded agent"]


async def hang(message: im.UserMessage, reply: AgentReply) -> None:
    await reply.hang()


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
