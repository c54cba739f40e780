"""Transports: WebSocket connections that yield batches of whole text messages.

Neither backend's module is imported before that backend runs.
"""

from __future__ import annotations

import abc
import re
import sys
from typing import TYPE_CHECKING, Final, Protocol

import anyio

from ..errors import ConnectError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import ByteStream, TaskGroup

    from .._stats import AgentStats
    from .._target import Target

__all__ = ["Transport", "TransportClosed", "Waker", "connect", "thread_scheduler", "waker_factory"]

OUTPUT_SIZE = 64 * 1024
"""How many bytes may wait to be written before pongs are left out (RFC 6455, section 5.5.3, allows that)."""


PONG = b"\x8a"
CLOSE = b"\x88"
"""The first bytes of a pong and of a close frame (RFC 6455, section 5.2)."""

INVALID_HANDSHAKE = "the agent's answer to the WebSocket handshake is invalid"
HANDSHAKE_CUT = "the agent closed the connection during the WebSocket handshake"
BINARY_MESSAGE = "the agent sent a binary message"
BAD_UTF8 = "the agent sent text that is not valid UTF-8"
TOO_LARGE = "a message is larger than Limits.message_size, or in too many fragments"
VIOLATION = "the WebSocket protocol was broken"
CUT_OFF = "the connection was closed without a close frame"
LOST = "the connection was lost"


LOST_CONNECTION: Final = (
    OSError,
    anyio.BrokenResourceError,
    anyio.BusyResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
)
"""What a stream raises when it is of no more use.

With TLS, writing raises `anyio.EndOfStream`, too; and where the peer makes writing read (a renegotiation) or,
on Trio, reading write (a key update), while the other direction is busy, `anyio.BusyResourceError`.
"""

FEED_SIZE: Final = 1024
"""How many bytes to give to the library at once where they may hold many frames (see `FRAMES_AT_ONCE`)."""

READ_SIZE: Final = 1024 * 1024
"""How many bytes to read at once: the more, the fewer hand-overs when many requests are answered together."""

DENSE_READ_SIZE: Final = 16 * 1024
"""Likewise, behind a read that held many frames for the library."""

_STATUS_LINE: Final = re.compile(rb"HTTP/\d\.\d (\d{3})[ \r\n]")
_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")


class TransportClosed(Exception):
    """A transport has nothing more to receive.

    `code` and `reason` are those of the peer's close frame (1006: it sent none). With `violation`, the peer
    broke the protocol: then `code` is what the connection has to be closed with, if it has not been.
    """

    def __init__(self, code: int, reason: str = "", *, violation: bool = False) -> None:
        self.code = code
        self.reason = reason
        self.violation = violation
        super().__init__(code, reason, violation)

    def __str__(self) -> str:
        return f"code {self.code}" + (f", {self.reason}" if self.reason else "")


