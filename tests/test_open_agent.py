"""`open_agent`: how it starts, how it ends, and what comes out."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from anyagent import IM, OM, Agent, ConnectError, Disconnected, Heartbeat, Limits, Timeouts, open_agent
from anyagent._open import run_agent
from anyagent.testing import MemoryPeer, memory_agent

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from anyagent._transports import Transport

pytestmark = pytest.mark.anyio


class Boom(Exception):
    pass


async def test_leaving_the_block_cancels_what_is_in_flight_and_closes_politely() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("never answered")
        await peer.receive()
        heard: list[IM.ClientMessage] = []

        async def listen() -> None:
            heard.append(await peer.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            await response.aclose()
    assert heard == [IM.Cancel("1")]
    assert peer.close_code == 1000


async def test_a_response_that_outlives_the_block_fails_with_disconnected() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        peer.send(OM.EventTextChunk("arrived", id=(await peer.receive()).id))
        await anyio.wait_all_tasks_blocked()
    with pytest.raises(Disconnected, match="the agent was closed") as caught:
        await response.collect()
    assert (caught.value.phase, caught.value.code) == ("started", 1000)
    assert caught.value.partial is not None
    assert caught.value.partial.text == "arrived"
    with pytest.raises(Disconnected):
        await agent.send_message("too late")
    assert agent.in_flight == 0


async def raise_in_block(exception: BaseException, agents: list[Agent]) -> None:
    async with memory_agent() as (agent, _):
        agents.append(agent)
        async with await agent.send_message("hello"):
            raise exception


@pytest.mark.parametrize(
    "exception",
    [
        Boom(),
        ExceptionGroup("the user's own", [Boom(), ValueError()]),
        KeyboardInterrupt(),
        SystemExit(3),
        StopAsyncIteration(),
        BaseExceptionGroup("the user's own", [KeyboardInterrupt()]),
    ],
    ids=repr,
)
async def test_the_blocks_own_exception_comes_out_as_itself(exception: BaseException) -> None:
    context = LookupError()
    exception.__context__ = context
    with pytest.raises(type(exception)) as caught:
        await raise_in_block(exception, [])
    assert caught.value is exception
    assert exception.__context__ is context


async def test_an_exception_from_a_task_group_in_the_block_is_the_users_own_group() -> None:
    async def fail() -> None:
        raise Boom

    async def use() -> None:
        async with memory_agent() as (_, _peer), anyio.create_task_group() as tasks:
            tasks.start_soon(fail)

    with pytest.raises(ExceptionGroup) as caught:
        await use()
    assert [type(exception) for exception in caught.value.exceptions] == [Boom]


async def test_a_cancelled_block_still_closes_politely() -> None:
    peers: list[MemoryPeer] = []
    with anyio.move_on_after(3) as scope:
        async with memory_agent() as (agent, peer):
            peers.append(peer)
            await agent.ask("never answered")
    assert scope.cancelled_caught
    assert peers[0].close_code == 1000


async def test_cancellation_of_the_block_is_not_swallowed() -> None:
    with anyio.CancelScope() as scope:
        async with memory_agent():
            scope.cancel()
        await anyio.lowlevel.checkpoint()
        pytest.fail("the cancellation was swallowed")
    assert scope.cancelled_caught


async def test_an_exception_during_cancellation_comes_out_as_itself() -> None:
    async def use() -> None:
        with anyio.CancelScope() as scope:
            async with memory_agent():
                scope.cancel()
                try:
                    await anyio.lowlevel.checkpoint()
                finally:
                    raise Boom

    with pytest.raises(Boom):
        await use()


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_native_cancellation_of_the_block_closes_politely_and_comes_out() -> None:
    peers: list[MemoryPeer] = []

    async def use() -> None:
        async with memory_agent() as (agent, peer):
            peers.append(peer)
            await agent.ask("never answered")

    task = asyncio.create_task(use())
    await anyio.wait_all_tasks_blocked()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert peers[0].close_code == 1000


async def test_an_agent_that_never_answers_the_close_is_left_after_the_close_timeout() -> None:
    async with memory_agent(timeouts=Timeouts(close=4)) as (_, peer):
        peer.answers_close = False
        began = anyio.current_time()
    assert 4 <= anyio.current_time() - began < 4.5


async def test_a_write_that_is_stuck_is_left_after_the_close_timeout() -> None:
    async with memory_agent(timeouts=Timeouts(close=4)) as (agent, peer):
        peer.writable = anyio.Event()
        response = await agent.send_message("stuck")
        await anyio.wait_all_tasks_blocked()
        await response.aclose()
        began = anyio.current_time()
    assert anyio.current_time() - began == pytest.approx(4, abs=0.4)


async def test_those_who_wait_elsewhere_when_the_block_is_left_fail_with_disconnected() -> None:
    async def wait_for_a_lane(agent: Agent) -> None:
        with pytest.raises(Disconnected):
            await agent.send_message("waits")

    async with anyio.create_task_group() as tasks, memory_agent(wire="single") as (agent, _):
        response = await agent.send_message("first")
        tasks.start_soon(wait_for_a_lane, agent)
        await anyio.wait_all_tasks_blocked()
        await response.aclose()


async def test_an_exception_in_on_notice_ends_the_block_and_comes_out_as_itself() -> None:
    boom = Boom()

    def on_notice(message: OM.ServerMessage) -> None:
        raise boom

    async def use() -> None:
        async with memory_agent(on_notice=on_notice) as (_, peer):
            peer.send(OM.Status("news"))
            await anyio.sleep_forever()

    with pytest.raises(Boom) as caught:
        await use()
    assert caught.value is boom


async def test_an_exception_in_on_notice_beats_the_disconnected_that_it_causes() -> None:
    def on_notice(message: OM.ServerMessage) -> None:
        raise Boom

    async def use() -> None:
        async with memory_agent(on_notice=on_notice) as (agent, peer):
            response = await agent.send_message("hello")
            peer.send(OM.Status("news"))
            with anyio.CancelScope(shield=True):
                await response.collect()

    with pytest.raises(Boom):
        await use()


@pytest.mark.parametrize(
    ("from_notice", "from_block"), [(Boom(), ValueError()), (Boom(), KeyboardInterrupt())]
)
async def test_the_blocks_own_exception_beats_one_in_on_notice(
    from_notice: BaseException, from_block: BaseException
) -> None:
    with pytest.raises(type(from_block)):
        await raise_in_both(from_notice, from_block)


@pytest.mark.parametrize("urgent", [KeyboardInterrupt(), SystemExit(1)], ids=repr)
async def test_ctrl_c_in_one_of_our_tasks_beats_the_blocks_own_exception(urgent: BaseException) -> None:
    with pytest.raises(type(urgent)) as caught:
        await raise_in_both(urgent, ValueError())
    assert caught.value is urgent


async def raise_in_both(from_notice: BaseException, from_block: BaseException) -> None:
    def on_notice(message: OM.ServerMessage) -> None:
        raise from_notice

    async with memory_agent(on_notice=on_notice) as (_, peer):
        peer.send(OM.Status("news"))
        try:
            await anyio.sleep_forever()
        finally:
            raise from_block


@pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True)  # asyncio ends the loop with it
async def test_ctrl_c_in_a_task_of_the_transport_comes_out_as_itself() -> None:
    async def interrupt() -> None:
        raise KeyboardInterrupt

    async def connect(task_group: TaskGroup) -> Transport:
        task_group.start_soon(interrupt)
        await anyio.sleep_forever()
        raise AssertionError

    async def use() -> None:
        async with run_agent(
            connect, dialect=None, limits=Limits(), timeouts=Timeouts(), heartbeat=None, on_notice=None
        ):
            pytest.fail("opened")

    with pytest.raises(KeyboardInterrupt):
        await use()


@pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True)
async def test_ctrl_c_in_a_task_of_the_transport_beats_a_defect_in_it() -> None:
    async def interrupt() -> None:
        raise KeyboardInterrupt

    async def connect(task_group: TaskGroup) -> Transport:
        task_group.start_soon(interrupt)
        raise ZeroDivisionError

    async def use() -> None:
        async with run_agent(
            connect, dialect=None, limits=Limits(), timeouts=Timeouts(), heartbeat=None, on_notice=None
        ):
            pytest.fail("opened")

    with pytest.raises(KeyboardInterrupt):
        await use()


async def test_a_defect_in_a_transport_comes_out_as_it_is() -> None:
    async def connect(task_group: TaskGroup) -> Transport:
        raise ZeroDivisionError

    async def use() -> None:
        async with run_agent(
            connect, dialect=None, limits=Limits(), timeouts=Timeouts(), heartbeat=None, on_notice=None
        ):
            pytest.fail("opened")

    with pytest.raises(ZeroDivisionError):
        await use()


async def test_a_coroutine_function_as_on_notice_is_refused() -> None:
    async def on_notice(message: OM.ServerMessage) -> None:
        pytest.fail("called")

    with pytest.raises(TypeError, match="plain function"):
        async with memory_agent(on_notice=on_notice):
            pytest.fail("opened")


async def fail_to_open(peer: MemoryPeer) -> None:
    """Open an agent on a connection whose peer has been told what to do, and will not get it right."""
    try:
        async with run_agent(
            peer.connect, dialect=None, limits=Limits(), timeouts=Timeouts(), heartbeat=None, on_notice=None
        ):
            pytest.fail("opened")
    finally:
        peer.end()


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (OM.EventTextChunk("hi"), "sent EventTextChunk first"),
        (OM.Error("overloaded", "no"), "sent Error first"),
        (b"garbage", "no Status"),
        (None, "before its first status: code 1013, full"),
    ],
    ids=str,
)
async def test_anything_but_a_status_first_fails_the_connect(
    first: OM.ServerMessage | bytes | None, message: str
) -> None:
    peer = MemoryPeer()
    if first is None:
        peer.close(1013, "full")
    else:
        peer.send()  # a ping, and no message
        peer.send(first)
    with pytest.raises(ConnectError, match=message):
        await fail_to_open(peer)


async def test_no_status_in_time_fails_the_connect() -> None:
    began = anyio.current_time()
    with pytest.raises(ConnectError, match="no status from the agent within 10 s"):
        await fail_to_open(MemoryPeer())
    assert 10 <= anyio.current_time() - began < 10.5


async def test_a_connection_that_breaks_before_the_status_fails_the_connect() -> None:
    peer = MemoryPeer()
    peer.send()
    peer.broken = True
    with pytest.raises(ConnectError, match="before its first status"):
        await fail_to_open(peer)


async def test_cancelling_while_the_agent_is_opened_leaves_nothing_open() -> None:
    with anyio.move_on_after(1) as scope:
        await fail_to_open(MemoryPeer())
    assert scope.cancelled_caught
    gc.collect()


@pytest.mark.parametrize("url", ["http://localhost", "ws://", "ws://a b", "ws://host/#x", "ws://host:99999"])
async def test_a_bad_url_is_a_value_error(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        async with open_agent(url):
            pytest.fail("opened")


async def test_a_bad_dialect_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="dialect"):
        async with open_agent("ws://localhost", dialect="morse"):
            pytest.fail("opened")


async def test_teardown_with_heartbeat_and_thousand_requests_leaves_no_task() -> None:
    async with memory_agent(heartbeat=Heartbeat()) as (agent, _):
        responses = [await agent.send_message("hello") for _ in range(1_000)]
    for response in responses:
        with pytest.raises(Disconnected):
            await anext(response)
    assert agent.stats.requests == agent.stats.cancelled == 1_000


@pytest.mark.parametrize("ticks", range(24))
async def test_entering_can_be_cancelled_at_every_tick(ticks: int) -> None:
    async def use() -> None:
        with scope:
            async with memory_agent():
                await anyio.sleep_forever()

    scope = anyio.CancelScope()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(use)
        for _ in range(ticks):
            await anyio.lowlevel.checkpoint()
        scope.cancel()


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
@pytest.mark.parametrize("ticks", range(24))
async def test_entering_can_be_cancelled_natively_at_every_tick(ticks: int) -> None:
    async def use() -> None:
        async with memory_agent():
            await anyio.sleep_forever()

    task = asyncio.create_task(use())
    for _ in range(ticks):
        await anyio.lowlevel.checkpoint()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
