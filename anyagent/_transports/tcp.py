"""TCP on asyncio. AnyIO's own stream reads 256 KiB at most, and stops and starts reading each time."""

from __future__ import annotations

import asyncio
from typing import Any, Final, cast

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream

from . import READ_SIZE

__all__ = ["TCPStream", "connect_tcp"]

_ATTEMPT_DELAY: Final = 0.25  # RFC 8305, section 8
_SMALLEST_READ_SIZE: Final = 64 * 1024


async def connect_tcp(host: str, port: int) -> TCPStream:
    """Connect to whichever address of `host` answers first (RFC 8305). Raises `OSError`."""
    loop = asyncio.get_running_loop()
    options: dict[str, Any] = {}
    if isinstance(loop, asyncio.BaseEventLoop):  # uvloop has no such option: one address after the other
        options["happy_eyeballs_delay"] = _ATTEMPT_DELAY
    _, stream = await loop.create_connection(TCPStream, host, port, **options)
    return stream


class TCPStream(ByteStream, asyncio.BufferedProtocol):
    """A byte stream that is its own asyncio protocol; one task receives and one sends.

    Up to `READ_SIZE` bytes are read ahead, so that what arrives while the receiver is busy comes as one.
    """

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._buffer = bytearray(_SMALLEST_READ_SIZE)
        self._arrived: list[bytes] = []
        self._size = 0
        self._reading = True
        self._ended = False
        self._closed = False
        self._failure: Exception | None = None
        self._arrival: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    async def receive(self, max_bytes: int = READ_SIZE) -> bytes:
        if self._arrived or self._ended:
            await anyio.lowlevel.checkpoint()
        else:
            self._arrival = asyncio.get_running_loop().create_future()
            try:
                await self._arrival
            finally:
                self._arrival = None
        data = self._arrived[0] if len(self._arrived) == 1 else b"".join(self._arrived)
        self._arrived = [data[max_bytes:]] if len(data) > max_bytes else []
        data = data[:max_bytes]
        self._size -= len(data)
        if not data:
            self._raise_if_unusable()
            raise anyio.EndOfStream
        if not self._reading and not self._ended:
            self._reading = True
            self._transport.resume_reading()
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

    async def aclose(self) -> None:
        self._closed = True
        self._transport.abort()
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
        self._arrived.append(bytes(memoryview(self._buffer)[:nbytes]))
        self._size += nbytes
        if nbytes == len(self._buffer) < READ_SIZE:
            self._buffer = bytearray(4 * nbytes)
        if self._size >= READ_SIZE:
            self._reading = False
            self._transport.pause_reading()
        self._wake_receiver()

    def eof_received(self) -> bool:
        self._ended = True
        self._wake_receiver()
        return True  # what is to be written still can be

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._failure = exc
        self._writable.set()
        self._wake_receiver()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()