class Transport(abc.ABC):
    """One open WebSocket connection. One task calls `receive` and one calls `send`, at most one each."""

    output_ready: Callable[[], None]
    """Called, from any of the other methods, when there is something to write that `send` was not given."""

    stats: AgentStats
    """Where to count the bytes that are received and sent."""

    heard: float
    """When bytes arrived most recently, or some of those were worked on, by `anyio.current_time`."""

    @abc.abstractmethod
    async def receive(self) -> list[bytes]:
        """Read from the socket at most once; return the text messages (UTF-8) that are complete, often none.

        Raises `TransportClosed` after the last message. Cancelled: the connection is of no further use.
        """

    @abc.abstractmethod
    async def send(self, messages: list[bytes]) -> None:
        """Write `messages` (UTF-8), and whatever the protocol itself has to say, in one go.

        Raises `anyio.BrokenResourceError` when the connection is gone. Cancelled: a frame may be cut in two
        and the connection is of no further use.
        """

    @abc.abstractmethod
    def ping(self) -> None:
        """Queue a ping."""

    @abc.abstractmethod
    def close(self, code: int) -> None:
        """Queue a close frame, unless there was one; does not wait for it to be written, nor for the peer.

        From then on `receive` is called for its end alone.
        """

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Close the socket at once, without a handshake. Idempotent; does not wait for the peer."""


class Waker(Protocol):
    """Wakes one task, any number of times: cheaper than one event after the other."""

    def wait(self) -> Awaitable[None]:
        """Wait, at a checkpoint, for the next `wake`. For one task at a time."""

    def wake(self) -> None:
        """Wake the task that waits, if there is one."""


class _Backend(Protocol):
    """What this package needs of an event loop; each of its modules named after a backend is one."""

    async def connect_tcp(self, host: str, port: int, /) -> ByteStream: ...

    async def open_transport(
        self, stream: ByteStream, target: Target, message_size: int, task_group: TaskGroup
    ) -> Transport: ...

    def thread_scheduler(self) -> Callable[[Callable[[], object]], None]: ...

    def waker_factory(self) -> Callable[[], Waker]: ...


async def connect(target: Target, message_size: int, task_group: TaskGroup) -> Transport:
    """Connect and do the WebSocket handshake. Raises `ConnectError`; cancelled, it leaves nothing open.

    What the backend needs to run beside the connection is started in `task_group` and ends with `aclose`.
    """
    backend = _backend()
    stream = await _connect(target, backend)
    try:
        return await backend.open_transport(stream, target, message_size, task_group)
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise


def thread_scheduler() -> Callable[[Callable[[], object]], None]:
    """A function that runs a callable soon in the present event loop; for any thread, and for finalizers.

    It does nothing once that loop has ended.
    """
    return _backend().thread_scheduler()


def waker_factory() -> Callable[[], Waker]:
    """What makes wakers for the present event loop."""
    return _backend().waker_factory()


def split_answer(head: bytearray, data: bytes) -> tuple[bytes, bytes]:
    """Add `data` to the `head` of the agent's answer; return what of it belongs there, and what comes behind.

    Raises `ConnectError` as soon as the answer shows that the agent does not switch protocols: so nothing of
    a rejection's body is read, however long it is, and no redirect is followed.
    """
    unsearched = len(head) - 2
    head += data
    status = _STATUS_LINE.match(head)
    if status is not None and status[1] != b"101":
        raise ConnectError("the agent rejected the WebSocket handshake", status_code=int(status[1]))
    end = _END_OF_HEAD.search(head, unsearched)
    behind = len(head) - end.end() if end is not None else 0
    return data[: len(data) - behind], data[len(data) - behind :]


def _backend() -> _Backend:
    # Not asyncio's running loop: with Trio as a guest of asyncio, both are there.
    in_trio = sys.modules.get("trio")
    if in_trio is not None and in_trio.lowlevel.in_trio_task():
        from . import trio

        return trio
    from . import asyncio

    return asyncio


async def _connect(target: Target, backend: _Backend) -> ByteStream:
    try:
        stream = await backend.connect_tcp(target.host, target.port)
        if target.ssl_context is None:
            return stream
        from anyio.streams.tls import TLSStream  # here, because it takes 2 ms to import

        try:
            return await TLSStream.wrap(
                stream,
                hostname=target.host,
                ssl_context=target.ssl_context,
                standard_compatible=False,  # WebSocket has a close handshake of its own
            )
        except BaseException:
            await anyio.aclose_forcefully(stream)
            raise
    except LOST_CONNECTION as exc:
        raise ConnectError(f"could not connect to {target.authority}: {_root_cause(exc)}") from exc


def _root_cause(exc: BaseException) -> str:
    while exc.__cause__ is not None and not isinstance(exc.__cause__, BaseExceptionGroup):
        exc = exc.__cause__
    if isinstance(exc, ConnectionRefusedError):
        return "connection refused"  # the backends' texts differ, and quote the address once more
    return str(exc) or LOST
