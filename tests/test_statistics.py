"""`Agent.stats`: every counter counts what it says, over all connections, and the whole is a snapshot."""

from __future__ import annotations

import dataclasses
import socket
import threading
from typing import TYPE_CHECKING

import anyio
import pytest

from anyagent import (
    OM,
    Agent,
    AgentError,
    AgentStats,
    Backoff,
    ConnectError,
    Disconnected,
    Heartbeat,
    Limits,
    Reply,
    Response,
    SlowConsumerError,
    Timeouts,
    open_agent,
    open_pool,
)
from anyagent.testing import AgentReply, MemoryPeer, embedded_agent, memory_agent

from .peers import SINGLE, Peers
from .wire_server import CONTINUATION, DEADLINE, PING, STATUS, TEXT, Peer, chunk, end, frame, serve, text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from _typeshed import ReadableBuffer

    from anyagent import IM

pytestmark = pytest.mark.anyio


async def begin(agent: Agent, peer: MemoryPeer) -> Response:
    response = await agent.send_message("hello")
    await peer.receive()
    return response


def texts(response: Response, *parts: str) -> list[OM.EventTextChunk]:
    return [OM.EventTextChunk(part, id=response.id) for part in parts]


def size_of(*events: OM.ServerMessage) -> int:
    return sum(map(len, map(OM.encode, events)))


# Requests


async def test_an_agent_that_was_just_opened_has_one_connection_and_else_nothing() -> None:
    async with memory_agent() as (agent, _):
        assert agent.stats == AgentStats(connections=1, open_connections=1)
    assert agent.stats == AgentStats(connections=1, open_connections=0)


async def test_every_request_is_counted_once_and_ends_as_one_of_three() -> None:
    async with memory_agent(limits=Limits(response_events=2)) as (agent, peer):
        responses = [await begin(agent, peer) for _ in range(7)]
        completed, failed, invalid, slow, left, timed_out, live = responses
        peer.send(
            OM.EventEnd(1, id=completed.id),
            OM.Error("busy", "later", id=failed.id),
            b'{"type":"AGENT_EVENT_TEXT_CHUNK","text":5,"id":"%s"}' % invalid.id.encode(),
            *(OM.EventToolCall(str(number), "add", "[]", id=slow.id) for number in range(3)),
        )
        await left.aclose()
        with anyio.move_on_after(1):
            await timed_out.collect()
        stats = agent.stats
        assert (stats.requests, stats.completed, stats.failed, stats.cancelled) == (7, 1, 3, 2)
        assert agent.in_flight == 1
        for response in responses[:-1]:
            await response.aclose()
    stats = agent.stats
    assert (stats.requests, stats.completed, stats.failed, stats.cancelled) == (7, 1, 3, 3)
    await live.aclose()
    assert agent.stats == stats


async def test_a_request_that_never_had_a_lane_is_not_counted() -> None:
    async with memory_agent(wire="single") as (agent, peer):
        with pytest.raises(ValueError, match="surrogate"):
            await agent.ask("\ud800")
        async with await begin(agent, peer):
            with anyio.move_on_after(1):
                await agent.ask("waits for the lane")
        peer.close(1000)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(Disconnected):
            await agent.ask("too late")
        stats = agent.stats
        assert (stats.requests, stats.completed, stats.failed, stats.cancelled) == (1, 0, 0, 1)


async def test_requests_fail_with_their_connection_and_are_counted_each() -> None:
    async with memory_agent() as (agent, peer):
        responses = [await begin(agent, peer) for _ in range(3)]
        peer.close(1011)
        for response in responses:
            with pytest.raises(Disconnected):
                await response.collect()
        assert (agent.stats.failed, agent.stats.cancelled) == (3, 0)


async def test_a_request_that_moves_to_another_connection_is_counted_once() -> None:
    peers = Peers()
    async with peers.agent() as agent:
        (first,) = peers.made
        first.writable = anyio.Event()
        begun = await agent.send_message("its write has begun")
        await anyio.wait_all_tasks_blocked()
        moved = [await agent.send_message("moves") for _ in range(2)]
        first.close(1006)
        second = await peers.connected(2)
        for response in moved:
            await second.receive()
            second.send(OM.EventEnd(1, id=response.id))
            await response.collect()
        with pytest.raises(Disconnected):
            await begun.collect()
        stats = agent.stats
        assert (stats.requests, stats.completed, stats.failed, stats.cancelled) == (3, 2, 1, 0)


# Events


