"""The heartbeat gives up nobody who is there, be it behind a stalled consumer, a flood or a blocked loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
import sniffio
import trio
import trio.testing

from anyagent import OM, Heartbeat
from anyagent.testing import MemoryPeer, memory_agent

from ..clocks import JumpingLoop
from ..properties import settle

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

HEARTBEAT = Heartbeat(interval=0.5, timeout=0.25)  # seconds of virtual time; sums of them are exact
PATIENCE = HEARTBEAT.interval + HEARTBEAT.timeout
ROUNDS = 32


def block(seconds: float) -> None:
    """Let time pass while no task gets to run, as something does that computes for so long."""
    if sniffio.current_async_library() == "trio":
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(seconds)
    else:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, JumpingLoop)
        loop.jump(seconds)


async def answer_pings(peer: MemoryPeer) -> None:
    answered = 0
    while True:
        await anyio.sleep(HEARTBEAT.timeout / 4)
        if peer.pings > answered:
            answered = peer.pings
            peer.send()  # nothing but a pong


async def test_an_agent_that_answers_pings_is_not_given_up_while_a_consumer_stalls(
    figure: Callable[[str], None],
) -> None:
    async with memory_agent(heartbeat=HEARTBEAT) as (agent, peer), anyio.create_task_group() as tasks:
        tasks.start_soon(answer_pings, peer)
        response = await agent.send_message("hello")
        await peer.receive()
        peer.send(*[OM.EventTextChunk(str(number), id=response.id) for number in range(1_000)])
        await anyio.sleep(ROUNDS * PATIENCE)  # instead of reading
        figure(f"{peer.pings} pings in {ROUNDS} times interval + timeout")
        assert peer.pings >= ROUNDS
        peer.send(OM.EventEnd(1, id=response.id))
        assert (await response.collect()).text == "".join(map(str, range(1_000)))
        tasks.cancel_scope.cancel()
    assert peer.close_code == 1000


@pytest.mark.parametrize("each", [0, 1.5 * PATIENCE], ids=["handled at once", "each handled for long"])
async def test_an_agent_that_floods_is_not_given_up(each: float, figure: Callable[[str], None]) -> None:
    notices = 0

    def on_notice(_: OM.ServerMessage) -> None:
        nonlocal notices
        notices += 1
        block(each)

    async with memory_agent(heartbeat=HEARTBEAT, on_notice=on_notice) as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        for _ in range(ROUNDS // 2):
            await anyio.sleep(0.875 * HEARTBEAT.interval)
            for _ in range(2):
                peer.send(OM.Status("busy"))
        peer.send(OM.EventEnd(1, id=response.id))
        await response.collect()
    figure(f"{notices} notices, {peer.pings} pings")
    assert notices == ROUNDS
    assert peer.close_code == 1000


async def test_an_agent_that_has_answered_is_not_given_up_because_the_event_loop_was_blocked(
    figure: Callable[[str], None],
) -> None:
    async with memory_agent(heartbeat=HEARTBEAT) as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        for number in range(1, ROUNDS + 1):
            await anyio.sleep(1.125 * HEARTBEAT.interval)
            assert peer.pings == number
            peer.send()  # the answer has arrived, but
            block(HEARTBEAT.timeout)  # nobody gets to read it before time is up
            await settle()
            assert peer.close_code is None
        peer.send(OM.EventEnd(1, id=response.id))
        await response.collect()
        figure(f"{peer.pings} pings whose answer was read too late")
    assert peer.close_code == 1000


async def test_without_a_heartbeat_no_ping_is_sent_and_any_silence_is_waited_out(
    figure: Callable[[str], None],
) -> None:
    async with memory_agent(heartbeat=None) as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        await anyio.sleep(50)  # the default heartbeat would give up after 40 s
        peer.send(OM.EventEnd(1, id=response.id))
        await response.collect()
        figure(f"{peer.pings} pings in 50 s")
        assert peer.pings == 0
