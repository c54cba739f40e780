"""The transport on Trio: trio-websocket, which is given a stream of ours and never sees the socket.

So a cancelled write or a forgotten close inside trio-websocket cannot hurt the connection, and who reads the
socket, when, and how much, is decided here. Pings and close frames are written here, too: trio-websocket
waits for the peer's answer to them, and writes no close frame when the peer breaks the protocol.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from typing import TYPE_CHECKING, Final, cast

import anyio
import trio
from anyio import connect_tcp
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream
from wsproto.frame_protocol import FrameProtocol

from .._stats import AgentStats
from ..errors import ConnectError
from . import (
    BAD_UTF8,
    BINARY_MESSAGE,
    CLOSE,
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

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import ByteStream, TaskGroup

    from .._target import Target
    from . import Waker

__all__ = ["TrioTransport", "connect_tcp", "open_transport", "thread_scheduler", "waker_factory"]

_ours: Final = contextvars.ContextVar("anyagent's", default=False)
# trio-websocket logs the payload of a ping and the reason of a close at DEBUG; not for our connections.
logging.getLogger("trio-websocket").addFilter(lambda record: not _ours.get())


class _Feed(trio.abc.Stream):
    """What trio-websocket takes for its socket.

    What it writes is kept in `output`. `on_pause` is called whenever it has digested everything and asks for
    more; then it is given more by `put`.
    """

    def __init__(self) -> None:
        self.answered_close = False
        self.output = bytearray()
        self.on_pause: Callable[[], None] = lambda: None
        self.on_output: Callable[[], None] = lambda: None
        self._closing = False
        self._data = b""
        self._wake_up = trio.Event()

    def put(self, data: bytes) -> None:
        """Give it `data`; empty: there will be no more."""
        self._data = data
        self._wake_up.set()

    def write(self, frame: bytes | bytearray | memoryview) -> None:
        """Keep `frame` for the socket, unless it is one pong too many, or no pong and after a close frame."""
        unwanted = len(self.output) >= OUTPUT_SIZE if frame[:1] == PONG else self._closing
        if not unwanted:
            self._closing = self._closing or frame[:1] == CLOSE
            self.output += frame
            self.on_output()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self.on_pause()
        await self._wake_up.wait()
        self._wake_up = trio.Event()
        return self._data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.answered_close = self.answered_close or data[:1] == CLOSE
        self.write(data)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class _Authority(str):
    """The value of the ``Host`` header. wsproto takes it for a host name, which a port can make too long."""

    __slots__ = ()

    def encode(self, encoding: str = "ascii", errors: str = "strict") -> bytes:
        return super().encode("ascii", errors)


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

    def __init__(self, stream: ByteStream, message_size: int) -> None:
        self.output_ready = lambda: None
        self.stats = AgentStats()
        self.heard = trio.current_time()
        self._stream = stream
        self._message_size = message_size
        self._splitter = FrameSplitter(message_size)
        self._frames = FrameProtocol(client=True, extensions=[])
        self._feed = _Feed()
        self._feed.on_output = lambda: self.output_ready()
        self._scope = trio.CancelScope(shield=True)
        self._opened = False
        self._finished = False
        self._arrived_with_handshake = b""
        self._unfed = memoryview(b"")  # what the library has yet to be given
        self._end: TransportClosed | None = None

    async def run_library(self, target: Target) -> None:
        """Run trio-websocket's reader."""
        _ours.set(True)
        try:
            with self._scope:
                async with trio.open_nursery() as reader:
                    self._connection = await wrap_client_stream(
                        reader,
                        cast("trio.SocketStream", self._feed),  # documented to take any trio.abc.Stream
                        _Authority(target.authority),
                        target.resource,
                        extra_headers=[(name.encode(), value.encode()) for name, value in target.headers],
                        message_queue_size=0,
                        max_message_size=self._message_size,
                        receive_buffer_size=None,
                    )
                    self._opened = True
        except Exception:
            pass  # whatever a hostile peer can make the library raise
        finally:
            self._finished = True
            self._feed.on_pause()

    async def handshake(self) -> None:
        """Exchange the handshake with the agent, beside `run_library`. Raises `ConnectError`."""
        await self._digest()
        head = bytearray()
        try:
            await self._flush()
            while not self._opened:
                # Nothing of the library's own error: it may quote the request, if the peer has echoed it.
                if self._finished:  # after 16 KiB at the latest, h11's limit
                    raise ConnectError(INVALID_HANDSHAKE)
                answer, self._arrived_with_handshake = split_answer(
                    head, await self._stream.receive(READ_SIZE)
                )
                self._feed.put(answer)
                await self._digest()
                await trio.lowlevel.checkpoint()  # the library wakes `run_library` and us, in any order
            self.stats = AgentStats()  # without the handshake
        except LOST_CONNECTION as exc:
            raise ConnectError(HANDSHAKE_CUT) from exc

    async def _digest(self) -> list[bytes]:
        """Let the library work until it asks for more bytes or ends; return the messages that it delivers.

        Called when it has just been started or been given something, and has not run since.
        """
        messages: list[bytes] = []
        with trio.CancelScope() as scope:
            self._feed.on_pause = scope.cancel
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
        messages: list[bytes] = []
        at_eof = False
        if self._unfed:
            await trio.lowlevel.checkpoint()
        else:
            try:
                messages, at_eof = await self._read()
            except LOST_CONNECTION as exc:
                raise TransportClosed(1006, LOST) from exc
        self.heard = trio.current_time()
        if self._unfed or at_eof:
            portion = FEED_SIZE if self._splitter.dense else len(self._unfed)
            self._feed.put(bytes(self._unfed[:portion]))
            self._unfed = self._unfed[portion:]
            messages += await self._digest()
        if self._end is None:
            self._end = self._find_end(at_eof)
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

    def _find_end(self, at_eof: bool) -> TransportClosed | None:
        closed = self._connection.closed
        if at_eof:
            return TransportClosed(1006, CUT_OFF)
        if closed is not None and self._feed.answered_close:
            return TransportClosed(int(closed.code), closed.reason or "")
        if closed is not None and closed.code == 1007:
            return TransportClosed(1007, BAD_UTF8, violation=True)
        if closed is not None or self._finished:
            detail = "" if closed is None else f": {closed.reason}"
            return TransportClosed(1002, f"{VIOLATION}{detail}", violation=True)
        if self._splitter.exceeded and not self._unfed:
            return TransportClosed(1009, TOO_LARGE, violation=True)
        return None

    async def send(self, messages: list[bytes]) -> None:
        with contextlib.suppress(ConnectionClosed):  # then `receive` tells
            for message in messages:
                await self._connection.send_message(message.decode())
        try:
            await self._flush()
        except LOST_CONNECTION as exc:
            raise anyio.BrokenResourceError from exc

    async def _flush(self) -> None:
        if self._feed.output:
            data, self._feed.output = self._feed.output, bytearray()
            self.stats.bytes_sent += len(data)
            await self._stream.send(bytes(data))

    def ping(self) -> None:
        self._feed.write(self._frames.ping())

    def close(self, code: int) -> None:
        if code != 1006:  # which is no code that can be sent: nothing can be
            self._feed.write(self._frames.close(code))

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


class _Waker:
    """Parks the task itself: `trio.Event` has a set of them."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    async def wait(self) -> None:
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    def wake(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


def waker_factory() -> Callable[[], Waker]:
    return _Waker
