"""The end of a connection over real sockets: by us, by the peer, by both, by nobody."""

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

from anyagent import OM, Disconnected, Heartbeat, Timeouts, open_agent
from anyagent._transports import thread_scheduler
from anyagent._transports.trio import _Feed

from .wire_server import (
    CLOSE,
    DEADLINE,
    PING,
    PONG,
    TEXT,
    Frame,
    Peer,
    WireServer,
    chunk,
    close_frame,
    end,
    frame,
    serve,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyagent import Agent

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]

SHORT = Timeouts(close=0.3)
NOTICE = text(b'{"type":"STATUS","state":"busy"}')


async def wait(event: threading.Event) -> None:
    assert await anyio.to_thread.run_sync(event.wait, DEADLINE)


# By us


async def test_leaving_the_block_closes_with_1000_and_closes_the_socket() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        assert peer.receive() == Frame(CLOSE, (1000).to_bytes(2))
        peer.send(close_frame(1000))
        assert peer.sock.recv(1) == b""

    async with serve(script) as server, open_agent(server.url):
        pass


async def test_messages_that_arrive_while_we_close_do_no_harm() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        request_id = peer.receive_prompt()
        assert peer.receive_close() == (1000, "")
        peer.send(text(chunk(request_id, "late")) + frame(PING, b"late") + text(end(request_id)))
        peer.send(close_frame(1000))
        assert peer.receive() == Frame(PONG, b"late")
        assert peer.sock.recv(1) == b""

    async with serve(script) as server:
        async with open_agent(server.url) as agent:
            response = await agent.send_message("hello")
            await anyio.wait_all_tasks_blocked()  # so that it is written
        await response.aclose()


async def test_a_peer_that_answers_our_close_with_another_code_or_an_end_is_left() -> None:
    answers = [close_frame(1001, b"too"), frame(CLOSE), b"", frame(TEXT, b"x", rsv=4), frame(0x2, b"x")]

    def script(peer: Peer) -> None:
        peer.open()
        assert peer.receive_close() == (1000, "")
        peer.send(answers[server.connections - 1])

    async with serve(script) as server:
        for _ in answers:
            async with open_agent(server.url):
                pass


def never_answer(peer: Peer) -> None:
    assert peer.receive_close() == (1000, "")
    peer.wait_gone()


def never_read(peer: Peer) -> None:
    peer.send_until_gone(frame(PING, 125 * b"x"))


def flood(peer: Peer) -> None:
    assert peer.receive_close() == (1000, "")
    peer.send_until_gone(100 * NOTICE)


def flood_within_a_message(peer: Peer) -> None:
    assert peer.receive_close() == (1000, "")
    peer.send(frame(TEXT, fin=False))
    peer.send_until_gone(frame(PING) + frame(0x0, fin=False))


@pytest.mark.parametrize("script", [never_answer, never_read, flood, flood_within_a_message])
async def test_a_peer_that_does_not_answer_our_close_is_left_in_time(script: Callable[[Peer], None]) -> None:
    def open_first(peer: Peer) -> None:
        peer.open()
        script(peer)

    async with serve(open_first) as server:
        with anyio.fail_after(DEADLINE):
            async with open_agent(server.url, timeouts=SHORT):
                pass


@pytest.mark.parametrize("answers", [True, False])
async def test_a_cancelled_block_still_closes_politely(answers: bool) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        assert peer.receive_close() == (1000, "")
        if answers:
            peer.send(close_frame(1000))
        peer.wait_gone()

    async with serve(script) as server:
        with anyio.CancelScope() as scope:
            async with open_agent(server.url, timeouts=SHORT):
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught


# By the peer


@pytest.mark.parametrize(
    ("sent", "code", "reason", "reply"),
    [
        (close_frame(1000), 1000, "", (1000).to_bytes(2)),
        (close_frame(1001, b"going"), 1001, "going", (1001).to_bytes(2) + b"going"),
        (
            close_frame(1011, "\u00fcber".encode()),
            1011,
            "\u00fcber",
            (1011).to_bytes(2) + "\u00fcber".encode(),
        ),
        (close_frame(4000, 123 * b"x"), 4000, 123 * "x", (4000).to_bytes(2) + 123 * b"x"),
        (close_frame(1009, b"no"), 1009, "no", (1009).to_bytes(2) + b"no"),
        (frame(CLOSE), 1005, "", b""),
    ],
)
async def test_the_peers_close_is_answered_and_its_code_and_reason_are_told(
    sent: bytes, code: int, reason: str, reply: bytes
) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        started, silent = peer.receive_prompt(), peer.receive_prompt()
        assert started != silent
        peer.send(text(chunk(started, "one")) + text(chunk(started, "two")) + sent + text(b"ignored"))
        assert peer.receive() == Frame(CLOSE, reply)
        assert peer.sock.recv(1) == b""

    async with serve(script) as server, open_agent(server.url) as agent:
        started = await agent.send_message("hello")
        silent = await agent.send_message("hello")
        assert await anext(started) == OM.EventTextChunk("one", id=started.id)
        assert await anext(started) == OM.EventTextChunk("two", id=started.id)
        for response, phase in ((started, "started"), (silent, "sent")):
            with pytest.raises(Disconnected) as caught:
                await anext(response)
            assert (caught.value.code, caught.value.reason) == (code, reason)
            assert (caught.value.phase, caught.value.graceful) == (phase, False)
        with pytest.raises(Disconnected) as later:
            await agent.ask("hello")
        assert (later.value.code, later.value.reason, later.value.phase) == (code, reason, "not_sent")


