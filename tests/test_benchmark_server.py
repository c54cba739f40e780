"""The replay server of the benchmarks, and what it puts on the wire."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from anyagent import IM
from benchmarks import wire
from benchmarks.server import PLANS, ReplayServer

ROOT = Path(__file__).parent.parent
if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE = 60.0

# the wire


@pytest.mark.parametrize(
    ("size", "header"),
    [
        (125, b"\x81\x7d"),
        (126, b"\x81\x7e\x00\x7e"),
        (65535, b"\x81\x7e\xff\xff"),
        (65536, b"\x81\x7f\x00\x00\x00\x00\x00\x01\x00\x00"),
    ],
)
def test_a_frame_has_one_of_three_forms(size: int, header: bytes) -> None:
    assert wire.frame(b"x" * size) == header + b"x" * size


def masked(payload: bytes, opcode: int = wire.TEXT) -> bytes:
    frame = wire.frame(payload, opcode)
    header, mask = frame[: len(frame) - len(payload)], b"\x01\x80\xff\x00"
    return (
        bytes((header[0], header[1] | 0x80))
        + header[2:]
        + mask
        + bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))
    )


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_the_frames_of_a_client_are_read_however_they_are_split(step: int) -> None:
    payloads = [b"", b"a", b"b" * 126, b"c" * 70000]
    data = b"".join(map(masked, payloads)) + masked(b"p", wire.PING)
    reader, frames = wire.FrameReader(), []
    for start in range(0, len(data), step):
        frames += list(reader.feed(data[start : start + step]))
    assert frames == [*((wire.TEXT, payload) for payload in payloads), (wire.PING, b"p")]


@pytest.mark.parametrize("data", [b"\x81\x01abcdef", b"\x01\x81abcdef", b"\x80\x81abcdef"])
def test_a_frame_that_is_a_fragment_or_not_masked_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="fragment or not masked"):
        list(wire.FrameReader().feed(data))


def test_the_frames_of_a_round_are_its_messages() -> None:
    for order in ("burst", "interleaved"):
        messages = wire.round_messages(("1", "2"), 3, 26, order)
        assert wire.round_frames(("1", "2"), 3, 26, order) == b"".join(map(wire.frame, messages))


def test_an_echo_is_as_long_as_it_should_be() -> None:
    assert [wire.echo("abc", size) for size in (2, 3, 7)] == ["ab", "abc", "abcabca"]


# the plans


def answered(*messages: tuple[str | None, str | None]) -> bytes:
    """The frames of chunks, by id and text, and of ends, without a text."""
    return b"".join(
        wire.frame(wire.end(request_id, 2) if text is None else wire.chunk(request_id, text))
        for request_id, text in messages
    )


def test_answers_that_are_in_flight_get_their_chunks_in_turn() -> None:
    plan = PLANS["answer"]({"chunks": "2", "size": "4"})
    first, second = (plan.prompt(IM.UserMessage(text=text, id=text[0])) for text in ("abc", "b"))
    assert first is not None
    assert second is not None
    turn = (("a", "abca"), ("b", "bbbb"))
    assert b"".join(first) == answered(*turn, *turn, ("a", None), ("b", None))
    assert list(second) == []  # the first one has done its work


def test_a_prompt_joins_the_answers_that_are_being_written() -> None:
    size = 1 << 15  # so that a chunk is a write of its own
    plan = PLANS["answer"]({"chunks": "2", "size": str(size)})
    first = plan.prompt(IM.UserMessage(text="a", id="a"))
    assert first is not None
    a, b = ("a", "a" * size), ("b", "b" * size)
    assert next(first) == answered(a)
    plan.prompt(IM.UserMessage(text="b", id="b"))
    assert list(first) == [answered(a, b, ("a", None)), answered(b, ("b", None))]


# the server


class WebSocket:
    """A client over a plain socket; every wait has a deadline."""

    def __init__(self, port: int, path: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self._stream = self.socket.makefile("rb")
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        self.head = b"".join(iter(self._stream.readline, b"\r\n"))

    def close(self) -> None:
        self._stream.close()
        self.socket.close()

    def send(self, **message: object) -> None:
        self.socket.sendall(masked(json.dumps(message).encode()))

    def prompt(self, text: str, **fields: object) -> None:
        self.send(type="USER_MESSAGE", text=text, **fields)

    def frame(self) -> tuple[int, bytes]:
        first, size = self._stream.read(2)
        if size > 125:
            size = int.from_bytes(self._stream.read(2 if size == 126 else 8), "big")
        return first & 0x0F, self._stream.read(size)

    def message(self) -> dict[str, Any]:
        opcode, payload = self.frame()
        assert opcode == wire.TEXT
        message: dict[str, Any] = json.loads(payload)
        return message

    def at_end(self) -> bool:
        return self._stream.read(1) == b""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ReplayServer()
    yield server.port
    server.close()


@contextlib.contextmanager
def connected(port: int, path: str) -> Iterator[WebSocket]:
    """A client that has had its status."""
    with contextlib.closing(WebSocket(port, path)) as client:
        status = client.message()
        assert status["type"] == "STATUS"
        assert status.get("features", []) == (["ids", "cancel"] if path.startswith("/ids/") else [])
        yield client


def chunks_of(*messages: dict[str, Any]) -> list[tuple[str | None, str | None]]:
    return [(message.get("id"), message.get("text")) for message in messages]


def test_the_server_accepts_the_handshake(port: int) -> None:
    with contextlib.closing(WebSocket(port, "/ids/hold")) as client:
        assert client.head.startswith(b"HTTP/1.1 101 ")
        assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in client.head  # RFC 6455, 1.3


def test_the_server_refuses_a_path_that_says_nothing(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(WebSocket(port, "/ids/nothing")) as client:
        assert client.head.startswith(b"HTTP/1.1 404 ")
        assert client.at_end()
    assert "no such plan: /ids/nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("order", "ids"),
    [("burst", ["a", "a", "a", "b", "b", "b"]), ("interleaved", ["a", "b", "a", "b", "a", "b"])],
)
def test_a_round_is_answered_once_all_its_prompts_are_there(port: int, order: str, ids: list[str]) -> None:
    with connected(port, f"/ids/round?requests=2&chunks=2&size=3&order={order}") as client:
        for _ in range(2):
            client.prompt(wire.PROMPT, id="a")
            client.prompt(wire.PROMPT, id="b")
            messages = [client.message() for _ in range(6)]
            assert [message["id"] for message in messages] == ids
            for request_id in "ab":
                own = [message for message in messages if message["id"] == request_id]
                assert [message["type"] for message in own] == [
                    "AGENT_EVENT_TEXT_CHUNK",
                    "AGENT_EVENT_TEXT_CHUNK",
                    "AGENT_EVENT_END",
                ]
                assert [len(message["text"]) for message in own[:2]] == [3, 3]


def test_a_round_to_warm_up_has_as_many_chunks_as_the_url_says(port: int) -> None:
    with connected(port, "/ids/round?requests=1&chunks=3&size=3&warm=1") as client:
        client.prompt(wire.WARM_UP, id="1")
        client.prompt(wire.PROMPT, id="2")
        ids = [client.message()["id"] for _ in range(6)]
        assert ids == ["1"] * 2 + ["2"] * 4


def test_a_round_that_is_held_is_answered_when_the_client_says_so(port: int) -> None:
    path = "/ids/round?requests=2&chunks=1&size=2&order=interleaved&hold=1"
    with connected(port, path) as client:
        for _ in range(2):
            client.prompt("first", id="1")
            client.prompt(wire.READY, id="ready")
            client.prompt("second", id="2")
            assert client.message()["id"] == "ready"
            client.prompt(wire.READY, id="ready again")
            assert client.message()["id"] == "ready again"
            client.prompt(wire.GO, id="go")
            assert [client.message()["id"] for _ in range(5)] == ["go", "1", "2", "1", "2"]


def test_prompts_are_answered_as_they_come(port: int) -> None:
    with connected(port, "/single/answer?chunks=2&size=3") as client:
        for text in ("a", "b"):
            client.prompt(text)
            assert chunks_of(*(client.message() for _ in range(3))) == [*[(None, text * 3)] * 2, (None, None)]


def test_without_ids_the_answers_have_none(port: int) -> None:
    with connected(port, "/single/round?requests=1&chunks=1&size=3") as client:
        client.prompt(wire.PROMPT)
        assert chunks_of(client.message(), client.message()) == [(None, "The"), (None, None)]


def test_the_server_answers_a_cancel_with_an_end(port: int) -> None:
    with connected(port, "/ids/round?requests=1&chunks=1&size=3&end=0") as client:
        client.prompt(wire.PROMPT, id="1")
        assert client.message()["text"] == "The"
        client.send(type="CANCEL", id="1")
        end = client.message()
        assert (end["type"], end["id"], end["status"]) == ("AGENT_EVENT_END", "1", "cancelled")


def test_a_held_request_is_not_answered_but_a_sync_is(port: int) -> None:
    with connected(port, "/ids/hold") as client:
        client.prompt(wire.PROMPT, id="1")
        client.prompt(wire.SYNC, id="2")
        end = client.message()
        assert (end["type"], end["id"]) == ("AGENT_EVENT_END", "2")


def test_paced_requests_get_their_chunks_in_turn(port: int) -> None:
    with connected(port, "/ids/paced?requests=3&chunks=2&size=3&rate=500") as client:  # a period of two ticks
        for request_id in "abc":
            client.prompt(wire.PROMPT, id=request_id)
        messages = [client.message() for _ in range(9)]
        text = [message["id"] for message in messages if "text" in message]
        assert text == ["a", "c", "b", "a", "c", "b"]
        assert [message["id"] for message in messages if "text" not in message] == ["a", "c", "b"]


def test_a_probe_carries_the_time_of_its_writing_among_the_chunks_of_others(port: int) -> None:
    with connected(port, "/ids/probe?load=2&chunks=3&size=26&rate=500") as client:
        client.prompt(wire.PROMPT, id="a")
        client.prompt(wire.PROBE, id="p")
        client.prompt(wire.PROMPT, id="b")
        messages = [client.message() for _ in range(3 + 2 * 3 + 3)]
        times = [
            int(message["text"][:20]) for message in messages if message["id"] == "p" and "text" in message
        ]
        assert len(times) == 3
        assert times == sorted(times)
        assert times[0] > 0
        assert [message["id"] for message in messages[:-3]] == ["a", "b", "p"] * 3
        assert [message["id"] for message in messages[-3:]] == ["a", "b", "p"]


def test_the_server_answers_pings_and_ignores_pongs(port: int) -> None:
    with connected(port, "/ids/hold") as client:
        client.socket.sendall(masked(b"quiet", wire.PONG) + masked(b"ping", wire.PING))
        assert client.frame() == (wire.PONG, b"ping")


def test_a_pong_does_not_wait_for_the_end_of_an_answer(port: int) -> None:
    # More than sockets buffer, so that the answer has not ended when the ping comes.
    with connected(port, f"/ids/answer?chunks=512&size={1 << 16}") as client:
        client.prompt("a", id="1")
        assert client.message()["id"] == "1"
        client.socket.sendall(masked(b"ping", wire.PING))
        while (frame := client.frame())[0] == wire.TEXT:
            assert json.loads(frame[1])["type"] == "AGENT_EVENT_TEXT_CHUNK"
        assert frame == (wire.PONG, b"ping")


def test_the_server_answers_a_close_and_ends_the_stream(port: int) -> None:
    with connected(port, "/ids/hold") as client:
        client.socket.sendall(masked(b"\x03\xe8bye", wire.CLOSE))
        assert client.frame() == (wire.CLOSE, b"\x03\xe8")
        assert client.at_end()


def test_the_server_reads_on_while_nobody_reads_what_it_sends(port: int) -> None:
    size = 32 << 20  # more than sockets buffer
    with connected(port, f"/ids/round?requests=1&chunks=1&size={size}") as client:
        client.prompt(wire.PROMPT, id="1")
        for _ in range(64):
            client.send(type="CANCEL", id="x" * 65536)
        assert len(client.message()["text"]) == size


def test_the_server_gets_over_a_client_that_breaks_the_protocol(
    port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with connected(port, "/ids/hold") as client:
        client.socket.sendall(b"\x81\x01abcdef")
        assert client.at_end()
    with connected(port, "/ids/hold") as client:
        client.prompt(wire.SYNC, id="1")
        assert client.message()["id"] == "1"
