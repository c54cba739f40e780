"""Runs Autobahn's cases against a client that echoes: anyagent's transport, or a library below it.

``python -m tests.autobahn.client --client anyagent-trio``; see README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import anyio
import trio
from trio_websocket import ConnectionClosed, wrap_client_stream
from websockets.client import ClientProtocol
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import OPEN
from websockets.sync.client import connect as connect_blocking
from websockets.uri import parse_uri

from anyagent._target import Target
from anyagent._transports import TransportClosed, connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyagent._transports import Transport

MESSAGE_SIZE: Final = 32 * 1024 * 1024
"""Bytes; Autobahn's largest message has 16 MiB."""

DEADLINE: Final = 300.0
"""Seconds for a case; Autobahn itself gives up after 100."""


async def echo_with_anyagent(url: str) -> None:
    """Receive, send and close as anyagent's session does, for one connection."""
    with anyio.fail_after(DEADLINE):
        async with anyio.create_task_group() as task_group:
            transport = await connect(Target.parse(url), MESSAGE_SIZE, task_group)
            try:
                transport.close(await _echo(transport))
                await _send(transport, [])
            finally:
                with anyio.CancelScope(shield=True):
                    await transport.aclose()


async def _echo(transport: Transport) -> int:
    """Echo to the connection's end; return the code that it is then to be closed with."""
    try:
        while True:
            messages = await transport.receive()
            await _send(transport, [bytes(message) for message in messages])
    except TransportClosed as exc:
        return exc.code if exc.violation else 1000


async def _send(transport: Transport, messages: list[bytes]) -> None:
    with contextlib.suppress(anyio.BrokenResourceError):  # then `receive` tells the reason
        await transport.send(messages)


async def echo_with_trio_websocket(url: str) -> None:
    """trio-websocket by itself; but it leaves its stream open, so that is closed here."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    with trio.fail_after(DEADLINE):
        stream = await trio.open_tcp_stream(parts.hostname, parts.port)
        async with trio.open_nursery() as nursery:
            try:
                connection = await wrap_client_stream(
                    nursery,
                    stream,
                    parts.netloc,
                    f"{parts.path}?{parts.query}",
                    max_message_size=MESSAGE_SIZE,
                )
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        await connection.send_message(await connection.get_message())
                await connection.aclose()
            finally:
                await trio.aclose_forcefully(stream)


class _Echo:
    """What websockets' sans-I/O protocol leaves to its user: putting messages together, checking text."""

    def __init__(self, protocol: ClientProtocol) -> None:
        self._protocol = protocol
        self._message = bytearray()
        self._binary = False

    def answer(self) -> None:
        for event in self._protocol.events_received():
            if isinstance(event, Response):
                continue
            assert isinstance(event, Frame)
            if event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                self._answer_frame(event)

    def _answer_frame(self, frame: Frame) -> None:
        if frame.opcode is not Opcode.CONT:
            self._binary = frame.opcode is Opcode.BINARY
        self._message += frame.data
        if not frame.fin or self._protocol.state is not OPEN:
            return
        message, self._message = bytes(self._message), bytearray()
        if self._binary:
            self._protocol.send_binary(message)
            return
        try:
            message.decode()
        except UnicodeDecodeError:
            self._protocol.fail(CloseCode.INVALID_DATA)
        else:
            self._protocol.send_text(message)


def echo_with_websockets(url: str) -> None:
    """websockets' sans-I/O protocol by itself, on a blocking socket."""
    uri = parse_uri(url)
    protocol = ClientProtocol(uri, max_size=MESSAGE_SIZE)
    protocol.send_request(protocol.connect())
    echo = _Echo(protocol)
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection((uri.host, uri.port), DEADLINE) as sock,
    ):
        data = None
        while data != b"":
            for output in protocol.data_to_send():
                if output:
                    sock.sendall(output)
                else:
                    sock.shutdown(socket.SHUT_WR)
            data = sock.recv(65_536)
            if data:
                protocol.receive_data(data)
            else:
                protocol.receive_eof()
            echo.answer()


CLIENTS: Final[dict[str, Callable[[str], None]]] = {
    "anyagent-asyncio": lambda url: anyio.run(echo_with_anyagent, url, backend="asyncio"),
    "anyagent-trio": lambda url: anyio.run(echo_with_anyagent, url, backend="trio"),
    "websockets": echo_with_websockets,
    "trio-websocket": lambda url: trio.run(echo_with_trio_websocket, url),
}


def _ask(url: str) -> str:
    """What the server says, if it says anything, until it closes the connection."""
    with connect_blocking(url, proxy=None, compression=None) as connection:
        return "".join(str(message) for message in connection)


def run_cases(client: str, url: str) -> int:
    """Run every case; return how many of them `client` left with an exception."""
    count = int(_ask(f"{url}/getCaseCount"))
    raised = 0
    for number in range(1, count + 1):
        name = json.loads(_ask(f"{url}/getCaseInfo?case={number}"))["id"]
        started = time.monotonic()
        outcome = ""
        try:
            CLIENTS[client](f"{url}/runCase?case={number}&agent={client}")
        except Exception as exc:  # the other cases are to run all the same
            raised += 1
            outcome = f": {exc!r}"
        print(f"{client} {number}/{count} {name} {time.monotonic() - started:.1f} s{outcome}", flush=True)
    _ask(f"{url}/updateReports?agent={client}")
    return raised


def main() -> int:
    parser = argparse.ArgumentParser(description="Run Autobahn's cases against a client that echoes.")
    parser.add_argument("--client", choices=CLIENTS, required=True)
    parser.add_argument("--url", default="ws://127.0.0.1:9001")
    arguments = parser.parse_args()
    return 1 if run_cases(arguments.client, arguments.url.rstrip("/")) else 0


if __name__ == "__main__":
    sys.exit(main())
