"""A half-written message, a native cancellation, the end of an event loop: nothing gets out of step."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
import trio
import uvloop

from anyagent import Disconnected, Timeouts, open_agent
from anyagent._transports import thread_scheduler
from anyagent._transports.trio import _Feed

from .wire_server import DEADLINE, Peer, WireServer, chunk, end, serve, text

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyagent import Agent

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]

SHORT = Timeouts(close=0.3)
LARGE = 20_000_000 * "x"


async def wait(event: threading.Event) -> None:
    assert await anyio.to_thread.run_sync(event.wait, DEADLINE)


def fin(peer: Peer) -> None:
    peer.sock.shutdown(socket.SHUT_WR)
    peer.wait_gone()


async def test_cancelling_a_request_that_is_half_written_leaves_framing_and_neighbours_intact() -> None:
    blocked, go_on = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.open()
        neighbour = peer.receive_prompt()
        peer.sock.recv(1, socket.MSG_PEEK)
        blocked.set()
        assert go_on.wait(DEADLINE)
        large = peer.receive_message()
        assert large["text"] == LARGE
        following = [peer.receive_message() for _ in range(2)]
        assert [(message["type"], message.get("id")) for message in following] == [
            ("CANCEL", large["id"]),
            ("USER_MESSAGE", following[1]["id"]),
        ]
        for request_id in (large["id"], neighbour, following[1]["id"]):
            peer.send(text(chunk(request_id, "answer")) + text(end(request_id)))
        peer.finish()

    async def send_large(agent: Agent, scope: anyio.CancelScope) -> None:
        with scope:
            await agent.ask(LARGE)

    async with serve(script) as server, open_agent(server.url) as agent:
        neighbour = await agent.send_message("hello")
        async with anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()
            tasks.start_soon(send_large, agent, scope)
            await wait(blocked)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(agent.ask, "behind it")
            await anyio.wait_all_tasks_blocked()
            go_on.set()
            assert (await neighbour.collect()).text == "answer"
        assert agent.stats.cancelled == 1


@pytest.mark.parametrize("then", [fin, Peer.reset])
async def test_a_connection_that_ends_while_a_message_is_half_written_fails_it_as_sent(
    then: Callable[[Peer], None],
) -> None:
    blocked = threading.Event()

    def script(peer: Peer) -> None:
        peer.open()
        peer.sock.recv(1, socket.MSG_PEEK)
        assert blocked.wait(DEADLINE)
        then(peer)

    async def ask(agent: Agent) -> None:
        with pytest.raises(Disconnected) as caught:
            await agent.ask(LARGE)
        assert (caught.value.code, caught.value.phase) == (1006, "sent")

    async with (
        serve(script) as server,
        open_agent(server.url, timeouts=SHORT) as agent,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(ask, agent)
        await anyio.wait_all_tasks_blocked()
        blocked.set()


async def test_leaving_while_a_message_is_half_written_takes_no_longer_than_the_close_timeout() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.sock.recv(1, socket.MSG_PEEK)
        assert left.wait(DEADLINE)
        peer.wait_gone()

    left = threading.Event()
    async with serve(script) as server:
        with anyio.fail_after(DEADLINE):
            async with open_agent(server.url, timeouts=SHORT) as agent:
                response = await agent.send_message(LARGE)
                await anyio.wait_all_tasks_blocked()
        left.set()
        await response.aclose()


# Cancelled by asyncio itself, and the end of an event loop


@pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)
async def test_a_task_that_is_cancelled_natively_closes_politely() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.receive_prompt()
        in_flight.set()
        peer.finish()

    async def hold() -> None:
        async with open_agent(server.url) as agent:
            await agent.ask("hello")

    in_flight = threading.Event()
    async with serve(script) as server:
        task = asyncio.ensure_future(hold())
        await wait(in_flight)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def open_and_keep(url: str, opened: asyncio.Event) -> None:
    async with open_agent(url) as agent:
        opened.set()
        await agent.ask("hello")


async def leave_a_task_behind(url: str) -> asyncio.Task[None]:
    opened = asyncio.Event()
    task = asyncio.ensure_future(open_and_keep(url, opened))
    await opened.wait()
    return task


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_event_loop_that_cancels_all_its_tasks_in_the_end_leaves_nothing_behind(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.wait_gone()

    server = WireServer(script, "127.0.0.1")
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        task = runner.run(leave_a_task_behind(server.url))
    assert task.cancelled()
    gc.collect()  # a socket that was not closed would warn now, and warnings are errors
    server.stop()
    assert server.errors == []


# What is called from other threads, and what trio-websocket may call


async def test_another_thread_can_have_a_function_run_in_the_event_loop() -> None:
    done = anyio.Event()
    run_soon = thread_scheduler()
    await anyio.to_thread.run_sync(run_soon, done.set)
    await done.wait()


def test_a_function_is_not_run_after_the_end_of_the_event_loop() -> None:
    async def scheduler() -> Callable[[Callable[[], object]], None]:
        return thread_scheduler()

    for backend in ("asyncio", "trio"):
        anyio.run(scheduler, backend=backend)(pytest.fail)


def test_the_stream_that_trio_websocket_is_given_keeps_the_contract_of_a_stream() -> None:
    async def use() -> None:
        stream = _Feed()
        await stream.wait_send_all_might_not_block()
        await stream.aclose()

    trio.run(use)
