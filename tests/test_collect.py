"""Collecting a response: what is in the reply or in `partial`, who may read beside it, and cancellation."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from anyagent import (
    IM,
    OM,
    AgentError,
    AnyAgentError,
    Disconnected,
    Limits,
    ProtocolError,
    Reply,
    Response,
    SlowConsumerError,
)
from anyagent.testing import MemoryPeer, memory_agent

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyagent import Agent

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)


def texts(response: Response, *parts: str) -> list[OM.EventTextChunk]:
    return [OM.EventTextChunk(part, id=response.id) for part in parts]


async def begin(agent: Agent, peer: MemoryPeer) -> Response:
    """A response to a request that has reached the agent."""
    response = await agent.send_message("hello")
    await peer.receive()
    return response


async def nothing_more(peer: MemoryPeer) -> None:
    await anyio.wait_all_tasks_blocked()
    with pytest.raises(anyio.WouldBlock):
        peer.receive_nowait()


# What is in the reply


@pytest.mark.parametrize("read", [0, 1, 63, 64, 65, 99, 100])
async def test_what_was_iterated_over_is_not_collected_again_and_all_the_rest_is(read: int) -> None:
    async with memory_agent() as (agent, peer):
        response = await begin(agent, peer)
        parts = [f"{number} " for number in range(150)]
        peer.send(*texts(response, *parts[:100]))
        seen = [await anext(response) for _ in range(read)]
        peer.send(OM.EventReasoningChunk("hmm", id=response.id), *texts(response, *parts[100:]))
        await anyio.wait_all_tasks_blocked()
        peer.send(OM.EventEnd(7, id=response.id))
        assert seen == texts(response, *parts[:read])
        assert await response.collect() == Reply("".join(parts[read:]), 7)


async def test_an_iteration_that_was_broken_off_goes_on_where_it_was() -> None:
    seen: list[OM.AgentEvent] = []

    async with memory_agent() as (agent, peer):
        response = await begin(agent, peer)
        peer.send(*texts(response, "a", "b", "c"))
        async for event in response:
            seen.append(event)
            break
        async for event in response:
            seen.append(event)
            if len(seen) == 3:
                break
        peer.send(*texts(response, "d"), OM.EventEnd(1, id=response.id))
        seen += [event async for event in response]
        assert seen == texts(response, "a", "b", "c", "d")


async def test_chunks_that_were_joined_because_nobody_read_them_are_collected_whole() -> None:
    async with memory_agent(limits=Limits(response_events=4)) as (agent, peer):
        response = await begin(agent, peer)
        peer.send(*texts(response, *"abcdefgh"))
        assert await anext(response) == texts(response, "a")[0]
        peer.send(*texts(response, *"ijklmnop"), OM.EventEnd(1, id=response.id))
        await anyio.wait_all_tasks_blocked()
        assert await response.collect() == Reply("bcdefghijklmnop", 1)


# Errors, and what had arrived before them


def fail_by_error(response: Response, peer: MemoryPeer) -> None:
    peer.send(OM.Error("busy", "later", id=response.id))


def fail_by_close(response: Response, peer: MemoryPeer) -> None:
    peer.close(1011, "out of order")


def fail_by_invalid_message(response: Response, peer: MemoryPeer) -> None:
    peer.send(b'{"type":"AGENT_EVENT_END","tokens_used":"many","id":"%s"}' % response.id.encode())


each_failure = pytest.mark.parametrize(
    ("fail", "error"),
    [
        (fail_by_error, AgentError),
        (fail_by_close, Disconnected),
        (fail_by_invalid_message, ProtocolError),
    ],
)


@each_failure
@pytest.mark.parametrize("waiting", [False, True])
async def test_an_error_leaves_in_partial_all_that_had_arrived_and_was_not_read_before(
    fail: Callable[[Response, MemoryPeer], None], error: type[AnyAgentError], waiting: bool
) -> None:
    async def collect() -> None:
        with pytest.raises(error) as caught:
            await response.collect()
        assert caught.value.partial == Reply("bcdef")

    async with memory_agent() as (agent, peer), anyio.create_task_group() as tasks:
        response = await begin(agent, peer)
        peer.send(*texts(response, "a", "b", "c"))
        assert await anext(response) == texts(response, "a")[0]
        peer.send(*texts(response, "d"))
        if waiting:
            tasks.start_soon(collect)
            await anyio.wait_all_tasks_blocked()
        peer.send(*texts(response, "e"))
        peer.send(*texts(response, "f"))
        fail(response, peer)
        await anyio.wait_all_tasks_blocked()
        if not waiting:
            await collect()


@each_failure
async def test_collecting_once_more_raises_the_error_again_and_takes_nothing_from_it(
    fail: Callable[[Response, MemoryPeer], None], error: type[AnyAgentError]
) -> None:
    async with memory_agent() as (agent, peer):
        response = await begin(agent, peer)
        peer.send(*texts(response, "half an ans"))
        fail(response, peer)
        with pytest.raises(error) as first:
            await response.collect()
        with pytest.raises(error):
            await response.collect()
        assert first.value.partial == Reply("half an ans")


async def test_collecting_more_than_the_limit_of_bytes_fails_alone_with_what_had_fitted() -> None:
    async def collect(response: Response) -> None:
        with pytest.raises(SlowConsumerError) as caught:
            await response.collect()
        assert (caught.value.limit, caught.value.value) == ("response_bytes", 1_000)
        assert caught.value.partial is not None
        kept = caught.value.partial.text.split()
        assert kept == [str(number) for number in range(len(kept))]
        size = len(OM.encode(*texts(response, "10 ")))
        assert 1_000 - 2 * size < len(kept) * size < 1_000 + 2 * size

    async with memory_agent(limits=Limits(response_bytes=1_000)) as (agent, peer):
        large, small = await begin(agent, peer), await begin(agent, peer)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(collect, large)
            await anyio.wait_all_tasks_blocked()
            for number in range(30):
                peer.send(*texts(large, f"{number} "))
            peer.send(*texts(small, "fine"), OM.EventEnd(1, id=small.id))
            assert await small.collect() == Reply("fine", 1)
        assert await peer.receive() == IM.Cancel(large.id)
        await nothing_more(peer)
        assert (agent.stats.failed, agent.stats.completed, agent.in_flight) == (1, 1, 0)


async def test_what_is_not_kept_does_not_count_while_collecting() -> None:
    async def collect() -> None:
        assert await response.collect() == Reply("so: 42", 1)

    async with memory_agent(limits=Limits(response_bytes=1_000)) as (agent, peer):
        response = await begin(agent, peer)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(collect)
            await anyio.wait_all_tasks_blocked()
            for part in ("so: ", "42"):
                for _ in range(30):
                    peer.send(OM.EventReasoningChunk(100 * "hm", id=response.id))
                peer.send(*texts(response, part))
            peer.send(OM.EventEnd(1, id=response.id))


# Who else reads or closes it


@pytest.mark.parametrize("read", [Response.collect, Response.__anext__])
async def test_nobody_else_reads_a_response_that_is_being_collected(
    read: Callable[[Response], object],
) -> None:
    async def collect() -> None:
        assert await response.collect() == Reply("theirs", 1)

    async def intrude() -> None:
        with pytest.raises(anyio.BusyResourceError):
            await (response.collect() if read is Response.collect else anext(response))

    async with memory_agent() as (agent, peer):
        response = await begin(agent, peer)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(collect)
            await anyio.wait_all_tasks_blocked()
            await intrude()
            peer.send(*texts(response, "theirs"))
            await anyio.wait_all_tasks_blocked()
            await intrude()
            peer.send(OM.EventEnd(1, id=response.id))
        await nothing_more(peer)


async def test_closing_wakes_a_task_that_collects_and_the_agent_is_told_once() -> None:
    async def collect() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await response.collect()

    async with memory_agent() as (agent, peer):
        response = await begin(agent, peer)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(collect)
            await anyio.wait_all_tasks_blocked()
            peer.send(*texts(response, "never read"))
            await response.aclose()
        await collect()
        assert await peer.receive() == IM.Cancel(response.id)
        await nothing_more(peer)


# Cancellation


async def test_asking_can_be_cancelled_at_any_turn_while_the_answer_arrives() -> None:
    await cancel_at_any_turn(natively=False)


@on_asyncio
async def test_asking_can_be_cancelled_natively_at_any_turn_while_the_answer_arrives() -> None:
    await cancel_at_any_turn(natively=True)


async def cancel_at_any_turn(*, natively: bool) -> None:
    parts = [f"{number} " for number in range(8)]
    replies: list[Reply] = []
    cancelled = 0

    async def ask() -> None:
        nonlocal cancelled
        try:
            replies.append(await agent.ask("hello"))
        except anyio.get_cancelled_exc_class():
            cancelled += 1
            raise

    async def listen() -> None:
        while True:
            message = await peer.receive()
            heard.append((type(message), message.id))
            if isinstance(message, IM.UserMessage):
                tasks.start_soon(answer, message.id)

    async def answer(request_id: str | None) -> None:
        for part in parts:
            peer.send(OM.EventTextChunk(part, id=request_id))
            await anyio.lowlevel.checkpoint()
        peer.send(OM.EventEnd(1, id=request_id))

    heard: list[tuple[type[IM.ClientMessage], str | None]] = []
    turns = range(40)
    async with memory_agent() as (agent, peer), anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        neighbour = await agent.send_message("neighbour")
        for count in turns:
            async with anyio.create_task_group() as asking:
                task = asyncio.ensure_future(ask()) if natively else None
                if task is None:
                    asking.start_soon(ask)
                for _ in range(count):
                    await anyio.lowlevel.checkpoint()
                if task is None:
                    asking.cancel_scope.cancel()
                else:
                    task.cancel()
                    await asyncio.wait([task])
            await anyio.wait_all_tasks_blocked()
        assert (await neighbour.collect()).text == "".join(parts)
        assert agent.in_flight == 0
        stats = agent.stats
        tasks.cancel_scope.cancel()
    assert set(replies) == {Reply("".join(parts), 1)}
    assert 0 < cancelled <= len(turns) - len(replies)  # what is cancelled natively may not even begin
    asked = [request_id for kind, request_id in heard if kind is IM.UserMessage]
    told = [request_id for kind, request_id in heard if kind is IM.Cancel]
    assert len(set(told)) == len(told) > 0
    assert set(told) < set(asked)
    assert stats.completed + stats.cancelled == stats.requests
    assert len(told) <= stats.cancelled


@on_asyncio
async def test_collecting_that_is_cancelled_natively_and_by_its_scope_in_one_turn_honours_both() -> None:
    async def collect(response: Response, scope: anyio.CancelScope) -> None:
        with scope:
            await response.collect()

    async with memory_agent() as (agent, peer):
        for order in (0, 1, 2):
            response = await begin(agent, peer)
            scope = anyio.CancelScope()
            task = asyncio.ensure_future(collect(response, scope))
            await anyio.wait_all_tasks_blocked()
            steps: list[Callable[[], object]] = [scope.cancel, task.cancel]
            for step in (steps, steps[::-1], [steps[1]])[order]:
                step()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await peer.receive() == IM.Cancel(response.id)
        await nothing_more(peer)


@on_asyncio
async def test_collecting_that_is_cancelled_natively_as_the_end_arrives_tells_nobody() -> None:
    async with memory_agent() as (agent, peer):
        response = await begin(agent, peer)
        task = asyncio.ensure_future(response.collect())
        await anyio.wait_all_tasks_blocked()
        peer.send(*texts(response, "too late"), OM.EventEnd(1, id=response.id))
        while response.end is None:
            await anyio.lowlevel.checkpoint()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await nothing_more(peer)
        assert (agent.stats.completed, agent.stats.cancelled, agent.in_flight) == (1, 0, 0)
        with pytest.raises(anyio.ClosedResourceError):
            await response.collect()
