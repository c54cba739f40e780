"""Cancelling a request never damages a neighbour, and the agent hears of it exactly once."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from anyagent import IM, OM, Agent, ProtocolError, Response
from anyagent.dialects import Dialect
from anyagent.testing import MemoryPeer, memory_agent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.anyio


async def nothing_more(peer: MemoryPeer) -> None:
    await anyio.wait_all_tasks_blocked()
    with pytest.raises(anyio.WouldBlock):
        peer.receive_nowait()


async def leave_by_cancelling(response: Response) -> None:
    with anyio.CancelScope() as scope:
        async with response:
            async for _ in response:
                scope.cancel()
    assert scope.cancelled_caught


async def leave_by_cancelling_without_a_block(response: Response) -> None:
    with anyio.CancelScope() as scope:
        async for _ in response:
            scope.cancel()
    assert scope.cancelled_caught


async def leave_by_timeout(response: Response) -> None:
    with pytest.raises(TimeoutError):
        with anyio.fail_after(1):
            await response.collect()


async def leave_by_break(response: Response) -> None:
    async with response:
        async for _ in response:
            break


async def leave_by_exception(response: Response) -> None:
    async def fail() -> None:
        async with response:
            async for _ in response:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()


async def leave_by_aclose(response: Response) -> None:
    await response.aclose()
    await response.aclose()


WAYS_TO_LEAVE = [
    leave_by_cancelling,
    leave_by_cancelling_without_a_block,
    leave_by_timeout,
    leave_by_break,
    leave_by_exception,
    leave_by_aclose,
]


@pytest.mark.parametrize("leave", WAYS_TO_LEAVE)
async def test_leaving_early_tells_the_agent_once_and_drops_what_comes_late(
    leave: Callable[[Response], Awaitable[None]],
) -> None:
    async with memory_agent() as (agent, peer):
        neighbour = await agent.send_message("neighbour")
        response = await agent.send_message("left early")
        ids = [(await peer.receive()).id for _ in range(2)]
        peer.send(OM.EventTextChunk("a", id=ids[1]))
        await anyio.wait_all_tasks_blocked()
        await leave(response)
        assert await peer.receive() == IM.Cancel(response.id)
        assert agent.in_flight == 1
        peer.send(
            OM.EventTextChunk("late", id=ids[1]),
            OM.EventTextChunk("b", id=ids[0]),
            OM.EventEnd(0, status="cancelled", id=ids[1]),
            OM.EventEnd(1, id=ids[0]),
        )
        assert (await neighbour.collect()).text == "b"
        assert agent.stats.late_events == 2
        assert agent.stats.cancelled == 1
        await nothing_more(peer)


@pytest.mark.parametrize("leave", WAYS_TO_LEAVE)
async def test_a_response_that_was_left_cannot_be_read_any_more(
    leave: Callable[[Response], Awaitable[None]],
) -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("left early")
        peer.send(
            OM.EventTextChunk("a", id=(await peer.receive()).id), OM.EventTextChunk("b", id=response.id)
        )
        await leave(response)
        with pytest.raises(anyio.ClosedResourceError):
            await anext(response)
        with pytest.raises(anyio.ClosedResourceError):
            await response.send_tool_result("call", "output")
        assert response.tokens_used is None


@pytest.mark.parametrize("leave", WAYS_TO_LEAVE)
async def test_on_the_single_wire_the_lane_drains_before_it_is_used_again(
    leave: Callable[[Response], Awaitable[None]],
) -> None:
    async with memory_agent(wire="single") as (agent, peer), anyio.create_task_group() as tasks:
        response = await agent.send_message("left early")
        await peer.receive()
        peer.send(OM.EventTextChunk("a"))
        await anyio.wait_all_tasks_blocked()
        await leave(response)
        assert agent.in_flight == 1

        async def ask() -> None:
            assert (await agent.ask("next")).text == "mine"

        tasks.start_soon(ask)
        await nothing_more(peer)
        peer.send(OM.EventTextChunk("late"), OM.EventEnd(1))
        assert await peer.receive() == IM.UserMessage(text="next")
        assert agent.stats.late_events == 1
        peer.send(OM.EventTextChunk("mine"), OM.EventEnd(1))


async def test_a_request_cancelled_while_it_waits_for_a_lane_is_never_sent() -> None:
    async with memory_agent(wire="single") as (agent, peer):
        first = await agent.send_message("first")
        with anyio.move_on_after(1) as scope:
            await agent.send_message("never sent")
        assert scope.cancelled_caught
        await peer.receive()
        peer.send(OM.EventEnd(1))
        await first.collect()
        await nothing_more(peer)
        assert agent.stats.requests == 1


async def test_a_request_cancelled_before_its_write_began_is_not_sent_and_frees_its_lane() -> None:
    async with memory_agent() as (agent, peer):
        peer.writable = anyio.Event()
        first = await agent.send_message("its write has begun")
        await anyio.wait_all_tasks_blocked()
        second = await agent.send_message("still queued")
        await second.aclose()
        assert agent.in_flight == 1
        peer.writable.set()
        assert await peer.receive() == IM.UserMessage(text="its write has begun", id=first.id)
        await nothing_more(peer)
        await first.aclose()


async def test_a_request_cancelled_during_its_write_is_cancelled_right_behind_it() -> None:
    async with memory_agent() as (agent, peer):
        peer.writable = anyio.Event()
        response = await agent.send_message("its write has begun")
        neighbour = await agent.send_message("neighbour")
        await anyio.wait_all_tasks_blocked()
        await response.aclose()
        peer.writable.set()
        assert await peer.receive() == IM.UserMessage(text="its write has begun", id=response.id)
        assert await peer.receive() == IM.UserMessage(text="neighbour", id=neighbour.id)
        assert await peer.receive() == IM.Cancel(response.id)
        peer.send(OM.EventEnd(1, id=neighbour.id))
        await neighbour.collect()


async def test_an_agent_with_ids_but_without_cancel_hears_of_nothing_and_the_request_drains() -> None:
    async with memory_agent(status=OM.Status("ready", ("ids",), 1)) as (agent, peer):
        response = await agent.send_message("left early")
        await peer.receive()
        await response.aclose()
        await nothing_more(peer)
        assert agent.in_flight == 1
        peer.send(OM.EventTextChunk("late", id=response.id), OM.EventEnd(1, id=response.id))
        await anyio.wait_all_tasks_blocked()
        assert agent.in_flight == 0
        assert agent.stats.late_events == 1


async def test_with_ids_a_request_that_does_not_drain_in_time_is_forgotten() -> None:
    async with memory_agent(status=OM.Status("ready", ("ids",), 1)) as (agent, peer):
        response = await agent.send_message("left early")
        await peer.receive()
        await response.aclose()
        second = await agent.send_message("waits for Timeouts.drain")
        await peer.receive()
        peer.send(
            OM.EventTextChunk("late", id=response.id),
            OM.EventTextChunk("mine", id=second.id),
            OM.EventEnd(1, id=second.id),
        )
        assert (await second.collect()).text == "mine"
        assert agent.stats.late_events == 1


async def test_cancelling_again_after_the_end_changes_nothing() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        peer.send(OM.EventEnd(3, id=(await peer.receive()).id))
        await anyio.wait_all_tasks_blocked()
        await response.aclose()
        assert response.tokens_used == 3
        await nothing_more(peer)
        assert agent.stats.completed == 1


async def test_a_cancelled_ask_tells_the_agent_and_raises_no_other_exception() -> None:
    async with memory_agent() as (agent, peer):
        with anyio.move_on_after(1) as scope:
            await agent.ask("hello")
        assert scope.cancelled_caught
        message = await peer.receive()
        assert await peer.receive() == IM.Cancel(message.id or "")


async def test_ten_thousand_random_cancels_lose_and_misdeliver_nothing(figure: Callable[[str], None]) -> None:
    rng = random.Random(7)
    survivors: dict[str, str] = {}
    cancelled = 0

    async def request(agent: Agent, number: int) -> None:
        nonlocal cancelled
        prompt = f"prompt {number}"
        with anyio.CancelScope() as scope:
            if number % 3:
                ticks = rng.randrange(12)
                tasks.start_soon(cancel_after, scope, ticks)
            survivors[prompt] = (await agent.ask(prompt)).text
        cancelled += scope.cancelled_caught

    async def cancel_after(scope: anyio.CancelScope, ticks: int) -> None:
        for _ in range(ticks):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    async def answer(peer: MemoryPeer) -> None:
        while True:
            message = await peer.receive()
            assert message.id is not None
            if isinstance(message, IM.Cancel):
                if live.pop(message.id, None):
                    peer.send(OM.EventEnd(0, status="cancelled", id=message.id))
            elif isinstance(message, IM.UserMessage):
                live[message.id] = (message.text, 0)
            batch: list[OM.ServerMessage] = []
            for request_id in rng.sample(sorted(live), min(8, len(live))):
                text, sent = live[request_id]
                batch.append(OM.EventTextChunk(f"[{text}:{sent}]", id=request_id))
                live[request_id] = (text, sent + 1)
                if sent == 3:
                    batch.append(OM.EventEnd(4, id=request_id))
                    del live[request_id]
            peer.send(*batch)

    async def finish(peer: MemoryPeer) -> None:
        """What is still live gets its end once no message comes in any more."""
        while True:
            await anyio.wait_all_tasks_blocked()
            for request_id in live:
                peer.send(OM.EventEnd(0, status="incomplete", id=request_id))
            live.clear()
            await anyio.sleep(1)

    live: dict[str, tuple[str, int]] = {}
    async with memory_agent() as (agent, peer), anyio.create_task_group() as helpers:
        helpers.start_soon(answer, peer)
        helpers.start_soon(finish, peer)
        async with anyio.create_task_group() as tasks:
            for number in range(10_000):
                tasks.start_soon(request, agent, number)
        helpers.cancel_scope.cancel()
        assert agent.in_flight == 0
        stats = agent.stats
    assert cancelled > 1_000
    assert len(survivors) == 10_000 - cancelled
    assert len(survivors) > 3_000
    for prompt, text in survivors.items():
        assert text == "".join(f"[{prompt}:{number}]" for number in range(text.count("[")))
    assert stats.completed + stats.cancelled == stats.requests
    figure(f"{cancelled} cancelled, {len(survivors)} answered, none lost or misdelivered")


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_native_cancellation_and_a_cancelled_scope_in_one_tick_are_both_honoured(
    figure: Callable[[str], None],
) -> None:
    async def iterate(response: Response, scope: anyio.CancelScope) -> None:
        with scope:
            async for _ in response:
                pass

    async with memory_agent() as (agent, peer):
        for _ in range(1_000):
            response = await agent.send_message("hello")
            scope = anyio.CancelScope()
            task = asyncio.create_task(iterate(response, scope))
            message = await peer.receive()
            scope.cancel()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await peer.receive() == IM.Cancel(message.id or "")
        assert agent.in_flight == 0
    figure("1,000 of 1,000 came out")


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_native_cancellation_at_the_moment_of_delivery_cancels_the_request() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        message = await peer.receive()
        task: asyncio.Task[OM.AgentEvent] = asyncio.ensure_future(anext(response))
        await anyio.wait_all_tasks_blocked()
        peer.send(OM.EventTextChunk("delivered, but not taken", id=message.id))
        while response.stats.first_event is None:
            await anyio.lowlevel.checkpoint()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await peer.receive() == IM.Cancel(response.id)


async def test_a_tool_result_cancelled_before_its_write_is_not_sent() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        message = await peer.receive()
        peer.writable = anyio.Event()
        blocker = await agent.send_message("blocks the writer")
        await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(1) as scope:
            await response.send_tool_result("call", "too late")
        assert scope.cancelled_caught
        peer.writable.set()
        assert (await peer.receive()).id == blocker.id
        await response.send_tool_result("call", "in time")
        assert await peer.receive() == IM.ToolResult(message.id, call_id="call", output="in time")
        await response.aclose()
        await blocker.aclose()


async def test_a_message_that_is_invalid_fails_its_own_request_and_cancels_it() -> None:
    async with memory_agent() as (agent, peer):
        neighbour = await agent.send_message("neighbour")
        response = await agent.send_message("hello")
        for _ in range(2):
            await peer.receive()
        peer.send(
            OM.EventTextChunk("before", id=response.id),
            b'{"type": "AGENT_EVENT_TEXT_CHUNK", "text": 5, "id": "%s"}' % response.id.encode(),
            OM.EventTextChunk("after", id=response.id),
        )
        with pytest.raises(ProtocolError) as caught:
            await response.collect()
        assert caught.value.partial is not None
        assert caught.value.partial.text == "before"
        assert await peer.receive() == IM.Cancel(response.id)
        peer.send(OM.EventEnd(1, id=neighbour.id))
        await neighbour.collect()


async def test_only_so_many_cancelled_ids_are_remembered() -> None:
    async with memory_agent() as (agent, peer):
        for _ in range(5_000):
            response = await agent.send_message("left early")
            await peer.receive()
            await response.aclose()
            assert await peer.receive() == IM.Cancel(response.id)
        for number in range(1, 5_001):
            peer.send(OM.EventTextChunk("late", id=str(number)))
        await anyio.wait_all_tasks_blocked()
        assert (agent.stats.late_events, agent.stats.unroutable_events) == (4_096, 904)


async def test_requests_that_are_withdrawn_before_their_write_leave_nothing_in_the_queue() -> None:
    async with memory_agent() as (agent, peer):
        peer.writable = anyio.Event()
        blocker = await agent.send_message("blocks the writer")
        await anyio.wait_all_tasks_blocked()
        withdrawn = []
        for _ in range(100):
            response = await agent.send_message("a prompt that only the queue still holds")
            request = weakref.ref(response._request)
            await response.aclose()
            withdrawn.append(request)
            del response
        gc.collect()
        assert [request() for request in withdrawn] == [None] * 100
        peer.writable.set()
        await blocker.aclose()


class OneNamedLane(Dialect):
    name = "one named lane"
    lanes = ("A",)

    def can_cancel(self, status: OM.Status) -> bool:
        return True

    def lane_of(self, event: OM.AgentEvent) -> str | None:
        return event.id


async def test_a_lane_that_is_used_again_drains_even_where_the_wire_can_cancel() -> None:
    status = OM.Status("ready", ("ids", "cancel"))
    async with memory_agent(status=status, dialect=OneNamedLane()) as (agent, peer):
        first = await agent.send_message("first")
        await peer.receive()
        await first.aclose()
        assert await peer.receive() == IM.Cancel("A")
        assert agent.in_flight == 1
        peer.send(OM.EventTextChunk("late", id="A"), OM.EventEnd(1, status="cancelled", id="A"))
        second = await agent.send_message("second")
        await peer.receive()
        peer.send(OM.EventTextChunk("mine", id="A"), OM.EventEnd(1, id="A"))
        assert (await second.collect()).text == "mine"
