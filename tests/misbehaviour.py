"""Agents that misbehave while a client connects: scripts for `tests.wire_server.serve`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from .wire_server import PING, STATUS, Peer, frame, text

if TYPE_CHECKING:
    from .wire_server import Script


def rejection(status_line: str) -> Script:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(f"HTTP/1.1 {status_line}\r\nLocation: /elsewhere\r\nContent-Length: 3\r\n\r\nno!".encode())
        peer.wait_gone()

    return script


def endless_body(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\n")
    peer.send_until_gone(b"1000\r\n" + 0x1000 * b"x" + b"\r\n")


def endless_continues(peer: Peer) -> None:
    peer.read_request()
    peer.send_until_gone(b"HTTP/1.1 100 Continue\r\n\r\n")


def early_hints(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" + peer.switching() + text(STATUS))
    peer.wait_gone()


def endless_headers(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 101 Switching Protocols\r\n")
    peer.send_until_gone(b"X-Header: " + 100 * b"x" + b"\r\n")


def endless_header(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 101 Switching Protocols\r\nX-Header: ")
    peer.send_until_gone(1_000 * b"x")


def many_long_headers(peer: Peer) -> None:
    peer.read_request()
    with contextlib.suppress(ConnectionError):
        peer.send(peer.switching(extra=100 * ("X-Header: " + 4_000 * "x" + "\r\n")) + text(STATUS))
    peer.wait_gone()


def endless_status_line(peer: Peer) -> None:
    peer.read_request()
    peer.send_until_gone(1_000 * b"HTTP")


def answer(**changes: str) -> Script:
    def script(peer: Peer) -> None:
        peer.read_request()
        response = peer.switching().decode()
        for name, value in changes.items():
            response = response.replace(name, value)
        peer.send(response.encode() + text(STATUS))
        peer.wait_gone()

    return script


def wrong_accept_key(peer: Peer) -> None:
    peer.read_request()
    peer.send(peer.switching(accept="dGhlIHNhbXBsZSBub25jZQ==") + text(STATUS))
    peer.wait_gone()


def unasked_extension(peer: Peer) -> None:
    peer.read_request()
    peer.send(peer.switching(extra="Sec-WebSocket-Extensions: permessage-deflate\r\n") + text(STATUS))
    peer.wait_gone()


def unasked_subprotocol(peer: Peer) -> None:
    peer.read_request()
    peer.send(peer.switching(extra="Sec-WebSocket-Protocol: chat\r\n") + text(STATUS))
    peer.wait_gone()


def garbage(peer: Peer) -> None:
    peer.read_request()
    peer.send(bytes(range(256)) + b"\r\n\r\n")
    peer.wait_gone()


def echo(peer: Peer) -> None:
    peer.send(peer.read_request().encode() + b"\r\n\r\n")
    peer.wait_gone()


def fin_before_the_answer(peer: Peer) -> None:
    peer.read_request()


def fin_in_the_answer(peer: Peer) -> None:
    peer.read_request()
    peer.send(peer.switching()[:40])


def reset_in_the_answer(peer: Peer) -> None:
    peer.read_request()
    peer.send(peer.switching()[:40])
    peer.reset()


def silence(peer: Peer) -> None:
    peer.wait_gone()


def silence_after_the_request(peer: Peer) -> None:
    peer.read_request()
    peer.wait_gone()


def a_byte_every_so_often(peer: Peer) -> None:
    peer.read_request()
    peer.dribble(b"HTTP/1.1 101 Switching Protocols\r\n" + 10_000 * b"X-A: b\r\n", pause=0.02)


def no_status(peer: Peer) -> None:
    peer.upgrade()
    peer.wait_gone()


def pings_but_no_status(peer: Peer) -> None:
    peer.upgrade()
    peer.send_until_gone(frame(PING, b"x"))


def half_a_status(peer: Peer) -> None:
    peer.upgrade()
    peer.send(text(STATUS)[:-1])
    peer.wait_gone()


def reset_before_the_status(peer: Peer) -> None:
    peer.upgrade()
    peer.reset()
