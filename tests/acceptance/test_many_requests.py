"""A thousand requests whose connection is reset, and agents that answer what they were not asked."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from anyagent import IM, OM, Agent, Disconnected, Response, Timeouts, open_agent
from anyagent.testing import MemoryPeer, memory_agent

from ..wire_server import DEADLINE, Peer, chunk, serve, text

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

MANY = 1_000


# A reset in mid-stream


class ResetInMidStream:
    """Streams to all of its requests in turn, and resets the connection between two halves of a chunk.

    It goes on from the first round of chunks once `seen` is set.
    """

    def __init__(self) -> None:
        self.seen = threading.Event()
        self.reset_at = 0.0

    def play(self, peer: Peer) -> None:
        peer.open()
        ids = [peer.receive_prompt() for _ in range(MANY)]
        peer.send(b"".join(text(chunk(request_id, "0 ")) for request_id in ids))
        assert self.seen.wait(DEADLINE)
        peer.send(
            b"".join(text(chunk(request_id, f"{number} ")) for number in (1, 2, 3) for request_id in ids)
        )
        peer.send(text(chunk(ids[0], "cut off"))[:-20])
        peer.reset()


class Outcomes:
    """How each request ended, and with what text."""

    def __init__(self) -> None:
        self.endings: Counter[int] = Counter()
        self.texts: dict[int, str] = {}

    async def stream(self, response: Response, number: int, begun: Callable[[], None]) -> None:
        read = ""

        async def iterate() -> None:
            nonlocal read
            async for event in response:
                assert isinstance(event, OM.EventTextChunk)
                assert event.id == response.id
                if not read:
                    begun()
                read += event.text

        with pytest.raises(Disconnected) as caught:
            await iterate()
        self._note(number, caught.value, read)
        with pytest.raises(Disconnected):  # and it stays that way
            await anext(response)

    async def ask(self, agent: Agent, number: int) -> None:
        with pytest.raises(Disconnected) as caught:
            await agent.ask("hello")
        assert caught.value.partial is not None
        self._note(number, caught.value, caught.value.partial.text)

    async def collect_late(self, response: Response, number: int, when: anyio.Event) -> None:
        await when.wait()
        with pytest.raises(Disconnected) as caught:
            await response.collect()
        assert caught.value.partial is not None
        self._note(number, caught.value, caught.value.partial.text)

    def _note(self, number: int, error: Disconnected, read: str) -> None:
        assert error.code == 1006
        assert "0 1 2 3 ".startswith(read)
        self.endings[number] += 1
        self.texts[number] = read


@pytest.mark.sockets
async def test_a_reset_in_mid_stream_ends_each_of_a_thousand_requests_exactly_once(
    figure: Callable[[str], None],
) -> None:
    reset, outcomes = ResetInMidStream(), Outcomes()
    streamed, collected_late = MANY // 2, MANY // 4
    begun: list[None] = []

    def one_has_begun() -> None:
        begun.append(None)
        if len(begun) == streamed:
            reset.seen.set()

    async with serve(reset.play) as server, open_agent(server.url, timeouts=Timeouts(close=1)) as agent:
        lost = anyio.Event()
        async with anyio.create_task_group() as late:
            async with anyio.create_task_group() as tasks:
                for number in range(MANY):
                    if number < streamed:
                        response = await agent.send_message("hello")
                        tasks.start_soon(outcomes.stream, response, number, one_has_begun)
                    elif number < streamed + collected_late:
                        response = await agent.send_message("hello")
                        late.start_soon(outcomes.collect_late, response, number, lost)
                    else:
                        tasks.start_soon(outcomes.ask, agent, number)
            lost.set()
        assert outcomes.endings == Counter(range(MANY))
        assert all(outcomes.texts[number] for number in range(streamed))
        assert agent.in_flight == 0
        stats = agent.stats
        assert (stats.requests, stats.failed, stats.completed, stats.cancelled) == (MANY, MANY, 0, 0)
    figure(f"{outcomes.endings.total()} of {MANY} ended, each once")


# Events for whoever did not ask


NEVER_GIVEN = [
    "",
    "0",
    "-1",
    "01",
    " 1",
    "1 ",
    "1\n",
    "1\0",
    "1.0",
    "\uff11",
    "1e0",
    "nobody",
    "9" * 5_000,
    "\U0001f4a9",
]


def events_for(request_id: str) -> list[OM.ServerMessage]:
    """One of each kind; the terminals come last."""
    return [
        OM.EventTextChunk("astray", id=request_id),
        OM.EventReasoningChunk("astray", id=request_id),
        OM.EventToolCall("call", "astray", "{}", id=request_id),
        OM.EventEnd(99, id=request_id),
        OM.EventEnd(99, id=request_id),
        OM.Error("astray", "twice", id=request_id),
    ]


def dropped(agent: Agent) -> tuple[int, int]:
    return agent.stats.late_events, agent.stats.unroutable_events


async def begin(agent: Agent, peer: MemoryPeer) -> Response:
    response = await agent.send_message("hello")
    await peer.receive()
    return response


async def test_events_for_cancelled_ended_and_unknown_ids_are_dropped_and_counted_and_harm_nobody(
    figure: Callable[[str], None],
) -> None:
    rng, rounds = random.Random(5), 100
    notices: list[OM.ServerMessage] = []
    late = unroutable = 0
    async with memory_agent(on_notice=notices.append) as (agent, peer):
        neighbours = [await begin(agent, peer) for _ in range(4)]
        sent = {neighbour.id: "" for neighbour in neighbours}
        for number in range(rounds):
            ended, cancelled = await begin(agent, peer), await begin(agent, peer)
            peer.send(OM.EventEnd(1, id=ended.id))
            await ended.collect()
            await cancelled.aclose()
            assert await peer.receive() == IM.Cancel(cancelled.id)
            never = rng.choice(NEVER_GIVEN)
            streams: list[list[OM.ServerMessage]] = [
                events_for(cancelled.id),
                events_for(ended.id),
                events_for(never),
                [OM.EventTextChunk(f"{number} ", id=neighbour.id) for neighbour in neighbours],
            ]
            turns = [index for index, stream in enumerate(streams) for _ in stream]
            rng.shuffle(turns)
            peer.send(*(streams[index].pop(0) for index in turns))
            late += 4  # up to the first terminal, of which the agent may owe one
            unroutable += 2 + 6 + 6
            for neighbour in neighbours:
                sent[neighbour.id] += f"{number} "
        peer.send(*(OM.EventEnd(7, id=neighbour.id) for neighbour in neighbours))
        for neighbour in neighbours:
            assert (await neighbour.collect()).text == sent[neighbour.id]
            assert neighbour.tokens_used == 7
        assert dropped(agent) == (late, unroutable)
        assert (agent.in_flight, agent.stats.completed, agent.stats.failed) == (0, 4 + rounds, 0)
        assert notices == []
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.WouldBlock):
            peer.receive_nowait()
    figure(f"{late} late and {unroutable} unroutable events dropped, table empty")


async def test_a_terminal_that_comes_twice_at_once_ends_its_request_once_with_the_first() -> None:
    async with memory_agent() as (agent, peer):
        first, second = await begin(agent, peer), await begin(agent, peer)
        peer.send(
            OM.EventEnd(1, id=first.id),
            OM.EventEnd(2, id=first.id),
            OM.Error("no", "too late", id=first.id),
            OM.EventTextChunk("after the end", id=first.id),
            OM.EventTextChunk("mine", id=second.id),
            OM.EventEnd(3, id=second.id),
        )
        assert ((await first.collect()).text, first.tokens_used) == ("", 1)
        assert ((await second.collect()).text, second.tokens_used) == ("mine", 3)
        assert dropped(agent) == (0, 3)
        assert (agent.stats.completed, agent.stats.failed, agent.in_flight) == (2, 0, 0)


async def test_an_id_that_is_given_to_a_later_request_gets_nothing_that_was_sent_before_its_prompt() -> None:
    async with memory_agent() as (agent, peer):
        first = await begin(agent, peer)
        guessed = str(int(first.id) + 1)
        peer.send(OM.EventTextChunk("guessed", id=guessed), OM.EventEnd(99, id=guessed))
        await anyio.wait_all_tasks_blocked()
        second = await begin(agent, peer)
        assert second.id == guessed
        peer.send(OM.EventTextChunk("mine", id=guessed), OM.EventEnd(1, id=guessed))
        assert ((await second.collect()).text, second.tokens_used) == ("mine", 1)
        assert dropped(agent) == (0, 2)
        peer.send(OM.EventEnd(1, id=first.id))
        assert (await first.collect()).text == ""
        assert agent.in_flight == 0
