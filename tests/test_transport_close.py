"""The end of a connection over real sockets: by us, by the peer, by both, by nobody."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from anyagent import OM, Disconnected, Heartbeat, Timeouts, open_agent

from .acceptance.measuring import SLACK, Stopwatch
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


def flood_without_reading(peer: Peer) -> None:
    peer.send_until_gone(10_000 * frame(PING))


def flood(peer: Peer) -> None:
    assert peer.receive_close() == (1000, "")
    peer.send_until_gone(100 * NOTICE)


def flood_within_a_message(peer: Peer) -> None:
    assert peer.receive_close() == (1000, "")
    peer.send(frame(TEXT, fin=False))
    peer.send_until_gone(frame(PING) + frame(0x0, fin=False))


@pytest.mark.parametrize(
    "script", [never_answer, never_read, flood_without_reading, flood, flood_within_a_message]
)
async def test_a_peer_that_does_not_answer_our_close_is_left_in_time(
    script: Callable[[Peer], None], figure: Callable[[str], None]
) -> None:
    prompted = threading.Event()

    def open_first(peer: Peer) -> None:
        peer.open()
        peer.receive_prompt()
        prompted.set()
        script(peer)

    async with serve(open_first) as server:
        async with open_agent(server.url, timeouts=SHORT) as agent:
            response = await agent.send_message("hello")
            await wait(prompted)
            stopwatch = Stopwatch()
        elapsed = stopwatch.elapsed
        await response.aclose()
        bound = SHORT.close + SLACK
        figure(f"{elapsed:.2f} s, bound {bound} s")
        assert elapsed < bound


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
            assert type(caught.value.code) is int  # not some library's enumeration
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


def reset_in_a_frame(peer: Peer) -> None:
    peer.send(NOTICE[:-1])
    peer.reset()


@pytest.mark.parametrize("then", [fin, fin_in_a_frame, fin_in_a_message, Peer.reset, reset_in_a_frame])
async def test_a_connection_that_ends_without_a_close_frame_is_1006_after_what_had_arrived(
    then: Callable[[Peer], None], request: pytest.FixtureRequest
) -> None:
    resets = then in (Peer.reset, reset_in_a_frame)
    on_uvloop = request.node.callspec.params["anyio_backend"] == "uvloop"
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
            if not (resets and on_uvloop):  # which has reported a reset as a plain end
                assert (caught.value.__cause__ is not None) == resets


async def ask_until_it_fails(agent: Agent) -> None:
    while True:
        await agent.ask("hello")


@pytest.mark.parametrize("then", [fin, Peer.reset])
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
