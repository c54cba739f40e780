"""Clients that speak the wire by hand; every wait has a deadline."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as websocket_connect

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

DEADLINE = 10.0

_silent = logging.Logger("raw client")
_silent.disabled = True


class RawClient:
    """JSON messages as dicts, over a `websockets` connection."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket

    def send(self, **message: Any) -> None:
        self.websocket.send(json.dumps(message))

    def prompt(self, text: str, **fields: Any) -> None:
        self.send(type="USER_MESSAGE", text=text, **fields)

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.websocket.recv(timeout=DEADLINE))
        return message

    def receive_answer(self) -> list[dict[str, Any]]:
        """Everything up to and including the next terminal."""
        answer = [self.receive()]
        while answer[-1]["type"] not in ("AGENT_EVENT_END", "ERROR"):
            answer.append(self.receive())
        return answer


@contextlib.contextmanager
def connect_before_status(url: str, compression: str | None = None) -> Iterator[RawClient]:
    with websocket_connect(
        url,
        compression=compression,
        max_size=None,
        proxy=None,
        open_timeout=DEADLINE,
        close_timeout=DEADLINE,
        ping_interval=None,
        logger=_silent,
    ) as websocket:
        yield RawClient(websocket)


@contextlib.contextmanager
def connect(url: str, compression: str | None = None) -> Iterator[RawClient]:
    with connect_before_status(url, compression) as client:
        assert client.receive()["type"] == "STATUS"
        yield client


class RawSocket:
    """WebSocket on a bare socket: nothing is answered unless the test does."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._arrived = b""

    def send_frame(self, first_byte: int, payload: bytes) -> None:
        assert len(payload) < 126
        self.sock.sendall(bytes([first_byte, 0x80 | len(payload), 0, 0, 0, 0]) + payload)

    def receive_until(self, end: bytes) -> bytes:
        """Everything up to and including `end`."""
        while end not in self._arrived:
            data = self.sock.recv(65_536)
            assert data, "the stream has ended"
            self._arrived += data
        found, _, self._arrived = self._arrived.partition(end)
        return found + end

    def receive_to_eof(self) -> bytes:
        rest = self._arrived
        while data := self.sock.recv(65_536):
            rest += data
        return rest


@contextlib.contextmanager
def connect_raw(url: str, ssl_context: ssl.SSLContext | None = None) -> Iterator[RawSocket]:
    """A connection up to and including its STATUS.

    The one to use with TLS: `RawClient` reads and writes in two threads, which an `ssl.SSLSocket` does not
    always survive.
    """
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(
            socket.create_connection((address.hostname, address.port), timeout=DEADLINE)
        )
        if ssl_context is not None:
            sock = stack.enter_context(ssl_context.wrap_socket(sock, server_hostname=address.hostname))
        client = RawSocket(sock)
        key = base64.b64encode(b"sixteen bytes...").decode()
        sock.sendall(
            f"GET / HTTP/1.1\r\nHost: {address.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        assert b" 101 " in client.receive_until(b"\r\n\r\n")
        assert b"STATUS" in client.receive_until(b"}")
        yield client


def text_chunk(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "AGENT_EVENT_TEXT_CHUNK", "text": text, **fields}


def end(tokens_used: int, **fields: Any) -> dict[str, Any]:
    return {"type": "AGENT_EVENT_END", "tokens_used": tokens_used, **fields}


def error(code: str, details: str, **fields: Any) -> dict[str, Any]:
    return {"type": "ERROR", "code": code, "details": details, **fields}
