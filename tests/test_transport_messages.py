"""Messages over real sockets, however they are framed, and what becomes of a peer that breaks the rules."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

import anyio
import pytest

from anyagent import OM, Disconnected, Limits, ProtocolError, Timeouts, open_agent
from anyagent._target import Target
from anyagent._transports import OUTPUT_SIZE, TransportClosed, connect
from anyagent._transports.frames import FRAGMENTS

from .wire_server import (
    BINARY,
    CLOSE,
    CONTINUATION,
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
    from collections.abc import AsyncIterator, Callable

    from anyagent import Response
    from anyagent._transports import Transport

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]

LIMIT = 100_000
LIMITS = Limits(message_size=LIMIT)


@contextlib.asynccontextmanager
async def transport_to(url: str) -> AsyncIterator[Transport]:
    async with anyio.create_task_group() as tasks:
        transport = await connect(Target.parse(url), 10_000_000, tasks)
        try:
            yield transport
        finally:
            await transport.aclose()


async def receive_messages(transport: Transport, count: int) -> list[bytes]:
    messages: list[bytes] = []
    while len(messages) < count:
        messages += await transport.receive()
    return messages


async def texts_of(response: Response, count: int) -> list[str]:
    events = [await anext(response) for _ in range(count)]
    return [event.text for event in events if isinstance(event, OM.EventTextChunk)]


# Framing


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 5_000_000])
async def test_a_message_of_any_length_passes_both_ways(size: int) -> None:
    message = (b"0123456789" * (size // 10 + 1))[:size]

    def script(peer: Peer) -> None:
        peer.upgrade()
        received = peer.receive()
        assert received == Frame(TEXT, message)
        peer.send(text(received.payload))
        peer.wait_gone()

    async with serve(script) as server, transport_to(server.url) as transport:
        await transport.send([message])
        assert await receive_messages(transport, 1) == [message]


async def test_messages_that_are_sent_together_are_frames_of_their_own() -> None:
    messages = [b"one", b"", "\u00fcber".encode(), 70_000 * b"x"]

    def script(peer: Peer) -> None:
        peer.upgrade()
        assert [peer.receive() for _ in messages] == [Frame(TEXT, message) for message in messages]
        peer.wait_gone()

    async with serve(script) as server, transport_to(server.url) as transport:
        await transport.send(messages)


async def test_many_frames_in_one_segment_are_as_many_messages() -> None:
    messages = [str(number).encode() for number in range(1_000)]

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(peer.switching() + b"".join(text(message) for message in messages))
        peer.wait_gone()

    async with serve(script) as server, transport_to(server.url) as transport:
        assert await receive_messages(transport, 1_000) == messages


@pytest.mark.parametrize("size", [5, 200, 70_000])
async def test_one_frame_may_come_in_many_segments(size: int) -> None:
    data = text(size * b"x")

    def script(peer: Peer) -> None:
        peer.upgrade()
        step = max(1, size // 100)
        peer.dribble(data[:20], pause=0.001)
        for start in range(20, len(data), step):
            peer.send(data[start : start + step])
        peer.wait_gone()

    async with serve(script) as server, transport_to(server.url) as transport:
        assert await receive_messages(transport, 1) == [size * b"x"]


async def test_a_fragmented_message_is_put_together_and_pings_between_its_fragments_are_answered() -> None:
    message = "gr\u00fc\u00df \U0001f600".encode()

    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.send(frame(TEXT, fin=False))
        for number in range(len(message)):  # in the middle of characters, too
            ping = str(number).encode()
            peer.send(frame(PING, ping) + frame(CONTINUATION, message[number : number + 1], fin=False))
            assert peer.receive() == Frame(PONG, ping)
        peer.send(frame(PING, 125 * b"p") + frame(PONG, b"unasked") + frame(CONTINUATION))
        assert peer.receive() == Frame(PONG, 125 * b"p")
        peer.send(text(b"next"))
        peer.wait_gone()

    async with serve(script) as server, transport_to(server.url) as transport:
        messages: list[bytes] = []
        while len(messages) < 2:
            messages += await transport.receive()
            await transport.send([])
        assert messages == [message, b"next"]


async def test_a_ping_is_sent_and_its_answer_is_no_message() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        assert peer.receive() == Frame(PING, b"")
        assert peer.receive() == Frame(PING, b"")
        peer.send(frame(PONG) + frame(PONG, b"unasked") + text(b"x"))
        peer.wait_gone()

    async with serve(script) as server, transport_to(server.url) as transport:
        transport.ping()
        transport.ping()
        await transport.send([])
        assert await receive_messages(transport, 1) == [b"x"]


async def test_a_prompt_and_an_answer_of_five_megabytes_pass() -> None:
    large = 5_000_000 * "x"

    def script(peer: Peer) -> None:
        peer.open()
        message = peer.receive_message()
        assert message["text"] == large
        peer.send(text(chunk(message["id"], large)) + text(end(message["id"])))
        peer.finish()

    async with serve(script) as server, open_agent(server.url) as agent:
        assert (await agent.ask(large)).text == large


async def test_a_message_of_exactly_the_limit_is_accepted() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        request_id = peer.receive_prompt()
        padding = LIMIT - len(chunk(request_id, ""))
        whole = chunk(request_id, padding * "x")
        assert len(whole) == LIMIT
        peer.send(text(whole))
        peer.send(frame(TEXT, whole[:1], fin=False) + frame(CONTINUATION, whole[1:]))
        peer.send(text(end(request_id)))
        peer.finish()

    async with serve(script) as server, open_agent(server.url, limits=LIMITS) as agent:
        assert len((await agent.ask("hello")).text) > LIMIT


async def test_nothing_follows_a_close_frame() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        assert peer.receive() == Frame(TEXT, b"before")
        assert peer.receive() == Frame(CLOSE, (1000).to_bytes(2))
        assert peer.sock.recv(1) == b""

    async with serve(script) as server, transport_to(server.url) as transport:
        transport.close(1006)  # no code that can be sent
        await transport.send([b"before"])
        transport.close(1000)
        await transport.send([b"after"])
        transport.close(1001)
        transport.ping()
        await transport.send([])


# Violations

VIOLATIONS = {
    "binary message": (frame(BINARY, b"x"), 1002),
    "empty binary message": (frame(BINARY), 1002),
    "fragmented binary message": (frame(BINARY, fin=False) + frame(CONTINUATION), 1002),
    "bad UTF-8": (text(b"\xff"), 1007),
    "bad UTF-8 in a fragment": (frame(TEXT, b"\xc3", fin=False) + frame(CONTINUATION, b"x"), 1007),
    "cut UTF-8": (text(b"\xc3"), 1007),
    "surrogate in UTF-8": (text(b"\xed\xa0\x80"), 1007),
    "reserved bit 1": (frame(TEXT, b"x", rsv=4), 1002),
    "reserved bit 2": (frame(TEXT, b"x", rsv=2), 1002),
    "reserved bit 3": (frame(PING, b"x", rsv=1), 1002),
    "masked": (frame(TEXT, b"x", masked=True), 1002),
    "reserved opcode": (frame(0x3, b"x"), 1002),
    "reserved control opcode": (frame(0xB, b"x"), 1002),
    "continuation of nothing": (frame(CONTINUATION, b"x"), 1002),
    "message within a message": (frame(TEXT, fin=False) + text(b"x"), 1002),
    "fragmented ping": (frame(PING, fin=False), 1002),
    "long ping": (frame(PING, 126 * b"x"), 1002),
    "close frame of one byte": (frame(CLOSE, b"x"), 1002),
    "close code 999": (close_frame(999), 1002),
    "close code 1004": (close_frame(1004), 1002),
    "close code 1005": (close_frame(1005), 1002),
    "close code 1006": (close_frame(1006), 1002),
    "close code 1015": (close_frame(1015), 1002),
    "close code 2999": (close_frame(2999), 1002),
    "close code 5000": (close_frame(5000), 1002),
    "bad UTF-8 in a close frame": (close_frame(1000, b"\xff"), 1007),
    "close frame within a message that is bad": (frame(TEXT, fin=False) + frame(CLOSE, b"x"), 1002),
    "length of 2 GiB": (frame(TEXT, length=2**31), 1009),
    "length of 2 GiB in a fragment": (frame(TEXT, b"x", fin=False) + frame(CONTINUATION, length=2**31), 1009),
    "one byte too many": (text((LIMIT + 1) * b"x"), 1009),
    "one byte too many in fragments": (
        frame(TEXT, LIMIT // 2 * b"x", fin=False) + frame(CONTINUATION, (LIMIT // 2 + 1) * b"x"),
        1009,
    ),
    "too many bytes but not characters": (text((LIMIT // 2 + 1) * "\u00e9".encode()), 1009),
    "too many fragments": (frame(TEXT, fin=False) + FRAGMENTS * frame(CONTINUATION, fin=False), 1009),
}


@pytest.mark.parametrize(("violation", "code"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
async def test_a_violation_fails_what_is_in_flight_after_what_had_arrived_and_its_code_is_sent(
    violation: bytes, code: int
) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        started, silent = peer.receive_prompt(), peer.receive_prompt()
        assert started != silent
        with contextlib.suppress(ConnectionError):
            peer.send(text(chunk(started, "one")) + text(chunk(started, "two")) + violation)
        assert peer.receive_close()[0] == code
        peer.wait_gone()

    async with serve(script) as server, open_agent(server.url, limits=LIMITS) as agent:
        started = await agent.send_message("hello")
        silent = await agent.send_message("hello")
        assert await texts_of(started, 2) == ["one", "two"]
        for response in (started, silent):
            with pytest.raises(ProtocolError) as caught:
                await anext(response)
            assert caught.value.close_code == code
        with pytest.raises(Disconnected) as later:
            await agent.ask("hello")
        assert (later.value.code, later.value.phase) == (code, "not_sent")
        assert isinstance(later.value.__cause__, ProtocolError)


@pytest.mark.parametrize(
    "header",
    [b"\xc1\x7f", b"\x80\x7f", b"\x88\x7f", b"\x89\x7f", b"\x01\x00\x81\x7f"],
    ids=["reserved bit", "continuation of nothing", "close", "ping", "text within a message"],
)
async def test_a_frame_that_breaks_the_protocol_is_not_waited_for_to_its_end(header: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.receive_prompt()
        with contextlib.suppress(ConnectionError):
            peer.send(header + (2**40).to_bytes(8) + 20 * LIMIT * b"x")
        assert peer.receive_close()[0] in (1002, 1009)
        peer.wait_gone()

    async with serve(script) as server, open_agent(server.url, limits=LIMITS) as agent:
        with pytest.raises(ProtocolError):
            await agent.ask("hello")


async def test_nothing_that_comes_after_a_violation_is_delivered() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.send(text(b"before") + frame(BINARY, b"x") + text(b"after") + frame(BINARY, b"x"))
        peer.wait_gone()

    async with serve(script) as server, transport_to(server.url) as transport:
        assert await receive_messages(transport, 1) == [b"before"]
        for _ in range(2):
            with pytest.raises(TransportClosed) as caught:
                await transport.receive()
            assert (caught.value.code, caught.value.violation) == (1002, True)


@pytest.mark.parametrize("size", [1, 3, 1_000])
async def test_a_violation_is_noticed_however_the_segments_fall(size: int) -> None:
    data = text(b"first") + frame(TEXT, 10 * b"x", fin=False) + frame(CONTINUATION, length=2**31)

    def script(peer: Peer) -> None:
        peer.upgrade()
        for start in range(0, len(data), size):
            peer.send(data[start : start + size])
        assert peer.receive_close()[0] == 1009
        peer.wait_gone()

    async with serve(script) as server, transport_to(server.url) as transport:
        assert await receive_messages(transport, 1) == [b"first"]
        with pytest.raises(TransportClosed) as caught:
            await receive_messages(transport, 1)
        assert (caught.value.code, caught.value.violation) == (1009, True)
        transport.close(1009)
        await transport.send([])


@pytest.mark.parametrize(
    "flood",
    [frame(PING, 125 * b"x"), frame(PONG, 125 * b"x"), text(b'{"type":"STATUS","state":"again"}')],
    ids=["pings", "pongs", "notices"],
)
async def test_a_peer_that_floods_and_does_not_read_is_read_on_and_not_all_answers_are_kept(
    flood: bytes, figure: Callable[[str], None]
) -> None:
    kept = 0
    answered = threading.Event()

    def script(peer: Peer) -> None:
        nonlocal kept
        peer.open()
        with peer.client_socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        request_id = peer.receive_prompt()
        peer.send(text(chunk(request_id, "before")))
        for _ in range(100):
            peer.send(100 * flood)
        peer.send(text(chunk(request_id, "after")) + text(end(request_id)))
        assert answered.wait(DEADLINE)
        while (received := peer.receive()).opcode == PONG:
            kept += 6 + len(received.payload)
        assert kept < 600_000 + OUTPUT_SIZE  # the kernel's buffers and ours; 1,310,000 were due
        assert received.opcode == CLOSE
        peer.send(close_frame(1000))
        peer.wait_gone()

    patient = Timeouts(close=DEADLINE)
    async with serve(script) as server, open_agent(server.url, timeouts=patient) as agent:
        assert (await agent.ask("hello")).text == "beforeafter"
        answered.set()
    figure(f"{kept:,} bytes of pongs kept, of 1,310,000 that 10,000 pings are due")
