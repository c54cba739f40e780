"""TCP on asyncio. AnyIO's own stream reads 256 KiB at most, and stops and starts reading each time."""

from __future__ import annotations

import asyncio
import socket
from itertools import zip_longest
from typing import Any, Final, cast

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream

from . import READ_SIZE

__all__ = ["TCPStream", "connect_tcp"]

_ATTEMPT_DELAY: Final = 0.25  # RFC 8305, section 8
_NUMERIC: Final = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
_SMALLEST_READ_SIZE: Final = 64 * 1024


async def connect_tcp(host: str, port: int) -> TCPStream:
    """Connect to whichever address of `host` answers first (RFC 8305). Raises `OSError`."""
    loop = asyncio.get_running_loop()
    # asyncio's own race forgets a socket if it is cancelled right after it connected; uvloop has none.
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    connected: list[TCPStream] = []
    failures: list[OSError] = []

    async def attempt(address: str, failed: anyio.Event) -> None:
        try:
            _, stream = await loop.create_connection(TCPStream, address, port)
        except OSError as exc:
            failures.append(exc)
            failed.set()
        else:
            connected.append(stream)
            attempts.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as attempts:
            for *_, address in _alternating(found):
                failed = anyio.Event()
                attempts.start_soon(attempt, socket.getnameinfo(address, _NUMERIC)[0], failed)
                with anyio.move_on_after(_ATTEMPT_DELAY):
                    await failed.wait()
        if not connected:
            raise failures[-1]
        return connected.pop(0)
    finally:
        failures.clear()  # an exception must not refer to a frame that refers to it
        for stream in connected:
            stream.abort()


def _alternating(found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Addresses of both families in turns, the first one's first (RFC 8305, section 4)."""
    first = [info for info in found if info[0] == found[0][0]]
    others = [info for info in found if info[0] != found[0][0]]
    return [info for pair in zip_longest(first, others) for info in pair if info]


class TCPStream(ByteStream, asyncio.BufferedProtocol):
    """A byte stream that is its own asyncio protocol; one task receives.

    It reads ahead until it holds `READ_SIZE` bytes, so that what arrives while the receiver is busy comes as
    one; less than twice as much is held.
    """

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._buffer = bytearray(_SMALLEST_READ_SIZE)
        self._arrived: bytes | bytearray = b""
        self._reading = True
        self._ended = False
        self._closed = False
        self._failure: Exception | None = None
        self._receiving = anyio.ResourceGuard("receiving from")
        self._arrival: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    async def receive(self, max_bytes: int = 64 * 1024) -> bytes:
        with self._receiving:
            if self._arrived or self._ended:
                await anyio.lowlevel.checkpoint()
            else:
                self._arrival = asyncio.get_running_loop().create_future()
                try:
                    await self._arrival
                finally:
                    self._arrival = None
        data = self._take(max_bytes)
        if not data:
            self._raise_if_unusable()
            raise anyio.EndOfStream
        if not self._reading and len(self._arrived) < READ_SIZE and not self._ended:
            self._reading = True
            self._transport.resume_reading()
        return data

    def _take(self, max_bytes: int) -> bytes:
        if len(self._arrived) <= max_bytes:
            data, self._arrived = bytes(self._arrived), b""
        else:
            rest = bytearray(self._arrived) if isinstance(self._arrived, bytes) else self._arrived
            data, self._arrived = bytes(rest[:max_bytes]), rest
            del rest[:max_bytes]
        return data

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._raise_if_unusable()
        self._transport.write(item)
        if not self._writable.is_set():
            await self._writable.wait()
            self._raise_if_unusable()

    async def send_eof(self) -> None:
        self._transport.write_eof()

    def abort(self) -> None:
        """Close at once."""
        self._closed = True
        self._transport.abort()

    async def aclose(self) -> None:
        self.abort()
        await anyio.lowlevel.checkpoint()

    def _raise_if_unusable(self) -> None:
        if self._closed:
            raise anyio.ClosedResourceError
        if self._failure is not None:
            raise anyio.BrokenResourceError from self._failure

    def _wake_receiver(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(0)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        read = memoryview(self._buffer)[:nbytes]
        if not self._arrived:
            self._arrived = bytes(read)
        else:
            if isinstance(self._arrived, bytes):
                self._arrived = bytearray(self._arrived)
            self._arrived += read
        if nbytes == len(self._buffer) < READ_SIZE:
            self._buffer = bytearray(4 * nbytes)
        if len(self._arrived) >= READ_SIZE:
            self._reading = False
            self._transport.pause_reading()
        self._wake_receiver()

    def eof_received(self) -> bool:
        self._ended = True
        self._wake_receiver()
        return True  # what is to be written still can be

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._failure = exc or ConnectionAbortedError()
        self._writable.set()
        self._wake_receiver()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()
