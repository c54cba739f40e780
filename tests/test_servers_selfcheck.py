"""The servers of `tests.servers` are as awkward as the interoperability tests take them to be."""

from __future__ import annotations

import contextlib
import json
import socket
import urllib.parse
from typing import TYPE_CHECKING, Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.servers import ENDPOINTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_DEADLINE = 10
_HANDSHAKE = (
    "GET {} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
_NATIVE = [endpoint for endpoint in ENDPOINTS if "/native" in endpoint]
_SINGLE = [endpoint for endpoint in ENDPOINTS if "/single" in endpoint]


class Client:
    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    def send(self, **message: object) -> None:
        self.connection.send(json.dumps(message))

    def receive(self) -> Any:
        return json.loads(self.connection.recv(_DEADLINE))


@pytest.fixture
def client(request: pytest.FixtureRequest, url_of: Callable[[str], str]) -> Iterator[Client]:
    with connect(url_of(request.param), compression=None, proxy=None) as connection:
        yield Client(connection)


@pytest.mark.parametrize("client", _NATIVE, indirect=True)
def test_native_answers_overlap_and_a_cancelled_one_ends_at_once(client: Client) -> None:
    assert client.receive() == {"type": "STATUS", "state": "ready", "features": ["ids", "cancel"]}
    client.send(type="USER_MESSAGE", id="long", text="!count 1000000")
    client.send(type="USER_MESSAGE", id="short", text="a b c")
    arrived = [client.receive()]
    while arrived[-1] != {"type": "AGENT_EVENT_END", "id": "short", "tokens_used": 3}:
        arrived.append(client.receive())
    client.send(type="CANCEL", id="long")
    while arrived[-1].get("status") != "cancelled":
        arrived.append(client.receive())
    long = [message["text"] for message in arrived[:-1] if message["id"] == "long"]
    assert long == [f"{n} " for n in range(len(long))]
    assert arrived[-1] == {
        "type": "AGENT_EVENT_END",
        "id": "long",
        "tokens_used": len(long),
        "status": "cancelled",
    }
    assert [m["text"] for m in arrived if m["id"] == "short" and "text" in m] == ["a ", "b ", "c"]


@pytest.mark.parametrize("client", _SINGLE, indirect=True)
def test_single_answers_come_one_after_another_and_an_id_is_refused(client: Client) -> None:
    assert client.receive() == {"type": "STATUS", "state": "ready"}
    client.send(type="USER_MESSAGE", text="!count 2")
    client.send(type="USER_MESSAGE", text=" c")
    answers = [client.receive() for _ in range(6)]
    assert [answer.get("text", answer["type"]) for answer in answers] == [
        "0 ",
        "1 ",
        "AGENT_EVENT_END",
        " ",
        "c",
        "AGENT_EVENT_END",
    ]
    assert all("id" not in answer for answer in answers)
    client.send(type="USER_MESSAGE", text="c", id="1")
    with pytest.raises(ConnectionClosed, match="1002"):
        client.receive()


@contextlib.contextmanager
def _handshaken(url: str) -> Iterator[socket.socket]:
    """A plain socket on which a handshake has been sent, and nothing been read."""
    parts = urllib.parse.urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), _DEADLINE) as connection:
        connection.sendall(_HANDSHAKE.format(parts.path).encode())
        yield connection


@pytest.mark.parametrize("wire", ["native", "single"])
def test_fragmented_messages_have_a_ping_before_each_continuation(
    wire: str, url_of: Callable[[str], str]
) -> None:
    with _handshaken(url_of(f"raw/{wire}/fragmented")) as connection, connection.makefile("rb") as stream:
        while stream.readline() != b"\r\n":
            pass
        frames = []
        for _ in range(5):
            first, length = stream.read(2)
            frames.append((first, stream.read(length)))
    assert [first for first, _ in frames] == [0x01, 0x89, 0x00, 0x89, 0x80]
    assert json.loads(b"".join(payload for first, payload in frames if first != 0x89))["type"] == "STATUS"


@pytest.mark.parametrize("wire", ["native", "single"])
def test_coalesced_frames_and_the_handshake_response_come_in_one_read(
    wire: str, url_of: Callable[[str], str]
) -> None:
    with _handshaken(url_of(f"raw/{wire}/coalesced")) as connection:
        arrived = connection.recv(1 << 16)
    assert arrived.startswith(b"HTTP/1.1 101 ")
    assert b'{"type": "STATUS"' in arrived
