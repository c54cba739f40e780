"""The transport on Trio: trio-websocket, which is given a stream of ours and never sees the socket.

So a cancelled write or a forgotten close inside trio-websocket cannot hurt the connection, and who reads the
socket, when, and how much, is decided here.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, cast

import anyio
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream
from wsproto.utilities import LocalProtocolError  # trio-websocket lets it through

from ..errors import ConnectError
from . import (
    BINARY_MESSAGE,
    CLOSE,
    HANDSHAKE_CUT,
    HANDSHAKE_SIZE,
    INVALID_HANDSHAKE,
    OUTPUT_SIZE,
    PONG,
    Transport,
    TransportClosed,
    check_status_line,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import ByteStream, TaskGroup

    from .._target import Target

__all__ = ["TrioTransport", "open_transport", "thread_scheduler"]

_READ_SIZE: Final = 64 * 1024


class _Feed(trio.abc.Stream):
    """What trio-websocket takes for its socket.

    It is given bytes by `put`, once it is `hungry`; what it writes is kept in `output`. `on_pause` is called
    whenever it has digested everything and asks for more, and when it closes.
    """

    def __init__(self) -> None:
        self.hungry = False
        self.closed = False
        self.output = bytearray()
        self.on_pause: Callable[[], None] = lambda: None
        self.on_output: Callable[[], None] = lambda: None
        self.close_written = trio.Event()
        self._data = b""
        self._wake_up = trio.Event()

    def put(self, data: bytes) -> None:
        """Give it `data`; empty: there will be no more."""
        self._data = data
        self.hungry = False
        self._wake_up.set()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self.hungry = True
        self.on_pause()
        await self._wake_up.wait()
        self._wake_up = trio.Event()
        if self.closed:
            raise trio.ClosedResourceError
        return self._data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self.closed:
            raise trio.ClosedResourceError
        if len(self.output) < OUTPUT_SIZE or data[:1] != PONG:
            self.output += data
            self.on_output()
        if data[:1] == CLOSE:
            self.close_written.set()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.closed = True
        self.hungry = False
        self.close_written.set()
        self._wake_up.set()
        self.on_pause()
        await trio.lowlevel.checkpoint()


async def open_transport(
    stream: ByteStream, target: Target, message_size: int, task_group: TaskGroup
) -> Transport:
    """Do the WebSocket handshake over `stream`; the caller closes `stream` if that fails."""
    transport = TrioTransport(stream, message_size)
    task_group.start_soon(transport.run_library, target)
    try:
        await transport.handshake()
    except BaseException:
        transport.stop_library()
        raise
    return transport


class TrioTransport(Transport):
    """`receive` reads the socket, feeds the library, and collects what the library makes of it.

    The library's own queue has no room, so when it asks for more bytes it has delivered every message.
    """

    _connection: WebSocketConnection
    _helpers: trio.Nursery

    def __init__(self, stream: ByteStream, message_size: int) -> None:
        self.output_ready = lambda: None
        self._stream = stream
        self._message_size = message_size
        self._feed = _Feed()
        self._feed.on_output = lambda: self.output_ready()
        self._scope = trio.CancelScope(shield=True)
        self._ping_scope = trio.CancelScope()
        self._opened = False
        self._finished = False
        self._failure: Exception | None = None
        self._closing = False
        self._end: TransportClosed | None = None

    async def run_library(self, target: Target) -> None:
        """Run trio-websocket's reader, and beside it what waits for the peer (pings, the close)."""
        try:
            with self._scope:
                async with trio.open_nursery() as self._helpers:
                    async with trio.open_nursery() as reader:
                        self._connection = await wrap_client_stream(
                            reader,
                            cast("trio.SocketStream", self._feed),  # documented to take any trio.abc.Stream
                            target.authority,
                            target.resource,
                            extra_headers=[(name.encode(), value.encode()) for name, value in target.headers],
                            message_queue_size=0,
                            max_message_size=self._message_size,
                            receive_buffer_size=None,
                        )
                        self._opened = True
                        self._feed.on_pause()
                    self._helpers.cancel_scope.cancel()
        except Exception as exc:  # whatever a hostile peer can make the library raise
            self._failure = exc
        finally:
            self._finished = True
            self._feed.on_pause()

    async def handshake(self) -> None:
        """Exchange the handshake with the agent, beside `run_library`. Raises `ConnectError`."""
        await self._digest()
        head = b""
        try:
            await self._flush()
            while not self._opened:
                if self._ended or len(head) > HANDSHAKE_SIZE:
                    raise ConnectError(INVALID_HANDSHAKE) from self._failure
                data = await self._stream.receive(_READ_SIZE)
                head += data
                check_status_line(head)
                self._feed.put(data)
                await self._digest()
        except (OSError, anyio.EndOfStream, anyio.BrokenResourceError) as exc:
            raise ConnectError(HANDSHAKE_CUT) from exc

    @property
    def _ended(self) -> bool:
        return self._feed.closed or self._finished

    async def _digest(self) -> list[bytes]:
        """Let the library work until it asks for more bytes or ends; return the messages that it delivers."""
        messages: list[bytes] = []
        with trio.CancelScope() as scope:
            self._feed.on_pause = scope.cancel
            if self._feed.hungry or self._ended:
                return messages
            if self._opened:
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        message = await self._connection.get_message()
                        if isinstance(message, bytes):
                            self._end = TransportClosed(1002, BINARY_MESSAGE, violation=True)
                        elif self._end is None:
                            messages.append(message.encode())
            await trio.sleep_forever()
        return messages

    async def receive(self) -> list[bytes]:
        if self._end is not None:
            raise self._end
        at_eof = False
        if self._feed.hungry:
            try:
                data = await self._stream.receive(_READ_SIZE)
            except anyio.EndOfStream:
                data = b""
                at_eof = True
            except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
                raise TransportClosed(1006, "the connection was lost") from exc
            self._feed.put(data)
        messages = await self._digest()
        if self._end is None:
            self._end = self._find_end(at_eof)
        if self._end is not None and not messages:
            raise self._end
        return messages

    def _find_end(self, at_eof: bool) -> TransportClosed | None:
        closed = self._connection.closed
        if self._closing:
            # From then on `closed` is the library's own until the peer has answered.
            if not self._ended:
                return None
            return TransportClosed(1006 if closed is None else closed.code)
        if at_eof:
            return TransportClosed(1006, "the connection was closed without a close frame")
        if closed is not None:
            reason = closed.reason or ""
            # trio-websocket does not tell whose close this was, but for its wording.
            if closed.code == 1009 and reason.endswith(f"message size: {self._message_size} bytes"):
                return TransportClosed(1009, "a message is larger than Limits.message_size", violation=True)
            return TransportClosed(closed.code, reason)
        if self._ended:
            return TransportClosed(1002, "the WebSocket protocol was broken", violation=True)
        return None

    async def send(self, messages: list[bytes]) -> None:
        with contextlib.suppress(ConnectionClosed, LocalProtocolError):  # then `receive` tells
            for message in messages:
                await self._connection.send_message(message.decode())
        try:
            await self._flush()
        except (OSError, anyio.ClosedResourceError) as exc:
            raise anyio.BrokenResourceError from exc

    async def _flush(self) -> None:
        if self._feed.output:
            data, self._feed.output = self._feed.output, bytearray()
            await self._stream.send(bytes(data))

    def ping(self) -> None:
        if not self._ended:
            self._ping_scope.cancel()
            self._ping_scope = trio.CancelScope()
            self._helpers.start_soon(self._ping, self._ping_scope)

    async def _ping(self, scope: trio.CancelScope) -> None:
        with scope, contextlib.suppress(ConnectionClosed, LocalProtocolError):
            await self._connection.ping()

    async def close(self, code: int) -> None:
        if not self._ended and self._connection.closed is None:
            self._closing = True
            self._helpers.start_soon(self._connection.aclose, code)
            await self._feed.close_written.wait()

    def stop_library(self) -> None:
        self._scope.cancel()

    async def aclose(self) -> None:
        self.stop_library()
        await anyio.aclose_forcefully(self._stream)


def thread_scheduler() -> Callable[[Callable[[], object]], None]:
    token = trio.lowlevel.current_trio_token()

    def run_soon(function: Callable[[], object]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(function)

    return run_soon
