"""Requests that are left in ways in which nobody sees to them; the agent hears of it all the same."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from anyagent import IM, OM, Agent, open_agent
from anyagent.testing import AgentReply, embedded_agent, memory_agent

from ..test_transport_leaks import no_garbage_collection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.anyio


async def count_for_ever(message: IM.UserMessage, reply: AgentReply) -> None:
    await reply.text("one ")
    await reply.hang()


async def read_one_event(agent: Agent) -> None:
    async for _ in await agent.send_message("Count"):
        break


async def read_nothing(agent: Agent) -> None:
    response = await agent.send_message("Count")
    while response.stats.sent is None:  # until then, it would simply not be sent
        await anyio.lowlevel.checkpoint()


@pytest.mark.sockets
@pytest.mark.parametrize("leave", [read_one_event, read_nothing])
async def test_an_agent_hears_within_a_second_of_a_response_whose_last_reference_is_dropped(
    leave: Callable[[Agent], Awaitable[None]], figure: Callable[[str], None]
) -> None:
    bound = 1.0
    with embedded_agent(count_for_ever) as server, no_garbage_collection():
        async with open_agent(server.url) as agent:
            neighbour = await agent.send_message("Count")
            with pytest.warns(ResourceWarning, match="never closed"):
                await leave(agent)
            began = time.monotonic()
            told = functools.partial(server.wait_for, lambda message: isinstance(message, IM.Cancel), bound)
            assert await anyio.to_thread.run_sync(told) == IM.Cancel("2")
            took = time.monotonic() - began
            assert await anext(neighbour) == OM.EventTextChunk("one ", id=neighbour.id)
            assert (agent.in_flight, agent.stats.cancelled) == (1, 1)
            await neighbour.aclose()
    figure(f"told after {took * 1_000:.0f} ms, bound {bound:g} s")


@pytest.mark.parametrize("order", ["the outer one first", "the inner one first"])
async def test_of_two_nested_scopes_cancelled_in_one_tick_the_outer_one_is_honoured(
    order: str, figure: Callable[[str], None]
) -> None:
    async def iterate(agent: Agent, outer: anyio.CancelScope, inner: anyio.CancelScope) -> None:
        with outer:
            with inner:
                async for _ in await agent.send_message("hello"):
                    pass
            pytest.fail("the cancellation of the outer scope was swallowed")
        assert outer.cancelled_caught
        assert not inner.cancelled_caught

    async with memory_agent() as (agent, peer), anyio.create_task_group() as tasks:
        for _ in range(1_000):
            outer, inner = anyio.CancelScope(), anyio.CancelScope()
            tasks.start_soon(iterate, agent, outer, inner)
            message = await peer.receive()
            for scope in (outer, inner) if order == "the outer one first" else (inner, outer):
                scope.cancel()
            assert await peer.receive() == IM.Cancel(message.id or "")
        assert (agent.in_flight, agent.stats.cancelled) == (0, 1_000)
    figure("1,000 of 1,000 honoured")