async def test_events_are_what_was_delivered_without_terminals_and_notices() -> None:
    async with memory_agent() as (agent, peer):
        response = await begin(agent, peer)
        peer.send(
            OM.Status("busy"),
            *texts(response, "a", "b"),
            OM.EventReasoningChunk("hm", id=response.id),
            OM.EventToolCall("1", "add", "[]", id=response.id),
            b'{"type":"NEW","id":"%s"}' % response.id.encode(),
            b'{"type":"NEW"}',
            OM.EventEnd(1, id=response.id),
        )
        await response.collect()
        assert agent.stats.events == 5
        assert (agent.stats.late_events, agent.stats.unroutable_events) == (0, 0)


async def test_late_events_are_those_of_requests_that_were_left_and_unroutable_ones_those_of_nobody() -> None:
    async with memory_agent() as (agent, peer):
        left, live = await begin(agent, peer), await begin(agent, peer)
        await left.aclose()
        peer.send(
            *texts(left, "late", "later"),
            b'{"type":"AGENT_EVENT_TEXT_CHUNK","text":5,"id":"%s"}' % left.id.encode(),
            OM.EventEnd(0, status="cancelled", id=left.id),
            OM.EventTextChunk("whose?", id="77"),
            OM.EventEnd(1, id="78"),
            *texts(live, "mine"),
            OM.EventEnd(1, id=live.id),
        )
        assert await live.collect() == Reply("mine", 1)
        stats = agent.stats
        assert (stats.events, stats.late_events, stats.unroutable_events) == (1, 4, 2)


async def test_on_the_single_wire_what_drains_is_late_but_for_its_end() -> None:
    async with memory_agent(wire="single") as (agent, peer):
        async with await begin(agent, peer):
            pass
        peer.send(OM.EventTextChunk("late"), OM.EventTextChunk("later"), OM.EventEnd(1))
        await anyio.wait_all_tasks_blocked()
        assert (agent.stats.late_events, agent.stats.completed, agent.stats.cancelled) == (2, 0, 1)


# What waits


async def leave_unread(response: Response) -> None:
    await response.aclose()


async def read(response: Response) -> None:
    await anext(response)
    await response.aclose()


async def collect(response: Response) -> None:
    with anyio.move_on_after(1):
        await response.collect()


@pytest.mark.parametrize("take", [leave_unread, read, collect])
async def test_buffered_is_the_most_that_has_waited_for_one_consumer(
    take: Callable[[Response], Awaitable[None]],
) -> None:
    async with memory_agent() as (agent, peer):
        responses = [await begin(agent, peer) for _ in range(3)]
        for response, count in zip(responses, (3, 8, 5), strict=True):
            for _ in range(count):
                peer.send(*texts(response, "some text"))
            await anyio.wait_all_tasks_blocked()
            await take(response)
        stats = agent.stats
        assert (stats.buffered_events, stats.buffered_bytes) == (
            8,
            8 * size_of(*texts(response, "some text")),
        )


async def test_what_is_read_as_it_comes_counts_one_batch_at_a_time() -> None:
    async with memory_agent() as (agent, peer):
        response = await begin(agent, peer)
        for _ in range(10):
            peer.send(*texts(response, "a", "b"))
            await anext(response)
            await anext(response)
        await response.aclose()
        assert agent.stats.buffered_events == 2
        assert agent.stats.buffered_bytes == size_of(*texts(response, "a", "b"))


async def test_a_response_that_fails_at_a_limit_has_reached_it() -> None:
    async with memory_agent(limits=Limits(response_events=10)) as (agent, peer):
        response = await begin(agent, peer)
        peer.send(*(OM.EventToolCall(str(number), "add", "[]", id=response.id) for number in range(20)))
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(SlowConsumerError):
            await response.collect()
        assert agent.stats.buffered_events == 10


async def test_an_ask_counts_the_bytes_of_the_whole_answer_and_no_events() -> None:
    async def ask() -> None:
        await agent.ask("hello")

    async with memory_agent() as (agent, peer), anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        request_id = (await peer.receive()).id
        events = [OM.EventTextChunk("some text", id=request_id) for _ in range(10)]
        for event in events:
            peer.send(event)
        peer.send(OM.EventEnd(1, id=request_id))
        await anyio.wait_all_tasks_blocked()
        assert (agent.stats.buffered_events, agent.stats.buffered_bytes) == (0, size_of(*events))


# Connections


async def answer(peer: MemoryPeer) -> None:
    message = await peer.receive()
    peer.send(OM.EventTextChunk("yes", id=message.id), OM.EventEnd(1, id=message.id))


