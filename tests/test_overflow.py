"""What a response's full buffer does: with "block" nothing is lost, with "fail" nobody else is hurt."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import anyagent._request
from anyagent import (
    IM,
    OM,
    Agent,
    AnyAgentError,
    Disconnected,
    Heartbeat,
    Limits,
    Reply,
    Response,
    SlowConsumerError,
    Timeouts,
    open_agent,
)
from anyagent.testing import MemoryPeer, memory_agent

from .properties import REPEATABLE, run, settle
from .wire_server import DEADLINE, PING, PONG, TEXT, Peer, chunk, end, frame, serve, text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyagent.config import Overflow

    Content: TypeAlias = OM.EventTextChunk | OM.EventReasoningChunk | OM.EventToolCall | OM.Unknown
    Batch: TypeAlias = list[tuple[int, str, int]]  # of consumer, kind of event, size

pytestmark = pytest.mark.anyio

TINY: Final = {
    "response_events": Limits(response_events=3, overflow="block"),
    "response_bytes": Limits(response_bytes=300, overflow="block"),
}
each_limit = pytest.mark.parametrize("limits", TINY.values(), ids=TINY)


def call(response: Response, number: int = 0) -> OM.EventToolCall:
    """An event that is joined to no other one."""
    return OM.EventToolCall(str(number), "add", "[]", id=response.id)


async def begin(agent: Agent, peer: MemoryPeer) -> Response:
    response = await agent.send_message("hello")
    await peer.receive()
    return response


async def fill(response: Response, peer: MemoryPeer) -> None:
    """Let so many events of `response` arrive, one by one, that it is over its limit."""
    for number in range(6):
        peer.send(call(response, number))
    await anyio.wait_all_tasks_blocked()
    assert unread(peer) > 0, "reading goes on"


def unread(peer: MemoryPeer) -> int:
    """How many batches the transport was not yet asked for."""
    return peer._client_receives.statistics().current_buffer_used


async def is_read(peer: MemoryPeer) -> bool:
    """Whether the transport is asked for what arrives now."""
    peer.send(OM.Status("ready"))
    await settle()
    return unread(peer) == 0


async def read_all(response: Response) -> list[OM.AgentEvent]:
    return [event async for event in response]


async def read_until(error: type[AnyAgentError], response: Response) -> list[OM.AgentEvent]:
    """What there is to be read before `error`, which must come."""
    events = []
    try:
        async for event in response:
            events.append(event)
    except error:
        return events
    raise AssertionError("it ended well")


# Nothing is lost


def letters(events: list[OM.AgentEvent]) -> list[object]:
    """The events, with chunks taken apart into letters, so that joining chunks makes no difference."""
    taken_apart: list[object] = []
    for event in events:
        if isinstance(event, OM.EventTextChunk | OM.EventReasoningChunk):
            taken_apart += [(type(event), letter) for letter in event.text]
        else:
            taken_apart.append(event)
    return taken_apart


def make_event(kind: str, lane: str, number: int, size: int) -> Content:
    content = f"{number}" + "," * size
    match kind:
        case "text":
            return OM.EventTextChunk(content, id=lane)
        case "reasoning":
            return OM.EventReasoningChunk(content, id=lane)
        case "tool":
            return OM.EventToolCall(content, "tool", "{}", id=lane)
        case _:
            raw = f'{{"type":"NEW","id":"{lane}","content":"{content}"}}'
            return OM.Unknown("NEW", raw, id=lane)


CONSUMERS: Final = 3
KINDS: Final = st.sampled_from(["text", "text", "reasoning", "tool", "unknown"])
BATCHES: Final = st.lists(
    st.lists(st.tuples(st.integers(0, CONSUMERS - 1), KINDS, st.integers(0, 60)), min_size=1, max_size=8),
    max_size=12,
)
PAUSES: Final = st.lists(st.integers(0, 3), min_size=1, max_size=6)


class Play:
    """What an agent sends to several consumers, each with a pace of its own."""

    def __init__(
        self,
        agent: Agent,
        peer: MemoryPeer,
        batches: list[Batch],
        paces: list[list[int]],
    ) -> None:
        self.read: list[list[OM.AgentEvent]] = [[] for _ in paces]
        self.sent: list[list[OM.AgentEvent]] = [[] for _ in paces]
        self.largest_batch = (0, 0)  # in events and in bytes
        self._agent = agent
        self._peer = peer
        self._batches = batches
        self._paces = paces

    async def run(self, pauses: list[int]) -> None:
        responses = [await begin(self._agent, self._peer) for _ in self._paces]
        async with anyio.create_task_group() as tasks:
            for number, response in enumerate(responses):
                tasks.start_soon(self._consume, number, response)
            for number, batch in enumerate(self._batches):
                self._send(responses, batch, number)
                await anyio.sleep(pauses[number % len(pauses)])
            self._peer.send(*(OM.EventEnd(number, id=each.id) for number, each in enumerate(responses)))
        assert [response.tokens_used for response in responses] == list(range(len(responses)))

    def _send(self, responses: list[Response], batch: Batch, number: int) -> None:
        events = []
        for index, (consumer, kind, size) in enumerate(batch):
            event = make_event(kind, responses[consumer].id, 100 * number + index, size)
            self.sent[consumer].append(event)
            events.append(event)
        self._peer.send(*events)
        size = sum(map(len, map(OM.encode, events)))
        self.largest_batch = (max(self.largest_batch[0], len(events)), max(self.largest_batch[1], size))

    async def _consume(self, number: int, response: Response) -> None:
        pace = self._paces[number]
        async for event in response:
            self.read[number].append(event)
            await anyio.sleep(pace[len(self.read[number]) % len(pace)])


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(REPEATABLE, max_examples=150)
@given(
    batches=BATCHES,
    paces=st.lists(PAUSES, min_size=CONSUMERS, max_size=CONSUMERS),
    pauses=PAUSES,
    limit_of_events=st.integers(1, 5),
    limit_of_bytes=st.integers(1, 500),
)
@example(  # joined chunks wait when the limit of bytes is reached
    batches=[[(0, "tool", 0), (0, "text", 0), (0, "text", 0), (0, "tool", 60)]],
    paces=[[0]] * 3,
    pauses=[0],
    limit_of_events=2,
    limit_of_bytes=250,
)
def test_with_block_no_event_is_lost_or_reordered_whatever_the_limits_and_the_consumers(
    backend: str,
    batches: list[Batch],
    paces: list[list[int]],
    pauses: list[int],
    limit_of_events: int,
    limit_of_bytes: int,
) -> None:
    async def main() -> None:
        limits = Limits(response_events=limit_of_events, response_bytes=limit_of_bytes, overflow="block")
        async with memory_agent(limits=limits) as (agent, peer):
            play = Play(agent, peer, batches, paces)
            await play.run(pauses)
            stats = agent.stats
        assert [letters(events) for events in play.read] == [letters(events) for events in play.sent]
        assert stats.events == sum(map(len, play.sent))
        assert (stats.completed, stats.failed, stats.late_events) == (len(paces), 0, 0)
        assert stats.buffered_events <= limit_of_events + play.largest_batch[0]
        # An event that waits alone may be larger than the limit.
        assert stats.buffered_bytes <= max(limit_of_bytes, play.largest_batch[1]) + play.largest_batch[1]

    run(backend, main)


@each_limit
async def test_what_is_held_beyond_the_limit_is_at_most_what_came_with_it(limits: Limits) -> None:
    async with memory_agent(limits=limits) as (agent, peer):
        response = await begin(agent, peer)
        for batch in range(4):
            peer.send(*[call(response, batch)] * 10)
        for batch in range(4):
            await anyio.wait_all_tasks_blocked()
            assert agent.stats.events == 10 * (batch + 1)
            for _ in range(10):
                assert await anext(response) == call(response, batch)
        peer.send(OM.EventEnd(1, id=response.id))
        assert await read_all(response) == []
        assert agent.stats.buffered_events == 10
        assert agent.stats.buffered_bytes == 10 * len(OM.encode(call(response)))


async def test_beyond_the_limit_no_event_of_the_batch_costs_a_pass_over_what_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = 0
    merge = anyagent._request._merge

    def counting(events: list[OM.AgentEvent]) -> list[OM.AgentEvent]:
        nonlocal passes
        passes += 1
        return merge(events)

    monkeypatch.setattr(anyagent._request, "_merge", counting)
    async with memory_agent(limits=Limits(response_events=100, overflow="block")) as (agent, peer):
        response = await begin(agent, peer)
        peer.send(*(call(response, number) for number in range(1_000)))
        peer.send(OM.EventEnd(1, id=response.id))
        assert await read_all(response) == [call(response, number) for number in range(1_000)]
    assert passes <= 10


# Reading stops and goes on


async def by_reading(held: list[Response]) -> None:
    await anext(held[0])


async def by_aclose(held: list[Response]) -> None:
    await held[0].aclose()


async def by_leaving_its_block(held: list[Response]) -> None:
    async with held[0]:
        pass


async def by_cancellation(held: list[Response]) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await anext(held[0])
    assert scope.cancelled_caught


async def by_dropping(held: list[Response]) -> None:
    with pytest.warns(ResourceWarning, match="never closed"):
        held.clear()


async def by_switching_to_collect(held: list[Response]) -> None:
    with anyio.move_on_after(1):
        await held[0].collect()


WAYS_ON: Final = [
    by_reading,
    by_aclose,
    by_leaving_its_block,
    by_cancellation,
    by_dropping,
    by_switching_to_collect,
]


@each_limit
@pytest.mark.parametrize("go_on", WAYS_ON)
async def test_reading_stops_while_a_response_is_over_its_limit_and_goes_on_behind_it(
    go_on: Callable[[list[Response]], Awaitable[None]], limits: Limits
) -> None:
    async with memory_agent(limits=limits) as (agent, peer):
        neighbour = await begin(agent, peer)
        held = [await begin(agent, peer)]
        await fill(held[0], peer)
        peer.send(OM.EventTextChunk("held up", id=neighbour.id), OM.EventEnd(1, id=neighbour.id))
        assert not await is_read(peer)
        assert neighbour.end is None
        await anyio.sleep(30)
        assert not await is_read(peer)
        await go_on(held)
        assert await neighbour.collect() == Reply("held up", 1)
        for response in held:
            await response.aclose()
        assert await is_read(peer)


@pytest.mark.parametrize("go_on", WAYS_ON)
async def test_with_several_full_responses_the_last_one_to_have_room_lets_reading_go_on(
    go_on: Callable[[list[Response]], Awaitable[None]],
) -> None:
    async with memory_agent(limits=TINY["response_events"]) as (agent, peer):
        held = [[await begin(agent, peer)] for _ in range(4)]
        peer.send(*(call(each[0], number) for number in range(6) for each in held))
        for each in held:
            assert not await is_read(peer)
            await go_on(each)
        assert await is_read(peer)
        for each in held:
            for response in each:
                await response.aclose()


async def test_reading_stops_as_often_as_a_response_is_over_its_limit() -> None:
    async with memory_agent(limits=TINY["response_events"]) as (agent, peer):
        response = await begin(agent, peer)
        numbers = iter(range(1_000))
        for _ in range(10):
            peer.send(*(call(response, next(numbers)) for _ in range(4)))
            assert not await is_read(peer)
            for _ in range(4):
                await anext(response)
            assert await is_read(peer)
        await response.aclose()


async def test_at_its_limit_a_response_lets_reading_go_on() -> None:
    async with memory_agent(limits=TINY["response_events"]) as (agent, peer):
        response = await begin(agent, peer)
        for number in range(3):
            peer.send(call(response, number))
            assert await is_read(peer)
        peer.send(call(response, 3))
        assert not await is_read(peer)
        await response.aclose()


async def test_chunks_that_can_be_joined_stop_nothing_before_the_limit_of_bytes() -> None:
    limits = Limits(response_events=2, response_bytes=100_000, overflow="block")
    async with memory_agent(limits=limits) as (agent, peer):
        response = await begin(agent, peer)
        for _ in range(1_000):
            peer.send(OM.EventTextChunk("some ", id=response.id))
        assert await is_read(peer)
        peer.send(OM.EventTextChunk("x" * 100_000, id=response.id), OM.EventTextChunk("end", id=response.id))
        assert not await is_read(peer)
        peer.send(OM.EventEnd(1, id=response.id))
        assert await response.collect() == Reply("some " * 1_000 + "x" * 100_000 + "end", 1)


@pytest.mark.parametrize(
    "terminal", [OM.EventEnd(1, id="1"), OM.Error("busy", "later", id="1")], ids=["end", "error"]
)
async def test_a_response_that_has_ended_stops_nothing(terminal: OM.ServerMessage) -> None:
    async with memory_agent(limits=TINY["response_events"]) as (agent, peer):
        response = await begin(agent, peer)
        peer.send(*(call(response, number) for number in range(6)), terminal)
        assert await is_read(peer)
        for number in range(6):
            assert await anext(response) == call(response, number)
        await response.aclose()


async def test_on_a_wire_without_cancel_a_full_response_that_is_left_drains() -> None:
    async with memory_agent(wire="single", limits=TINY["response_events"]) as (agent, peer):
        response = await begin(agent, peer)
        peer.send(*(OM.EventToolCall(str(number), "add", "[]") for number in range(6)))
        assert not await is_read(peer)
        await response.aclose()
        peer.send(*(OM.EventToolCall(str(number), "add", "[]") for number in range(6)))
        assert await is_read(peer)
        assert (agent.in_flight, agent.stats.late_events) == (1, 6)
        peer.send(OM.EventEnd(1))
        await settle()
        assert agent.in_flight == 0


# Collecting


@pytest.mark.parametrize("overflow", ["fail", "block"])
async def test_ask_and_collect_fail_at_the_limit_of_bytes_in_either_mode(overflow: Overflow) -> None:
    async def ask() -> None:
        with pytest.raises(SlowConsumerError) as caught:
            await agent.ask("hello")
        assert (caught.value.limit, caught.value.value) == ("response_bytes", 300)
        assert caught.value.partial is not None
        assert caught.value.partial.text == "x" * 100

    async def collect() -> None:
        with pytest.raises(SlowConsumerError):
            await response.collect()

    limits = Limits(response_bytes=300, overflow=overflow)
    async with memory_agent(limits=limits) as (agent, peer), anyio.create_task_group() as tasks:
        response = await begin(agent, peer)
        tasks.start_soon(ask)
        tasks.start_soon(collect)
        asked = await peer.receive()
        for lane in (asked.id, response.id):
            peer.send(*(OM.EventTextChunk("x" * 100, id=lane) for _ in range(3)))
        assert [await peer.receive() for _ in range(2)] == [IM.Cancel(asked.id), IM.Cancel(response.id)]
        assert await is_read(peer)


async def test_collecting_from_a_full_response_makes_room_and_returns_all_of_it() -> None:
    async with memory_agent(limits=TINY["response_events"]) as (agent, peer):
        response = await begin(agent, peer)
        peer.send(
            *(OM.EventTextChunk(str(number), id=response.id) for number in range(3)),
            *(call(response, number) for number in range(4)),
            *(OM.EventTextChunk(str(number), id=response.id) for number in range(3, 6)),
        )
        assert not await is_read(peer)
        peer.send(OM.EventTextChunk("6", id=response.id), OM.EventEnd(7, id=response.id))
        assert await response.collect() == Reply("0123456", 7)


async def test_collecting_more_than_the_limit_of_bytes_from_a_full_response_fails_with_all_that_arrived() -> (
    None
):
    async with memory_agent(limits=TINY["response_bytes"]) as (agent, peer):
        response = await begin(agent, peer)
        for letter in "abcde":
            peer.send(OM.EventTextChunk(100 * letter, id=response.id))
        assert not await is_read(peer)
        with pytest.raises(SlowConsumerError) as caught:
            await response.collect()
        assert caught.value.partial is not None
        text = caught.value.partial.text
        assert text == "".join(100 * letter for letter in "abcde")[: len(text)]
        assert len(text) >= 200
        assert await is_read(peer)


# Heartbeat

HEARTBEAT: Final = Heartbeat(interval=4, timeout=2)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_for_as_long_as_reading_is_stopped_the_heartbeat_neither_pings_nor_gives_up(backend: str) -> None:
    async def main() -> None:
        async with memory_agent(limits=TINY["response_events"], heartbeat=HEARTBEAT) as (agent, peer):
            response = await begin(agent, peer)
            await fill(response, peer)
            await anyio.sleep(3_600)
            assert (peer.pings, peer.close_code) == (0, None)
            peer.send(OM.EventEnd(1, id=response.id))
            assert len(await read_all(response)) == 6
            assert agent.stats.completed == 1

    run(backend, main)


async def test_when_reading_goes_on_the_heartbeat_has_a_whole_interval_and_then_does_its_work() -> None:
    async with memory_agent(limits=TINY["response_events"], heartbeat=HEARTBEAT) as (agent, peer):
        response = await begin(agent, peer)
        peer.send(*(call(response, number) for number in range(4)))
        await anyio.sleep(33)
        for _ in range(4):
            await anext(response)
        started = anyio.current_time()
        with pytest.raises(Disconnected) as caught:
            await anext(response)
        assert caught.value.code == 1006
        assert peer.pings == 1
        assert 6 - 1e-6 <= anyio.current_time() - started <= 10 + 1e-6


async def test_a_ping_whose_answer_comes_behind_what_stops_reading_is_not_missed() -> None:
    async with memory_agent(limits=TINY["response_events"], heartbeat=HEARTBEAT) as (agent, peer):
        response = await begin(agent, peer)
        await anyio.sleep(5)
        assert peer.pings == 1
        peer.send(*(call(response, number) for number in range(4)))
        peer.send()  # the pong
        await anyio.sleep(30)
        assert (peer.pings, peer.close_code) == (1, None)
        assert agent.stats.ping_round_trip == pytest.approx(1)
        peer.send(OM.EventEnd(1, id=response.id))
        assert len(await read_all(response)) == 4


# The end of the connection


@each_limit
@pytest.mark.parametrize("answers_close", [True, False])
async def test_the_block_is_left_in_time_while_reading_is_stopped(
    answers_close: bool, limits: Limits
) -> None:
    async with memory_agent(limits=limits, timeouts=Timeouts(close=5)) as (agent, peer):
        peer.answers_close = answers_close
        responses = [await begin(agent, peer) for _ in range(2)]
        await fill(responses[0], peer)
        started = anyio.current_time()
    assert anyio.current_time() - started <= 5 + 1e-6
    assert peer.close_code == 1000
    assert len(await read_until(Disconnected, responses[0])) == agent.stats.events
    assert await read_until(Disconnected, responses[1]) == []


async def test_a_cancelled_block_is_left_while_reading_is_stopped() -> None:
    with anyio.CancelScope() as scope:
        limits = TINY["response_events"]
        async with memory_agent(limits=limits) as (agent, peer), await begin(agent, peer) as response:
            await fill(response, peer)
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert peer.close_code == 1000


async def test_a_disconnect_behind_what_stops_reading_is_seen_once_there_is_room() -> None:
    async with memory_agent(limits=TINY["response_events"]) as (agent, peer):
        neighbour, response = await begin(agent, peer), await begin(agent, peer)
        await fill(response, peer)
        peer.send(OM.EventTextChunk("behind", id=neighbour.id))
        peer.close(1011, "crashed")
        await anyio.sleep(30)
        assert neighbour.stats.end is None
        for number in range(6):
            assert await anext(response) == call(response, number)
        for each in (response, neighbour):
            with pytest.raises(Disconnected) as caught:
                await each.collect()
            assert (caught.value.code, caught.value.reason) == (1011, "crashed")
        assert caught.value.partial == Reply("behind")


async def test_writes_that_fail_while_reading_is_stopped_end_the_connection_in_time() -> None:
    limits, timeouts = TINY["response_events"], Timeouts(close=5)
    async with memory_agent(limits=limits, timeouts=timeouts) as (agent, peer):
        response = await begin(agent, peer)
        await fill(response, peer)
        arrived = agent.stats.events
        peer.broken = True
        with pytest.raises(Disconnected) as caught:
            await agent.ask("cannot be written")
        assert caught.value.code == 1006
        assert len(await read_until(Disconnected, response)) == arrived


async def test_a_graceful_disconnect_ends_at_its_deadline_while_reading_is_stopped() -> None:
    async with memory_agent(limits=TINY["response_events"]) as (agent, peer):
        neighbour, response = await begin(agent, peer), await begin(agent, peer)
        peer.send(
            OM.GracefulDisconnect("deploying", deadline=20), *(call(response, number) for number in range(6))
        )
        peer.send(OM.EventTextChunk("behind", id=neighbour.id))
        started = anyio.current_time()
        with pytest.raises(Disconnected) as caught:
            await neighbour.collect()
        assert anyio.current_time() - started == pytest.approx(20)
        assert caught.value.graceful
        for number in range(6):
            assert await anext(response) == call(response, number)
        with pytest.raises(Disconnected, match="deploying"):
            await anext(response)
        assert peer.close_code == 1000


async def test_a_graceful_disconnect_lets_a_response_end_that_has_stopped_reading() -> None:
    async with memory_agent(limits=TINY["response_events"]) as (agent, peer):
        response = await begin(agent, peer)
        peer.send(
            *(call(response, number) for number in range(6)), OM.GracefulDisconnect("deploying", deadline=20)
        )
        peer.send(OM.EventEnd(3, id=response.id))
        await anyio.sleep(15)
        assert response.end is None
        assert len(await read_all(response)) == 6
        assert response.tokens_used == 3
        await settle()
        assert peer.close_code == 1000


# Over TCP


class Flood:
    """A peer that sends as fast as TCP lets it; `stopped` is set once that lets it no more, or at its end."""

    CHUNK: Final = "x" * 1_000
    COUNT: Final = 8_000

    def __init__(self, stops_at_least_at: int) -> None:
        self.stopped = threading.Event()
        self.sent_when_stopped: int | None = None
        self._least = stops_at_least_at

    def script(self, peer: Peer) -> None:
        peer.open()
        request_id = peer.receive_prompt()
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        with contextlib.closing(peer.client_socket()) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        data = memoryview(text(chunk(request_id, self.CHUNK)) * self.COUNT)
        try:
            sent = self._send_until_stopped(peer.sock, data)
        finally:
            self.stopped.set()
        peer.sock.settimeout(DEADLINE)
        peer.send(bytes(data[sent:]))
        peer.send(text(end(request_id)))
        peer.finish()

    def _send_until_stopped(self, sock: socket.socket, data: memoryview) -> int:
        sock.setblocking(False)
        sent = 0
        while sent < len(data):
            if select.select([], [sock], [], 0.4)[1]:
                sent += sock.send(data[sent : sent + 65_536])
            elif sent > self._least:
                self.sent_when_stopped = sent
                break
        return sent


@pytest.mark.sockets
async def test_with_block_tcp_stops_an_agent_that_floods_and_everything_arrives_in_the_end(
    figure: Callable[[str], None],
) -> None:
    limit = 65_536
    flood = Flood(stops_at_least_at=limit)
    limits = Limits(response_bytes=limit, overflow="block")
    async with serve(flood.script) as server, open_agent(server.url, limits=limits) as agent:
        async with await agent.send_message("flood") as response:
            await anyio.to_thread.run_sync(flood.stopped.wait)
            assert flood.sent_when_stopped is not None, "it was never stopped"
            size = 0
            async for event in response:
                assert isinstance(event, OM.EventTextChunk)
                size += len(event.text)
        assert size == Flood.COUNT * len(Flood.CHUNK)
        assert flood.sent_when_stopped < 3 * 2**20
        assert agent.stats.buffered_bytes <= limit + 2**20
        figure(f"the agent was stopped after {flood.sent_when_stopped / 2**20:.2f} of 8 MiB, bound 3")


# With "fail"

RESPONSES: Final = 100
ROUNDS: Final = 30


@pytest.mark.sockets
async def test_with_fail_a_response_that_is_never_read_holds_up_neither_the_others_nor_pongs(
    figure: Callable[[str], None],
) -> None:
    def script(peer: Peer) -> None:
        def wait_for(opcode: int, payload: bytes) -> None:
            received = peer.receive()
            if received.opcode == TEXT and b'"CANCEL"' in received.payload:
                received = peer.receive()
            assert received == (opcode, payload)

        peer.open()
        slow, *others = [peer.receive_prompt() for _ in range(RESPONSES)]
        call = b'{"type":"AGENT_EVENT_TOOL_CALL","id":"%s","call_id":"c","name":"n","arguments":"{}"}'
        for number in range(ROUNDS):
            messages = [chunk(other, f"{number} ") for other in others]
            peer.send(b"".join(text(message) for message in [call % slow.encode(), *messages]))
            peer.send(frame(PING, b"%d" % number))
            wait_for(PONG, b"%d" % number)
        peer.send(b"".join(text(end(other)) for other in others))
        peer.finish()

    async def read(response: Response) -> None:
        events = await read_all(response)
        texts.append("".join(event.text for event in events if isinstance(event, OM.EventTextChunk)))

    texts: list[str] = []
    async with serve(script) as server, open_agent(server.url, limits=Limits(response_events=10)) as agent:
        slow = await agent.send_message("never read")
        async with anyio.create_task_group() as tasks:
            for _ in range(RESPONSES - 1):
                tasks.start_soon(read, await agent.send_message("read"))
        assert texts == [" ".join(map(str, range(ROUNDS))) + " "] * (RESPONSES - 1)
        assert len(await read_until(SlowConsumerError, slow)) == 10
        figure(f"{agent.stats.completed} of {RESPONSES - 1} neighbours completed, {ROUNDS} pings answered")
