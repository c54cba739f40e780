"""The transport on asyncio: websockets' sans-I/O protocol over an AnyIO byte stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel
from websockets.client import ClientProtocol
from websockets.exceptions import PayloadTooBig
from websockets.frames import Frame, Opcode
from websockets.protocol import CONNECTING, OPEN
from websockets.uri import WebSocketURI

from .._stats import AgentStats
from ..errors import ConnectError
from . import (
    BAD_UTF8,
    BINARY_MESSAGE,
    CUT_OFF,
    DENSE_READ_SIZE,
    FEED_SIZE,
    HANDSHAKE_CUT,
    INVALID_HANDSHAKE,
    LOST,
    LOST_CONNECTION,
    OUTPUT_SIZE,
    PONG,
    READ_SIZE,
    TOO_LARGE,
    VIOLATION,
    Transport,
    TransportClosed,
    split_answer,
)
from .frames import FrameSplitter
from .tcp import connect_tcp

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import ByteStream, TaskGroup

    from .._target import Target
    from . import Waker

__all__ = ["AsyncioTransport", "connect_tcp", "open_transport", "thread_scheduler", "waker_factory"]

_HANDSHAKE_SIZE: Final = 64 * 1024  # of the agent's answer; websockets itself would read a megabyte
_DATA: Final = (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)

# websockets logs headers and messages at DEBUG; this logger stands outside the hierarchy and is off.
_silent: Final = logging.Logger("anyagent.websockets")
_silent.disabled = True


async def open_transport(
    stream: ByteStream, target: Target, message_size: int, task_group: TaskGroup
) -> Transport:
    """Do the WebSocket handshake over `stream`; the caller closes `stream` if that fails."""
    path, _, query = target.resource.partition("?")
    uri = WebSocketURI(target.ssl_context is not None, target.host, target.port, path, query, None, None)
    # The splitter sees to the size of messages; this bounds what is kept of a frame that breaks the protocol,
    # and lets control frames through in any case.
    protocol = ClientProtocol(uri, max_size=max(message_size, 125), logger=_silent)
    request = protocol.connect()
    for name, value in target.headers:
        request.headers[name] = value
    protocol.send_request(request)
    transport = AsyncioTransport(stream, protocol, FrameSplitter(message_size))
    await transport.handshake()
    return transport


class AsyncioTransport(Transport):
    """`receive` reads the socket; the protocol is fed what no text can be taken out of.

    What the protocol answers waits in `_output`.
    """

    def __init__(self, stream: ByteStream, protocol: ClientProtocol, splitter: FrameSplitter) -> None:
        self.output_ready = lambda: None
        self.stats = AgentStats()
        self.heard = anyio.current_time()
        self._stream = stream
        self._protocol = protocol
        self._splitter = splitter
        self._output = bytearray()
        self._message = bytearray()
        self._binary = False
        self._end: TransportClosed | None = None
        self._arrived_with_handshake = b""
        self._unfed = memoryview(b"")  # what the protocol has yet to be given

    async def handshake(self) -> None:
        """Send the request; wait for the answer. Raises `ConnectError`."""
        protocol = self._protocol
        head = bytearray()
        try:
            await self._stream.send(b"".join(protocol.data_to_send()))
            while protocol.state is CONNECTING:
                # Nothing of the library's own error: it may quote the request, if the peer has echoed it.
                if protocol.handshake_exc is not None or len(head) > _HANDSHAKE_SIZE:
                    raise ConnectError(INVALID_HANDSHAKE)
                answer, self._arrived_with_handshake = split_answer(
                    head, await self._stream.receive(READ_SIZE)
                )
                protocol.receive_data(answer)
        except LOST_CONNECTION as exc:
            raise ConnectError(HANDSHAKE_CUT) from exc
        protocol.events_received()  # which include the answer itself

    async def receive(self) -> list[bytes]:
        if self._end is not None:
            raise self._end
        messages: list[bytes] = []
        at_eof = False
        if self._unfed:
            await anyio.lowlevel.checkpoint()
        else:
            try:
                messages, at_eof = await self._read()
            except LOST_CONNECTION as exc:
                raise TransportClosed(1006, LOST) from exc
        self.heard = anyio.current_time()
        if at_eof:
            self._protocol.receive_eof()
        if self._unfed or at_eof or self._splitter.exceeded:
            if self._unfed:
                portion = FEED_SIZE if self._splitter.dense else len(self._unfed)
                self._protocol.receive_data(bytes(self._unfed[:portion]))
                self._unfed = self._unfed[portion:]
            messages += self._collect()
            if self._take_output():
                self.output_ready()
        if self._end is not None and not messages:
            raise self._end
        return messages

    async def _read(self) -> tuple[list[bytes], bool]:
        """Read; return the texts that could be taken out, and whether this was the end."""
        data, self._arrived_with_handshake = self._arrived_with_handshake, b""
        size = DENSE_READ_SIZE if self._splitter.dense else READ_SIZE
        try:
            data = data or await self._stream.receive(size)
        except anyio.EndOfStream:
            return [], True
        self.stats.bytes_received += len(data)
        messages, rest = self._splitter.split(data)
        self._unfed = memoryview(rest)
        return messages, False

    def _collect(self) -> list[bytes]:
        """The whole messages among what the protocol has parsed; sets `_end` if they were the last."""
        messages: list[bytes] = []
        for event in self._protocol.events_received():
            if not isinstance(event, Frame) or event.opcode not in _DATA:
                continue
            if event.opcode is not Opcode.CONT:
                self._binary = event.opcode is Opcode.BINARY
            self._message += event.data
            if not event.fin:
                continue
            message, self._message = bytes(self._message), bytearray()
            if self._binary:
                self._end = TransportClosed(1002, BINARY_MESSAGE, violation=True)
                return messages
            try:
                str(message, "utf-8")
            except UnicodeDecodeError:
                self._end = TransportClosed(1007, BAD_UTF8, violation=True)
                return messages
            messages.append(message)
        failure, close = self._protocol.parser_exc, self._protocol.close_rcvd
        if isinstance(failure, EOFError):
            self._end = TransportClosed(1006, CUT_OFF)
        elif isinstance(failure, PayloadTooBig) or (self._splitter.exceeded and not self._unfed):
            self._end = TransportClosed(1009, TOO_LARGE, violation=True)
        elif isinstance(failure, UnicodeDecodeError):
            self._end = TransportClosed(1007, BAD_UTF8, violation=True)
        elif failure is not None:
            self._end = TransportClosed(1002, f"{VIOLATION}: {failure}", violation=True)
        elif close is not None:
            self._end = TransportClosed(int(close.code), close.reason)
        return messages

    def _take_output(self) -> bool:
        for chunk in self._protocol.data_to_send():
            if len(self._output) < OUTPUT_SIZE or chunk[:1] != PONG:
                self._output += chunk
        return bool(self._output)

    async def send(self, messages: list[bytes]) -> None:
        if self._protocol.state is OPEN:
            for message in messages:
                self._protocol.send_text(message)
        if self._take_output():
            data, self._output = self._output, bytearray()
            self.stats.bytes_sent += len(data)
            try:
                await self._stream.send(bytes(data))
            except LOST_CONNECTION as exc:
                raise anyio.BrokenResourceError from exc

    def ping(self) -> None:
        if self._protocol.state is OPEN:
            self._protocol.send_ping(b"")
            self.output_ready()

    def close(self, code: int) -> None:
        if self._protocol.state is OPEN and code != 1006:  # which is no code that can be sent
            self._protocol.send_close(code)
            self.output_ready()

    async def aclose(self) -> None:
        await anyio.aclose_forcefully(self._stream)


def thread_scheduler() -> Callable[[Callable[[], object]], None]:
    loop = asyncio.get_running_loop()

    def run_soon(function: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(function)

    return run_soon


class _Waker:
    """Parks a task on a future: `asyncio.Event` has a queue, too, for any number of waiters."""

    __slots__ = ("_future",)

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None

    def wait(self) -> asyncio.Future[None]:
        self._future = asyncio.get_running_loop().create_future()
        return self._future

    def wake(self) -> None:
        future, self._future = self._future, None
        if future is not None and not future.done():  # done: the task that waited was cancelled
            future.set_result(None)


def waker_factory() -> Callable[[], Waker]:
    return _Waker
