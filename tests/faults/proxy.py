"""A TCP proxy that does harm, byte by byte as it is told; on an event loop in a thread of its own.

`After` a number of bytes of one direction, a connection is cut, reset, half-closed or stalled; before that, a
`Fault` may change how the bytes come, or the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Coalesce",
    "Connection",
    "Cut",
    "Delay",
    "Direction",
    "Fault",
    "Faults",
    "Flip",
    "HalfClose",
    "Proxy",
    "Reset",
    "Split",
    "Stall",
    "Throttle",
    "proxy_to",
]

DEADLINE: Final = 20.0
"""Seconds. Nothing waits for so long unless the test fails."""

_READ_SIZE: Final = 1 << 20
_LOOK_AGAIN: Final = 0.01  # seconds
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class After:
    """What happens as soon as `after` bytes have been forwarded in a direction, if it comes to that."""

    after: int


class Cut(After):
    """Both ends see the end of the stream (FIN); what they still send is read and thrown away."""


class Reset(After):
    """Both ends see a reset (RST)."""


class HalfClose(After):
    """The receiver sees the end of the stream (FIN); the other direction goes on.

    What still comes is thrown away.
    """


class Stall(After):
    """Nothing more is read nor forwarded in this direction, and nobody is told."""


@dataclass(frozen=True)
class Flip:
    """Bit `bit` (0 to 7) of the byte at the offset `at` is another one."""

    at: int
    bit: int


@dataclass(frozen=True)
class Delay:
    """Everything comes `seconds` later, and what is read meanwhile behind it."""

    seconds: float


@dataclass(frozen=True)
class Throttle:
    """No more than so many bytes come in a second, in a hundred pieces at most."""

    bytes_per_second: int


@dataclass(frozen=True)
class Split:
    """Every write is of `size` bytes at most, and the event loop has a turn in between."""

    size: int = 1


@dataclass(frozen=True)
class Coalesce:
    """What comes in several reads is forwarded in one write, once nothing has come for `quiet` seconds."""

    quiet: float


Fault: TypeAlias = Cut | Reset | HalfClose | Stall | Flip | Delay | Throttle | Split | Coalesce


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Those of one connection; of several `After` in one direction, the one that comes first."""

    to_agent: tuple[Fault, ...] = ()
    to_client: tuple[Fault, ...] = ()


class Direction:
    """One direction of a connection: `writes` are what has been forwarded, write by write."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self.writes: list[bytes] = []
        self._last = min((fault for fault in faults if isinstance(fault, After)), key=_after, default=None)
        self._others = [fault for fault in faults if not isinstance(fault, After)]
        self._count = 0

    @property
    def forwarded(self) -> bytes:
        return b"".join(self.writes)

    async def pump(self, source: socket.socket, sink: socket.socket) -> None:
        """Forward what there is to forward. Raises `ConnectionError` for a reset, made here or passed on."""
        loop = asyncio.get_running_loop()
        while self._left() != 0:
            data = await self._read(source)
            if not data:
                _shut(sink)
                return
            await self._write(sink, data[: self._left()])
        match self._last:
            case Reset():
                raise ConnectionResetError
            case Stall():
                await _gone(source)
                raise ConnectionResetError
            case Cut():
                _shut(source)
        _shut(sink)
        with contextlib.suppress(ConnectionError):
            while await loop.sock_recv(source, _READ_SIZE):
                pass

    def _left(self) -> int | None:
        """How many bytes are still to be forwarded; ``None``: all."""
        return None if self._last is None else max(self._last.after - self._count, 0)

    async def _read(self, source: socket.socket) -> bytes:
        loop = asyncio.get_running_loop()
        data = await loop.sock_recv(source, _READ_SIZE)
        for fault in self._others:
            if isinstance(fault, Coalesce):
                with contextlib.suppress(BlockingIOError):
                    more = data
                    while more:
                        await asyncio.sleep(fault.quiet)
                        more = source.recv(_READ_SIZE)
                        data += more
        return data

    async def _write(self, sink: socket.socket, data: bytes) -> None:
        pieces, pause = [data], 0.0
        for fault in self._others:
            match fault:
                case Flip(at=at, bit=bit) if self._count <= at < self._count + len(data):
                    flipped = bytearray(data)
                    flipped[at - self._count] ^= 1 << bit
                    pieces = _pieces(bytes(flipped), len(pieces[0]))
                case Split(size=size):
                    pieces = _pieces(b"".join(pieces), size)
                case Throttle(bytes_per_second=rate):
                    pieces = _pieces(b"".join(pieces), max(rate // 100, 1))
                    pause = len(pieces[0]) / rate
                case Delay(seconds=seconds):
                    await asyncio.sleep(seconds)
        for piece in pieces:
            await asyncio.sleep(pause)
            await asyncio.get_running_loop().sock_sendall(sink, piece)
            self.writes.append(piece)
            self._count += len(piece)


def _after(fault: After) -> int:
    return fault.after


def _pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other end has gone already
        sock.shutdown(socket.SHUT_WR)


async def _gone(sock: socket.socket) -> None:
    """Wait until the other end has closed, without reading what it has sent before that."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    while not poll.poll(0):  # noqa: ASYNC110 - an event loop does not watch for this without reading
        await asyncio.sleep(_LOOK_AGAIN)


