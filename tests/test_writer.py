"""What waits to be written is bounded: no further request joins 1 MiB of it; who waits for that can leave."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import anyio
import pytest

from anyagent import IM, OM, Agent, Disconnected, Limits, Response
from anyagent._transports import waker_factory
from anyagent._writer import Outgoing, Writer
from anyagent.testing import MemoryPeer, memory_agent

from .peers import Peers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from anyio.abc import TaskGroup

pytestmark = pytest.mark.anyio

MIB: Final = 2**20
PROMPT: Final = 300_000
QUEUED: Final = 4
"""How many prompts of that size it takes until no further one joins them."""


def prompt(number: int) -> str:
    return f"{number} ".ljust(PROMPT, "x")


def number_of(message: IM.ClientMessage) -> int:
    assert isinstance(message, IM.UserMessage)
    return int(message.text.split()[0])


def received(peer: MemoryPeer) -> list[IM.ClientMessage]:
    """Everything that has reached `peer` and was not received yet."""
    messages = []
    while True:
        try:
            messages.append(peer.receive_nowait())
        except anyio.WouldBlock:
            return messages


class Sender:
    """A task that sends a prompt, and what came of it."""

    def __init__(self, agent: Agent, number: int) -> None:
        self.response: Response | None = None
        self.error: Disconnected | None = None
        self.scope = anyio.CancelScope()
        self._agent = agent
        self._number = number

    @property
    def waits(self) -> bool:
        return self.response is None and self.error is None

    async def run(self) -> None:
        with self.scope:
            try:
                self.response = await self._agent.send_message(prompt(self._number))
            except Disconnected as exc:
                self.error = exc


async def send(tasks: TaskGroup, agent: Agent, *numbers: int) -> list[Sender]:
    """Send the prompts `numbers` at once, in this order."""
    senders = []
    for number in numbers:
        senders.append(Sender(agent, number))
        tasks.start_soon(senders[-1].run)
        await anyio.wait_all_tasks_blocked()
    return senders


async def block(agent: Agent, peer: MemoryPeer) -> Response:
    """Let the writes of the connection block from now on, with the prompt 0 as the first."""
    peer.writable = anyio.Event()
    response = await agent.send_message(prompt(0))
    await anyio.wait_all_tasks_blocked()
    return response


async def fill(agent: Agent, peer: MemoryPeer) -> list[Response]:
    """Block, and let the prompts from 1 on wait to be written, until no further one joins them."""
    responses = [await block(agent, peer)]
    for number in range(1, QUEUED + 1):
        responses.append(await agent.send_message(prompt(number)))
    return responses


async def close_all(responses: list[Response], senders: list[Sender]) -> None:
    for response in [*responses, *(sender.response for sender in senders if sender.response is not None)]:
        await response.aclose()


@asynccontextmanager
async def full_agent() -> AsyncIterator[tuple[Agent, MemoryPeer, TaskGroup, list[Response]]]:
    """An agent whose connection has as much to write as it takes."""
    async with memory_agent() as (agent, peer), anyio.create_task_group() as tasks:
        responses = await fill(agent, peer)
        yield agent, peer, tasks, responses
        peer.writable.set()
        await close_all(responses, [])


async def test_no_request_joins_a_mebibyte_that_waits_and_they_go_on_in_order_when_it_is_written() -> None:
    async with full_agent() as (agent, peer, tasks, _):
        senders = await send(tasks, agent, 5, 6, 7)
        await anyio.sleep(10)
        assert [sender.waits for sender in senders] == [True] * 3
        assert agent.in_flight == agent.stats.requests == 1 + QUEUED
        peer.writable.set()
        await anyio.wait_all_tasks_blocked()
        assert list(map(number_of, received(peer))) == list(range(8))
        assert agent.in_flight == 8
        await close_all([], senders)


async def test_below_a_mebibyte_requests_join_whatever_their_size() -> None:
    async with memory_agent() as (agent, peer):
        responses = [await block(agent, peer)]
        for size in (MIB - 1_000, 1, MIB * 3):
            responses.append(await agent.send_message(size * "x"))
        with anyio.move_on_after(1) as scope:
            await agent.send_message("waits")
        assert scope.cancelled_caught
        assert agent.in_flight == 4
        peer.writable.set()
        await anyio.wait_all_tasks_blocked()
        assert len(received(peer)) == 4
        await close_all(responses, [])


async def test_a_prompt_of_any_size_is_sent_where_nothing_waits() -> None:
    async with memory_agent() as (agent, peer), await agent.send_message(MIB * 20 * "x"):
        message = await peer.receive()
        assert isinstance(message, IM.UserMessage)
        assert len(message.text) == MIB * 20


async def test_requests_go_on_as_soon_as_there_is_room_and_no_sooner() -> None:
    async with full_agent() as (agent, peer, tasks, _):
        senders = await send(tasks, agent, 5, 6)
        step = peer.writable
        peer.writable = anyio.Event()  # only the write that has begun goes on
        step.set()
        await anyio.wait_all_tasks_blocked()
        assert list(map(number_of, received(peer))) == [0]
        assert [sender.waits for sender in senders] == [False, True]
        peer.writable.set()
        await anyio.wait_all_tasks_blocked()
        assert list(map(number_of, received(peer))) == [1, 2, 3, 4, 5, 6]
        await close_all([], senders)


async def test_a_request_that_waits_for_room_can_be_cancelled_and_is_not_sent() -> None:
    async with full_agent() as (agent, peer, tasks, _):
        senders = await send(tasks, agent, 5, 6)
        senders[0].scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert senders[0].scope.cancelled_caught
        assert senders[1].waits
        peer.writable.set()
        await anyio.wait_all_tasks_blocked()
        assert list(map(number_of, received(peer))) == [0, 1, 2, 3, 4, 6]
        assert agent.stats.requests == 6
        await close_all([], senders)


async def test_leaving_a_request_that_is_queued_makes_room_as_well() -> None:
    async with full_agent() as (agent, peer, tasks, responses):
        senders = await send(tasks, agent, 5, 6)
        await responses[2].aclose()
        await anyio.wait_all_tasks_blocked()
        assert [sender.waits for sender in senders] == [False, True]
        peer.writable.set()
        await anyio.wait_all_tasks_blocked()
        assert list(map(number_of, received(peer))) == [0, 1, 3, 4, 5, 6]
        await close_all([], senders)


async def test_leaving_the_request_that_is_being_written_makes_no_room() -> None:
    async with full_agent() as (agent, peer, tasks, responses):
        senders = await send(tasks, agent, 5)
        await responses[0].aclose()
        await anyio.wait_all_tasks_blocked()
        assert senders[0].waits
        peer.writable.set()
        await anyio.wait_all_tasks_blocked()
        *prompts, cancel = sorted(received(peer), key=lambda message: isinstance(message, IM.Cancel))
        assert list(map(number_of, prompts)) == [0, 1, 2, 3, 4, 5]
        assert cancel == IM.Cancel(responses[0].id)
        await close_all([], senders)


async def test_cancels_and_tool_results_are_queued_behind_a_mebibyte() -> None:
    async def answer() -> None:
        await live.send_tool_result("call", "result")
        answered.set()

    answered = anyio.Event()
    async with memory_agent() as (agent, peer), anyio.create_task_group() as tasks:
        live, left = await agent.send_message("live"), await agent.send_message("left")
        await anyio.wait_all_tasks_blocked()
        assert len(received(peer)) == 2
        responses = await fill(agent, peer)
        senders = await send(tasks, agent, 5)
        tasks.start_soon(answer)
        await anyio.wait_all_tasks_blocked()
        await left.aclose()
        assert senders[0].waits
        assert not answered.is_set()
        peer.writable.set()
        await anyio.wait_all_tasks_blocked()
        assert answered.is_set()
        messages = received(peer)
        assert [number_of(each) for each in messages if isinstance(each, IM.UserMessage)] == list(range(6))
        others = [each for each in messages if not isinstance(each, IM.UserMessage)]
        assert others == [IM.ToolResult(live.id, call_id="call", output="result"), IM.Cancel(left.id)]
        await close_all([live, *responses], senders)


async def test_a_large_tool_result_takes_room_until_it_is_written_or_its_sender_is_cancelled() -> None:
    async with memory_agent() as (agent, peer), anyio.create_task_group() as tasks:
        live = await agent.send_message("live")
        await anyio.wait_all_tasks_blocked()
        blocking = await block(agent, peer)
        result = anyio.CancelScope()

        async def answer() -> None:
            with result:
                await live.send_tool_result("call", MIB * "x")

        tasks.start_soon(answer)
        await anyio.wait_all_tasks_blocked()
        senders = await send(tasks, agent, 1)
        assert senders[0].waits
        result.cancel()
        await anyio.wait_all_tasks_blocked()
        assert not senders[0].waits
        peer.writable.set()
        await anyio.wait_all_tasks_blocked()
        _, *prompts = received(peer)
        assert list(map(number_of, prompts)) == [0, 1]
        await close_all([live, blocking], senders)


async def test_requests_that_wait_for_room_fail_with_the_connection_and_were_not_sent() -> None:
    async with full_agent() as (agent, peer, tasks, responses):
        senders = await send(tasks, agent, 5, 6)
        peer.close(1011, "crashed")
        await anyio.wait_all_tasks_blocked()
        errors = [sender.error for sender in senders]
        assert [error and (error.code, error.phase) for error in errors] == [(1011, "not_sent")] * 2
        phases = []
        for response in responses:
            with pytest.raises(Disconnected) as caught:
                await response.collect()
            phases.append(caught.value.phase)
        assert phases == ["sent"] + ["not_sent"] * QUEUED
        assert agent.stats.requests == 5


async def test_a_request_that_finds_one_connection_full_takes_another_one() -> None:
    peers = Peers()
    async with peers.agent(connections=2) as agent, anyio.create_task_group() as tasks:
        peers.made[0].writable = anyio.Event()
        (begun,) = await send(tasks, agent, 0)
        await peers.connected(2)
        peers.made[1].writable = anyio.Event()
        senders = await send(tasks, agent, *range(1, 12))
        assert [sender.waits for sender in senders] == [False] * 9 + [True] * 2
        peers.made[1].writable.set()
        await anyio.wait_all_tasks_blocked()
        assert [sender.waits for sender in senders] == [False] * 11
        second = list(map(number_of, received(peers.made[1])))
        peers.made[0].writable.set()
        await anyio.wait_all_tasks_blocked()
        first = list(map(number_of, received(peers.made[0])))
        assert sorted(first + second) == list(range(12))
        assert (len(first), first, second) == (1 + QUEUED, sorted(first), sorted(second))
        await close_all([], [begun, *senders])


async def test_a_request_that_waits_for_a_lane_does_not_go_on_for_room() -> None:
    limits = Limits(in_flight=1 + QUEUED)
    async with memory_agent(limits=limits) as (agent, peer), anyio.create_task_group() as tasks:
        responses = await fill(agent, peer)
        senders = await send(tasks, agent, 5)
        peer.writable.set()
        await anyio.wait_all_tasks_blocked()
        assert senders[0].waits
        peer.send(OM.EventEnd(1, id=responses[0].id))
        await anyio.wait_all_tasks_blocked()
        assert not senders[0].waits
        await close_all(responses, senders)


# The writer alone


@asynccontextmanager
async def writer_to(peer: MemoryPeer, on_room: Callable[[], object] = lambda: None) -> AsyncIterator[Writer]:
    async with anyio.create_task_group() as tasks:
        writer = Writer(await peer.connect(tasks), waker_factory()(), on_room)
        tasks.start_soon(writer.run)
        yield writer
        tasks.cancel_scope.cancel()
    peer.end()


async def test_there_is_room_once_each_time_that_the_queue_was_full() -> None:
    rooms = []
    peer = MemoryPeer()
    async with writer_to(peer, lambda: rooms.append(writer.full)) as writer:
        peer.writable = anyio.Event()
        writer.queue(Outgoing(b"1"))
        await anyio.wait_all_tasks_blocked()
        half = [Outgoing((MIB // 2) * b"x") for _ in range(4)]
        for count, outgoing in enumerate(half, start=1):
            writer.queue(outgoing)
            assert writer.full is (count >= 2)
        for outgoing in half[:2]:
            writer.withdraw(outgoing)
        assert (writer.full, rooms) == (True, [])
        writer.withdraw(half[2])
        assert (writer.full, rooms) == (False, [False])
        writer.withdraw(half[2])
        writer.withdraw(half[3])
        assert rooms == [False]
        writer.queue(Outgoing(MIB * b"x"))
        assert writer.full
        peer.writable.set()
        await writer.flushed()
        assert (writer.full, rooms) == (False, [False, False])


async def test_withdrawing_a_message_that_the_writer_no_longer_holds_changes_nothing() -> None:
    peer = MemoryPeer()
    async with writer_to(peer) as writer:
        outgoing = Outgoing(IM.encode(IM.Cancel("1")))
        writer.queue(outgoing)
        assert await peer.receive() == IM.Cancel("1")
        writer.withdraw(outgoing)
        await writer.flushed()


def test_what_waits_for_the_writer_does_not_show_the_prompt() -> None:
    assert "secret" not in repr(Outgoing(b"secret"))