async def test_a_pool_sums_up_over_its_connections() -> None:
    peers = Peers(SINGLE)
    async with peers.agent(connections=3) as agent:
        responses = []
        for _ in range(3):
            responses.append(await agent.send_message("hello"))
            await anyio.wait_all_tasks_blocked()
            made = len(peers.made)
            assert (agent.stats.connections, agent.stats.open_connections) == (made, made)
        for peer in peers.made:
            await answer(peer)
        assert [await response.collect() for response in responses] == [Reply("yes", 1)] * 3
        peers.down = True
        peers.made[1].close(1006)
        await anyio.wait_all_tasks_blocked()
        stats = agent.stats
        assert (stats.requests, stats.completed, stats.events) == (3, 3, 3)
        assert (stats.connections, stats.open_connections) == (3, 2)
    assert (agent.stats.connections, agent.stats.open_connections) == (3, 0)


async def test_connections_that_only_add_to_a_pool_are_no_reconnects() -> None:
    peers = Peers(SINGLE)
    async with peers.agent(connections=2) as agent:
        responses = [await agent.send_message("hello") for _ in range(2)]
        stats = agent.stats
        assert stats.connections == 2
        assert (stats.reconnects, stats.reconnect_attempts, stats.reconnect_wait) == (0, 0, None)
        assert stats.last_failure is None
        for response in responses:
            await response.aclose()


async def test_attempts_count_before_they_succeed_and_reconnects_when_they_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: high)  # else it may be no time at all
    peers = Peers()
    async with peers.agent(reconnect=Backoff(initial=1.7, maximum=1.7)) as agent:
        peers.down = True
        peers.made[0].close(1011, "crashed")
        await anyio.wait_all_tasks_blocked()
        stats = agent.stats
        assert (stats.open_connections, stats.reconnects) == (0, 0)
        lost = stats.last_failure
        assert isinstance(lost, Disconnected)
        assert (lost.code, lost.reason) == (1011, "crashed")

        await anyio.sleep(10)
        stats = agent.stats
        assert stats.reconnect_attempts == len(peers.attempts) - 1 > 3
        assert (stats.connections, stats.reconnects) == (1, 0)
        refused = stats.last_failure
        assert isinstance(refused, ConnectError)
        assert refused.reason == "nobody is there"

        peers.down = False
        await peers.connected(2)
        stats = agent.stats
        assert stats.reconnect_attempts == len(peers.attempts) - 1
        assert (stats.connections, stats.open_connections, stats.reconnects) == (2, 1, 1)
        assert isinstance(stats.last_failure, ConnectError)


async def test_the_wait_is_that_before_the_newest_attempt() -> None:
    peers = Peers()
    async with peers.agent(reconnect=Backoff(initial=8, maximum=8)) as agent:
        lost_at = anyio.current_time()
        peers.made[0].close(1006)
        await anyio.wait_all_tasks_blocked()
        await peers.connected(2)
        wait = agent.stats.reconnect_wait
        assert wait is not None
        assert 0 <= wait <= 8
        assert peers.attempts[1] - lost_at == pytest.approx(wait)


async def test_without_reconnecting_the_failure_is_known_just_as_well() -> None:
    async with memory_agent() as (agent, peer):
        peer.close(1011, "crashed")
        await anyio.wait_all_tasks_blocked()
        stats = agent.stats
        assert isinstance(stats.last_failure, Disconnected)
        assert stats.last_failure.reason == "crashed"
        assert (stats.connections, stats.open_connections, stats.reconnect_attempts) == (1, 0, 0)


async def test_the_end_of_the_block_is_no_failure() -> None:
    async with memory_agent() as (agent, _):
        pass
    assert agent.stats.last_failure is None


# Heartbeat


async def test_the_round_trip_is_from_the_newest_ping_to_what_arrives_next() -> None:
    async with memory_agent(heartbeat=Heartbeat(interval=4, timeout=3)) as (agent, peer):
        await anyio.sleep(3)
        peer.send()
        await anyio.sleep(3)
        assert (peer.pings, agent.stats.ping_round_trip) == (0, None)
        await anyio.sleep(2)  # the ping went out one second ago
        assert (peer.pings, agent.stats.ping_round_trip) == (1, None)
        peer.send()
        await anyio.wait_all_tasks_blocked()
        assert agent.stats.ping_round_trip == pytest.approx(1)
        await anyio.sleep(1)
        peer.send(OM.Status("ready"))
        await anyio.sleep(1)
        assert agent.stats.ping_round_trip == pytest.approx(1)
        await anyio.sleep(5)  # the next ping went out two seconds ago
        peer.send(OM.Status("ready"))
        await anyio.wait_all_tasks_blocked()
        assert agent.stats.ping_round_trip == pytest.approx(2)
        assert peer.pings == 2


