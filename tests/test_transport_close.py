"""The end of a connection over real sockets: by us, by the peer, by both, by nobody."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest
import trio

from anyagent import OM, AnyAgentError, Disconnected, Heartbeat, Timeouts, open_agent
from anyagent._target import Target
from anyagent._transports import TransportClosed, connect, thread_scheduler
from anyagent._transports.trio import _Feed

from .wire_server import (
    CLOSE,
    DEADLINE,
    PING,
    PONG,
    TEXT,
    Frame,
    Peer,
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


def causes(exc: BaseException) -> list[type[BaseException]]:
    found = []
    cause = exc.__cause__
    while cause is not None:
        found.append(type(cause))
        cause = cause.__cause__
    return found


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
        assert peer.sock.recv(1) == b""  # not even a pong: nothing comes after a close frame

    async with serve(script) as server, open_agent(server.url) as agent:
        await agent.send_message("hello")


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
            assert (ConnectionResetError in causes(caught.value)) == (then in (reset, reset_in_a_frame))


@pytest.mark.parametrize("then", [fin, reset])
async def test_a_connection_that_ends_while_nothing_is_in_flight_fails_the_next_request(
    then: Callable[[Peer], None],
) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        then(peer)

    async with serve(script) as server, open_agent(server.url) as agent:
        with pytest.raises(Disconnected) as caught:
            while True:
                await agent.ask("hello")
        assert caught.value.code == 1006


async def test_a_peer_that_goes_silent_is_noticed_by_the_heartbeat() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        for _ in range(3):
            received = peer.receive()
            assert received.opcode == PING
            peer.send(frame(PONG, received.payload))
        assert peer.receive().opcode == PING
        assert peer.receive_close()[0] == 1011
        peer.wait_gone()

    heartbeat = Heartbeat(interval=0.05, timeout=0.5)
    async with serve(script) as server, open_agent(server.url, heartbeat=heartbeat, timeouts=SHORT) as agent:
        with pytest.raises(Disconnected, match="nothing heard"):
            await wait_disconnected(agent)


async def wait_disconnected(agent: Agent) -> None:
    # Nothing is sent: the lane stays with a request of which the agent has seen nothing.
    await (await agent.send_message("hello")).collect()


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
                await agent.send_message(LARGE)
                await anyio.wait_all_tasks_blocked()
        left.set()


# The event loop ends


async def test_a_task_that_is_cancelled_natively_leaves_nothing_behind(anyio_backend_name: str) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        opened.set()
        assert peer.receive_close() == (1000, "")
        peer.send(close_frame(1000))
        peer.wait_gone()

    async def hold() -> None:
        async with open_agent(server.url) as agent:
            await wait_disconnected(agent)

    opened = threading.Event()
    async with serve(script) as server:
        if anyio_backend_name == "trio":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hold)
                await wait(opened)
                nursery.cancel_scope.cancel()
        else:
            task = asyncio.ensure_future(hold())
            await wait(opened)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