class Connection:
    """One connection through the proxy."""

    def __init__(self, faults: Faults) -> None:
        self.to_agent = Direction(faults.to_agent)
        self.to_client = Direction(faults.to_client)

    async def serve(self, client: socket.socket, upstream: tuple[str, int]) -> None:
        with client, socket.socket() as agent:
            for sock in (client, agent):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await asyncio.get_running_loop().sock_connect(agent, upstream)
                async with asyncio.TaskGroup() as pumps:
                    pumps.create_task(self.to_agent.pump(client, agent))
                    pumps.create_task(self.to_client.pump(agent, client))
            except* ConnectionError:
                for sock in (client, agent):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


class Proxy:
    """Made by `proxy_to`; for any thread.

    * `url`: where a client connects to.
    * `faults`: of the connections to come, the next one's first; one for which there are none has none.
    * `connections`: all that there have been.
    """

    def __init__(self, upstream: tuple[str, int], faults: tuple[Faults, ...]) -> None:
        self.faults = deque(faults)
        self.connections: list[Connection] = []
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}/"
        self._loop = asyncio.SelectorEventLoop()
        self._stopping = asyncio.Event()
        self._serving: set[asyncio.Task[None]] = set()
        self._changed = threading.Condition()
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait_idle(self) -> None:
        """Wait until every connection has ended, which both of its ends have to see to.

        Blocks the thread. Raises `TimeoutError`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._serving, DEADLINE):
                raise TimeoutError(f"{len(self._serving)} connections were not closed")

    def stop(self) -> None:
        """End everything, and raise what has gone wrong here."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        for error in self._errors:
            raise error

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner, self._listener:
            runner.run(self._serve())

    async def _serve(self) -> None:
        accepting = asyncio.create_task(self._accept())
        await self._stopping.wait()
        tasks = {accepting, *self._serving}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            connection = Connection(self.faults.popleft() if self.faults else Faults())
            task = asyncio.create_task(connection.serve(client, self._upstream))
            with self._changed:
                self.connections.append(connection)
                self._serving.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        with self._changed:
            self._serving.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._errors.append(error)
            self._changed.notify_all()


@contextlib.contextmanager
def proxy_to(port: int, *faults: Faults) -> Iterator[Proxy]:
    """A proxy to `port` on the loopback interface; the first connection has the first `faults`, and so on."""
    proxy = Proxy(("127.0.0.1", port), faults)
    try:
        yield proxy
    finally:
        proxy.stop()