# Bytes


class CountingSocket(socket.socket):
    """A socket that knows how many bytes went through it."""

    sent = 0
    received = 0

    def sendall(self, data: ReadableBuffer, flags: int = 0) -> None:
        self.sent += len(memoryview(data))
        super().sendall(data, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        data = super().recv(size, flags)
        self.received += len(data)
        return data


class Counters:
    """Peers that count, from behind the handshake on."""

    def __init__(self) -> None:
        self.sockets: list[CountingSocket] = []

    def start(self, peer: Peer, *first: bytes) -> None:
        """Open the WebSocket, and send the frames `first`."""
        peer.upgrade()
        counting = CountingSocket(fileno=peer.sock.detach())
        counting.settimeout(DEADLINE)
        peer.sock = counting
        self.sockets.append(counting)
        peer.send(b"".join(first))

    @property
    def sent(self) -> int:
        return sum(each.sent for each in self.sockets)

    @property
    def received(self) -> int:
        return sum(each.received for each in self.sockets)


@pytest.mark.sockets
async def test_the_bytes_are_those_that_the_peer_counts_behind_the_handshake() -> None:
    counters = Counters()

    def script(peer: Peer) -> None:
        counters.start(peer, text(STATUS))
        request_id = peer.receive_prompt()
        message = chunk(request_id, "in fragments")
        peer.send(
            frame(TEXT, message[:20], fin=False) + frame(PING, b"?") + frame(CONTINUATION, message[20:])
        )
        peer.receive()
        peer.send(text(chunk(request_id, 100_000 * "x")) + text(end(request_id)))
        peer.finish()

    async with serve(script) as server, open_agent(server.url) as agent:
        assert len((await agent.ask("how many?")).text) == 100_012
    assert agent.stats.bytes_received == counters.sent > 100_000
    assert agent.stats.bytes_sent == counters.received > 0


@pytest.mark.sockets
async def test_the_bytes_of_all_connections_are_summed_up() -> None:
    counters = Counters()
    all_have_one = threading.Barrier(3)

    def script(peer: Peer) -> None:
        counters.start(peer, text(b'{"type":"STATUS","state":"ready"}'))
        message = peer.receive_message()
        all_have_one.wait(DEADLINE)
        event = b'{"type":"AGENT_EVENT_TEXT_CHUNK","text":"%s"}'
        peer.send(
            text(event % message["text"].encode()) + text(b'{"type":"AGENT_EVENT_END","tokens_used":1}')
        )
        peer.finish()

    async with serve(script) as server, open_pool(server.url, connections=3) as agent:
        responses = [await agent.send_message("x" * 1_000) for _ in range(3)]
        for response in responses:
            assert await response.collect() == Reply("x" * 1_000, 1)
    assert len(counters.sockets) == agent.stats.connections
    assert agent.stats.bytes_received == counters.sent > 3_000
    assert agent.stats.bytes_sent == counters.received > 3_000


@pytest.mark.sockets
async def test_a_pool_of_a_real_agent_counts_what_the_agent_does() -> None:
    async def handler(message: IM.UserMessage, reply: AgentReply) -> None:
        if message.text == "fail":
            await reply.error("busy", "later")
        for part in ("a", "b", "c"):
            await reply.text(part)

    async def ask(prompt: str) -> None:
        try:
            assert await agent.ask(prompt) == Reply("abc", 3)
        except AgentError:
            assert prompt == "fail"

    with embedded_agent(handler) as server:
        async with open_pool(server.url, connections=2, timeouts=Timeouts(close=5)) as agent:
            async with anyio.create_task_group() as tasks:
                for number in range(20):
                    tasks.start_soon(ask, "fail" if number % 4 == 0 else "answer")
            stats = agent.stats
            assert 1 <= stats.open_connections == stats.connections <= server.connections_total <= 2
    assert (stats.requests, stats.completed, stats.failed, stats.events) == (20, 15, 5, 45)
    assert agent.stats.open_connections == 0


# The snapshot


async def test_statistics_are_a_snapshot_that_nobody_else_sees_changed() -> None:
    async with memory_agent() as (agent, peer):
        before = agent.stats
        copy = dataclasses.replace(before)
        async with await begin(agent, peer):
            pass
        assert before == copy
        assert agent.stats.requests == 1
        agent.stats.requests = 77
        assert agent.stats.requests == 1


def test_every_statistic_is_documented() -> None:
    assert AgentStats.__doc__ is not None
    for field in dataclasses.fields(AgentStats):
        assert f"`{field.name}`" in AgentStats.__doc__
