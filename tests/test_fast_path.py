"""What the fast path does without: the WebSocket library for plain texts, wake-ups, writes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from anyagent import OM, _transports, open_agent
from anyagent._target import Target
from anyagent._transports import Transport, Waker, connect
from anyagent._transports.asyncio import AsyncioTransport
from anyagent._transports.trio import TrioTransport
from anyagent.testing import memory_agent

from .wire_server import PING, TEXT, Frame, Peer, chunk, end, frame, serve, text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from anyagent.testing import MemoryPeer

pytestmark = pytest.mark.anyio


class CountingWaker:
    """Counts how often it has woken a task."""

    made: list[CountingWaker]

    def __init__(self) -> None:
        self.woken = 0
        self._waits = False
        self._waker = _transports._backend().waker_factory()()
        self.made.append(self)

    def wait(self) -> Awaitable[None]:
        self._waits = True
        return self._waker.wait()

    def wake(self) -> None:
        self.woken += self._waits
        self._waits = False
        self._waker.wake()


@pytest.fixture
def wakers(monkeypatch: pytest.MonkeyPatch) -> list[CountingWaker]:
    """All wakers, in the order in which they were made: those of the connection come first."""

    class OfThisTest(CountingWaker):
        made: list[CountingWaker] = []  # noqa: RUF012 - a class of its own for each test

    def waker_factory() -> type[Waker]:
        return OfThisTest

    monkeypatch.setattr(_transports, "waker_factory", waker_factory)
    return OfThisTest.made


async def deliver(peer: MemoryPeer, request_id: str | None, batches: int) -> None:
    """Let `batches` of 100 chunks each arrive, one after the other, and the end with the last of them."""
    chunks = [OM.EventTextChunk("x", id=request_id) for _ in range(100)]
    for _ in range(batches - 1):
        peer.send(*chunks)
        await anyio.wait_all_tasks_blocked()
    peer.send(*chunks, OM.EventEnd(7, id=request_id))


async def test_a_consumer_is_woken_once_for_everything_that_was_read_at_once(
    wakers: list[CountingWaker],
) -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        events: list[OM.AgentEvent] = []

        async def consume() -> None:
            async for event in response:
                events.append(event)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            await anyio.wait_all_tasks_blocked()
            await deliver(peer, response.id, 3)
        assert len(events) == 300
        *_, waker = wakers
        assert waker.woken == 3


async def test_asking_wakes_its_caller_once(wakers: list[CountingWaker]) -> None:
    async with memory_agent() as (agent, peer):

        async def ask() -> None:
            reply = await agent.ask("hello")
            assert (reply.text, reply.tokens_used) == (1_000 * "x", 7)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await deliver(peer, (await peer.receive()).id, 10)
        *_, waker = wakers
        assert waker.woken == 1


async def test_whatever_comes_with_one_read_finds_room() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        request_id = (await peer.receive()).id
        # What cannot be joined, in frames of 53 bytes on average: as many as there are in 1 MiB.
        pair = (OM.EventTextChunk("x", id=request_id), OM.EventReasoningChunk("y", id=request_id))
        peer.send(*10_000 * pair, OM.EventEnd(1, id=request_id))
        assert len([event async for event in response]) == 20_000


async def test_nothing_that_arrives_after_the_block_was_left_is_processed() -> None:
    notices: list[OM.ServerMessage] = []
    peers: list[MemoryPeer] = []

    async def send_late() -> None:
        (peer,) = peers
        while peer.close_code is None:
            await anyio.lowlevel.checkpoint()
        peer.send(OM.Status("late"), OM.Status("later"))
        peer.send(OM.Status("too late"))
        peer.close()

    async with anyio.create_task_group() as tasks, memory_agent(on_notice=notices.append) as (agent, peer):
        peer.answers_close = False
        peers.append(peer)
        tasks.start_soon(send_late)
    assert notices == []
    assert agent.status == OM.Status("ready", ("ids", "cancel"))


async def test_prompts_that_are_ready_together_are_given_to_the_transport_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writes: list[int] = []

    async with memory_agent() as (agent, peer):
        transport = agent._supervisor._sessions[0]._transport
        real = transport.send

        async def send(messages: list[bytes]) -> None:
            writes.append(len(messages))
            await real(messages)

        monkeypatch.setattr(transport, "send", send)
        peer.writable = anyio.Event()
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(agent.ask, "hello")
            await anyio.wait_all_tasks_blocked()
            peer.writable.set()
            for _ in range(100):
                message = await peer.receive()
                peer.send(OM.EventEnd(1, id=message.id))
        assert sum(writes) == 100
        assert len(writes) <= 2


class CountingStream:
    """Counts the writes to a stream."""

    def __init__(self, stream: Any) -> None:
        self.writes = 0
        self._stream = stream

    async def send(self, data: bytes) -> None:
        self.writes += 1
        await self._stream.send(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.asynccontextmanager
async def transport_to(url: str) -> AsyncIterator[AsyncioTransport | TrioTransport]:
    async with anyio.create_task_group() as tasks:
        transport: Transport = await connect(Target.parse(url), 10_000_000, tasks)
        assert isinstance(transport, AsyncioTransport | TrioTransport)
        try:
            yield transport
        finally:
            await transport.aclose()


@pytest.mark.sockets
async def test_messages_pongs_and_pings_that_are_ready_together_are_one_write() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.send(frame(PING, b"1") + frame(PING, b"2") + text(b"x"))
        received = [peer.receive() for _ in range(5)]
        assert received.count(Frame(PING, b"")) == 1
        assert [each for each in received if each.opcode == TEXT] == [
            Frame(TEXT, b"one"),
            Frame(TEXT, b"two"),
        ]
        peer.wait_gone()

    async with serve(script) as server, transport_to(server.url) as transport:
        messages: list[bytes] = []
        while not messages:
            messages += await transport.receive()
        stream = CountingStream(transport._stream)
        transport._stream = stream  # type: ignore[assignment]
        transport.ping()
        await transport.send([b"one", b"two"])
        assert stream.writes == 1


@pytest.mark.sockets
async def test_the_library_never_sees_plain_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        request_id = peer.receive_prompt()
        for _ in range(100):
            peer.send(text(chunk(request_id, "x")))
        peer.send(text(end(request_id)))
        peer.finish()

    async with serve(script) as server, open_agent(server.url) as agent:
        transport = agent._supervisor._sessions[0]._transport
        seen: list[bytes] = []
        if isinstance(transport, AsyncioTransport):
            monkeypatch.setattr(transport._protocol, "receive_data", seen.append)
        else:
            assert isinstance(transport, TrioTransport)
            monkeypatch.setattr(transport._feed, "put", seen.append)
        assert (await agent.ask("hello")).text == 100 * "x"
        assert seen == []
        monkeypatch.undo()