async def test_a_close_that_comes_with_the_status_is_told_to_the_first_request() -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        status = text(b'{"type":"STATUS","state":"ready"}')
        peer.send(peer.switching() + status + close_frame(1013, b"busy"))
        assert peer.receive_close() == (1013, "busy")
        peer.wait_gone()

    async with serve(script) as server, open_agent(server.url) as agent:
        with pytest.raises(Disconnected, match="busy"):
            await agent.ask("hello")


async def test_both_sides_may_close_at_once() -> None:
    leaving = threading.Event()

    def script(peer: Peer) -> None:
        peer.open()
        assert leaving.wait(DEADLINE)
        peer.send(close_frame(1001))
        assert peer.receive_close() in ((1000, ""), (1001, ""))
        peer.send(b"")
        assert peer.sock.recv(1) == b""  # one close frame, no more

    async with serve(script) as server:
        for _ in range(20):
            leaving.clear()
            async with open_agent(server.url):
                leaving.set()


async def test_a_close_frame_of_each_side_may_cross_the_others() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        assert peer.receive_close() == (1000, "")
        peer.send(close_frame(4000, b"crossed"))  # not an answer: sent before ours was seen
        assert peer.sock.recv(1) == b""

    async with serve(script) as server, open_agent(server.url):
        pass


# By nobody


def fin(peer: Peer) -> None:
    peer.sock.shutdown(socket.SHUT_WR)
    peer.wait_gone()


def fin_in_a_frame(peer: Peer) -> None:
    peer.send(NOTICE[:-1])
    fin(peer)


def fin_in_a_message(peer: Peer) -> None:
    peer.send(frame(TEXT, b"{", fin=False))
    fin(peer)


def reset(peer: Peer) -> None:
    peer.reset()


def reset_in_a_frame(peer: Peer) -> None:
    peer.send(NOTICE[:-1])
    peer.reset()


@pytest.mark.parametrize("then", [fin, fin_in_a_frame, fin_in_a_message, reset, reset_in_a_frame])
async def test_a_connection_that_ends_without_a_close_frame_is_1006_after_what_had_arrived(
    then: Callable[[Peer], None],
) -> None:
    read = threading.Event()

    def script(peer: Peer) -> None:
        peer.open()
        started, silent = peer.receive_prompt(), peer.receive_prompt()
        assert started != silent
        peer.send(text(chunk(started, "one")) + text(chunk(started, "two")))
        assert read.wait(DEADLINE)
        then(peer)

    async with serve(script) as server, open_agent(server.url) as agent:
        started = await agent.send_message("hello")
        silent = await agent.send_message("hello")
        assert await anext(started) == OM.EventTextChunk("one", id=started.id)
        read.set()
        assert await anext(started) == OM.EventTextChunk("two", id=started.id)
        for response, phase in ((started, "started"), (silent, "sent")):
            with pytest.raises(Disconnected) as caught:
                await anext(response)
            assert (caught.value.code, caught.value.phase) == (1006, phase)
            assert (caught.value.__cause__ is not None) == (then in (reset, reset_in_a_frame))


async def ask_until_it_fails(agent: Agent) -> None:
    while True:
        await agent.ask("hello")


@pytest.mark.parametrize("then", [fin, reset])
async def test_a_connection_that_ends_while_nothing_is_in_flight_fails_the_next_request(
    then: Callable[[Peer], None],
) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        then(peer)

    async with serve(script) as server, open_agent(server.url) as agent:
        with pytest.raises(Disconnected) as caught:
            await ask_until_it_fails(agent)
        assert caught.value.code == 1006


async def test_a_silent_peer_is_sent_a_ping_and_then_a_close_with_1011() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.receive_prompt()
        assert peer.receive() == Frame(PING, b"")
        assert peer.receive_close()[0] == 1011
        peer.wait_gone()

    heartbeat = Heartbeat(interval=0.2, timeout=0.1)
    async with serve(script) as server, open_agent(server.url, heartbeat=heartbeat, timeouts=SHORT) as agent:
        with pytest.raises(Disconnected, match="nothing heard"):
            await agent.ask("hello")


# In the middle of a write


LARGE = 20_000_000 * "x"


async def test_cancelling_a_request_that_is_half_written_leaves_the_framing_and_its_neighbours_intact() -> (
    None
):
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


@pytest.mark.parametrize("then", [fin, reset])
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
