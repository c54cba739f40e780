"""Connecting leaves nothing behind, whether it succeeds, fails or is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import socket
import threading
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from anyagent import ConnectError, open_agent

from .misbehaviour import fin_in_the_answer, rejection, wrong_accept_key
from .wire_server import DEADLINE, PING, PONG, Frame, Peer, close_frame, frame, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .wire_server import Script

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()  # a socket that was not closed would warn now, and warnings are errors


async def test_two_hundred_connections_leave_no_socket_behind_even_without_garbage_collection() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.finish()

    with no_garbage_collection():
        async with serve(script) as server:
            for _ in range(200):
                async with open_agent(server.url):
                    pass
        assert server.connections == 200


@pytest.mark.parametrize("script", [rejection("302 Found"), wrong_accept_key, fin_in_the_answer, Peer.reset])
async def test_two_hundred_failures_leave_no_socket_behind_even_without_garbage_collection(
    script: Script,
) -> None:
    with no_garbage_collection():
        async with serve(script) as server:
            for _ in range(200):
                with pytest.raises(ConnectError):
                    async with open_agent(server.url):
                        pass
        assert server.connections == 200


class Stage:
    """Tells a test that the agent's script has come to the stage at which the opening is to be cancelled."""

    def __init__(self) -> None:
        self._reached = threading.Event()

    def reach(self, peer: Peer) -> None:
        self._reached.set()
        peer.wait_gone()

    async def wait(self) -> None:
        assert await anyio.to_thread.run_sync(self._reached.wait, DEADLINE)
        await anyio.wait_all_tasks_blocked()


def accepted(peer: Peer) -> None:
    peer.sock.recv(1, socket.MSG_PEEK)


def half_answered(peer: Peer) -> None:
    peer.read_request()
    peer.send(peer.switching()[:40])


def waiting_for_the_status(peer: Peer) -> None:
    peer.upgrade()
    peer.send(frame(PING))
    assert peer.receive() == Frame(PONG, b"")


STAGES = [accepted, Peer.read_request, half_answered, waiting_for_the_status]


@pytest.mark.parametrize("until", STAGES)
async def test_cancelling_the_opening_leaves_nothing_behind(until: Callable[[Peer], object]) -> None:
    stage = Stage()

    def script(peer: Peer) -> None:
        until(peer)
        stage.reach(peer)

    async def connect() -> None:
        async with open_agent(server.url):
            raise AssertionError("this agent cannot be opened")

    async with serve(script) as server:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connect)
            await stage.wait()
            tasks.cancel_scope.cancel()
        assert server.connections == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)
@pytest.mark.parametrize("until", STAGES)
async def test_cancelling_the_opening_natively_leaves_nothing_behind(until: Callable[[Peer], object]) -> None:
    stage = Stage()

    def script(peer: Peer) -> None:
        until(peer)
        stage.reach(peer)

    async def connect() -> None:
        async with open_agent(server.url):
            raise AssertionError("this agent cannot be opened")

    async with serve(script) as server:
        task = asyncio.ensure_future(connect())
        await stage.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def answer_with_a_close(peer: Peer) -> None:
    with contextlib.suppress(ConnectionError):
        if peer.sock.recv(1):
            peer.send(close_frame(1000))
    peer.wait_gone()


async def test_cancelling_at_any_turn_about_the_arrival_of_the_status_leaves_nothing_behind(
    anyio_backend_name: str,
) -> None:
    sent = threading.Event()

    def script(peer: Peer) -> None:
        peer.open()
        sent.set()
        answer_with_a_close(peer)

    def cancel_natively() -> None:
        (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "connect"]
        task.cancel()

    async def connect() -> None:
        async with open_agent(server.url):
            await anyio.sleep_forever()

    ways = [False, True] if anyio_backend_name == "asyncio" else [False]
    async with serve(script) as server:
        for turns, natively in itertools.product(range(12), ways):
            sent.clear()
            async with anyio.create_task_group() as group:
                group.start_soon(connect, name="connect")
                assert await anyio.to_thread.run_sync(sent.wait, DEADLINE)
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
                if natively:
                    cancel_natively()
                else:
                    group.cancel_scope.cancel()


async def test_cancelling_the_tcp_connect_leaves_nothing_behind() -> None:
    async def connect(port: int) -> None:
        async with open_agent(f"ws://127.0.0.1:{port}"):
            raise AssertionError("nobody accepts this connection")

    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener, socket.socket() as first:
        listener.listen(0)
        first.connect(listener.getsockname())  # and the backlog is full
        # `serve` sees to what is left over.
        async with serve(Peer.wait_gone), anyio.create_task_group() as tasks:
            tasks.start_soon(connect, listener.getsockname()[1])
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
