"""Frames that break the rules or claim too much are refused, in little memory, and nothing hangs."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import anyio
import pytest

from anyagent import Heartbeat, Limits, ProtocolError, Timeouts, open_agent
from anyagent._transports.frames import FRAGMENTS

from ..wire_server import (
    CONTINUATION,
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
from .measuring import MEBIBYTE, Growth, Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyagent import Agent, Response

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.sockets,
    pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True),
]

REQUESTS = 20
LIMITS = Limits(in_flight=REQUESTS)
TWO_GIBIBYTES = 2**31


async def read(response: Response) -> None:
    async for _ in response:
        pass


async def stream_until_it_fails(agent: Agent, errors: list[ProtocolError]) -> None:
    async with await agent.send_message("hello") as response:
        with pytest.raises(ProtocolError) as caught:
            await read(response)
    errors.append(caught.value)


async def ask_until_it_fails(agent: Agent, errors: list[ProtocolError]) -> None:
    with pytest.raises(ProtocolError) as caught:
        await agent.ask("hello")
    errors.append(caught.value)


async def all_pending_fail(agent: Agent) -> list[ProtocolError]:
    """Have `REQUESTS` requests in flight, which must all fail."""
    errors: list[ProtocolError] = []
    async with anyio.create_task_group() as tasks:
        for _ in range(REQUESTS // 2):
            tasks.start_soon(stream_until_it_fails, agent, errors)
            tasks.start_soon(ask_until_it_fails, agent, errors)
    assert agent.in_flight == 0
    return errors


def begin_half_of_the_answers(peer: Peer) -> None:
    peer.open()
    prompts = [peer.receive_prompt() for _ in range(REQUESTS)]
    peer.send(b"".join(text(chunk(request_id, "begun")) for request_id in prompts[::2]))


@pytest.mark.parametrize(
    ("violation", "code"),
    [
        pytest.param(frame(TEXT, b"{}", rsv=4), 1002, id="RSV1"),
        pytest.param(frame(TEXT, b"{}", masked=True), 1002, id="masked"),
        pytest.param(frame(0x3, b"{}"), 1002, id="opcode 3"),
        pytest.param(frame(0xF, b"{}"), 1002, id="opcode 15"),
        pytest.param(text(b'{"type":"STATUS","state":"\xff"}'), 1007, id="bad UTF-8"),
        pytest.param(close_frame(1005), 1002, id="close code 1005"),
        pytest.param(close_frame(1000, b"\xff"), 1007, id="bad UTF-8 in a close frame"),
    ],
)
async def test_a_violation_is_answered_with_its_code_and_fails_all_that_is_pending(
    violation: bytes, code: int, figure: Callable[[str], None]
) -> None:
    def script(peer: Peer) -> None:
        begin_half_of_the_answers(peer)
        peer.send(violation)
        assert peer.receive_close()[0] == code
        peer.wait_gone()

    async with serve(script) as server, open_agent(server.url, limits=LIMITS) as agent:
        errors = await all_pending_fail(agent)
        assert [error.close_code for error in errors] == REQUESTS * [code]
    figure(f"{len(errors)} of {REQUESTS} pending failed, close code {code}")


MESSAGE_SIZE = LIMITS.message_size
HALF = MESSAGE_SIZE // 2


@pytest.mark.parametrize(
    "held",
    [
        pytest.param(b"", id="at first"),
        pytest.param(frame(TEXT, HALF * b"x", fin=False), id="behind half a message"),
        pytest.param(frame(TEXT, MESSAGE_SIZE * b"x", fin=False), id="behind a message of the limit"),
        pytest.param(
            frame(TEXT, HALF * b"x", fin=False) + frame(CONTINUATION, HALF * b"x", fin=False),
            id="behind two halves",
        ),
    ],
)
async def test_of_a_frame_that_claims_two_gibibytes_little_is_kept(
    held: bytes, figure: Callable[[str], None]
) -> None:
    claim = frame(CONTINUATION if held else TEXT, length=TWO_GIBIBYTES)
    block = MEBIBYTE * b"x"
    sent = peak = 0

    def script(peer: Peer) -> None:
        nonlocal sent, peak
        begin_half_of_the_answers(peer)
        peer.send(held + frame(PING))
        assert peer.receive() == Frame(PONG, b"")  # so what has been sent is held by now
        with Growth.measured() as growth:
            with contextlib.suppress(ConnectionError):
                peer.send(claim)
                while sent < TWO_GIBIBYTES:
                    peer.send(block)
                    sent += MEBIBYTE
            peak = growth.peak
        assert peer.receive_close()[0] == 1009
        peer.wait_gone()

    async with serve(script) as server, open_agent(server.url, limits=LIMITS) as agent:
        errors = await all_pending_fail(agent)
        assert [error.close_code for error in errors] == REQUESTS * [1009]
    bound = 2 * MESSAGE_SIZE
    figure(f"{peak / MEBIBYTE:.1f} MiB, bound {bound // MEBIBYTE} MiB; {sent / MEBIBYTE:.0f} MiB were sent")
    assert peak < bound


async def test_a_message_of_one_byte_fragments_is_refused_past_the_number_of_fragments(
    figure: Callable[[str], None],
) -> None:
    fragments = frame(TEXT, b"x", fin=False) + FRAGMENTS * frame(CONTINUATION, b"x", fin=False)

    def script(peer: Peer) -> None:
        begin_half_of_the_answers(peer)
        with contextlib.suppress(ConnectionError):
            peer.send(fragments)
            peer.send_until_gone(100 * frame(CONTINUATION, b"x", fin=False))
        assert peer.receive_close()[0] == 1009
        peer.wait_gone()

    async with serve(script) as server, open_agent(server.url, limits=LIMITS) as agent:
        with Growth.measured() as growth:
            errors = await all_pending_fail(agent)
            peak = growth.peak
        assert [error.close_code for error in errors] == REQUESTS * [1009]
    bound = 2 * MESSAGE_SIZE
    figure(f"{peak / MEBIBYTE:.1f} MiB for {FRAGMENTS:,} fragments, bound {bound // MEBIBYTE} MiB")
    assert peak < bound


PINGS = 60_000


async def test_what_stands_among_a_flood_of_pings_arrives_and_the_peer_is_not_given_up(
    figure: Callable[[str], None],
) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        request_id = peer.receive_prompt()
        for word in ("one ", "two ", "three"):
            peer.send(PINGS // 3 * frame(PING) + text(chunk(request_id, word)))
        peer.send(text(end(request_id)))  # without having read a pong
        peer.wait_gone()

    heartbeat = Heartbeat(interval=0.3, timeout=0.3)
    timeouts = Timeouts(close=0.3)
    async with serve(script) as server:
        stopwatch = Stopwatch()
        async with open_agent(server.url, heartbeat=heartbeat, timeouts=timeouts) as agent:
            assert (await agent.ask("hello")).text == "one two three"
        figure(f"{PINGS:,} pings and an answer in {stopwatch.elapsed:.2f} s")


SMALL = Limits(message_size=2_000)


def in_fragments_of_one_byte(message: bytes) -> bytes:
    between = b"".join(frame(CONTINUATION, bytes((byte,)), fin=False) for byte in message[1:-1])
    return frame(TEXT, message[:1], fin=False) + between + frame(CONTINUATION, message[-1:])


def chunk_of(size: int, request_id: str) -> bytes:
    return chunk(request_id, (size - len(chunk(request_id, ""))) * "x")


async def test_one_byte_fragments_are_refused_past_the_size_of_a_message_and_not_before(
    figure: Callable[[str], None],
) -> None:
    largest = b""

    def script(peer: Peer) -> None:
        nonlocal largest
        peer.open()
        request_id = peer.receive_prompt()
        largest = chunk_of(SMALL.message_size, request_id)
        for _ in range(3):
            peer.send(in_fragments_of_one_byte(largest))
        with contextlib.suppress(ConnectionError):
            peer.send(in_fragments_of_one_byte(chunk_of(SMALL.message_size + 1, request_id)))
        assert peer.receive_close()[0] == 1009
        peer.wait_gone()

    async with serve(script) as server, open_agent(server.url, limits=SMALL) as agent:
        with pytest.raises(ProtocolError) as caught:
            await agent.ask("hello")
        assert caught.value.close_code == 1009
        assert caught.value.partial is not None
        assert len(caught.value.partial.text) == 3 * json.loads(largest)["text"].count("x")
    figure(f"three messages of {len(largest):,} fragments passed, one of {len(largest) + 1:,} did not")
