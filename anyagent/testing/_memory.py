"""An agent in memory: the client's real session over a transport that a test plays by hand."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from .. import im, om
from .._open import run_agent
from .._stats import AgentStats
from .._transports import Transport, TransportClosed
from ..config import Heartbeat, Limits, Timeouts
from ..dialects import Dialect, by_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from anyio.abc import TaskGroup

    from .._agent import Agent

__all__ = ["MemoryPeer", "memory_agent"]


class MemoryPeer:
    """The agent's end of a connection in memory, to be played by a test.

    * `close_code`: the code that the client closed with, ``None`` as long as it has not.
    * `pings`: how many pings the client has sent.
    * `answers_close`: whether the client's close is answered; true unless a test says otherwise.
    * `broken`: whether the client's writes fail; what it reads goes on.
    * `writable`: as long as this event is not set, the client's writes block; set unless replaced.
    """

    def __init__(self) -> None:
        self.close_code: int | None = None
        self.pings = 0
        self.answers_close = True
        self.broken = False
        self.writable = anyio.Event()
        self.writable.set()
        self._to_client, self._client_receives = anyio.create_memory_object_stream[
            list[bytes] | TransportClosed
        ](math.inf)
        self._client_sends, self._from_client = anyio.create_memory_object_stream[bytes](math.inf)

    def send(self, *messages: om.ServerMessage | bytes) -> None:
        """Let `messages` arrive at the client, all in one batch; bytes are sent as they are."""
        batch = [message if isinstance(message, bytes) else om.encode(message) for message in messages]
        self._to_client.send_nowait(batch)

    async def receive(self) -> im.ClientMessage:
        """Wait for the next message that the client wrote."""
        return im.decode(await self._from_client.receive())

    def receive_nowait(self) -> im.ClientMessage:
        """The next message that the client wrote; raises `anyio.WouldBlock` if there is none."""
        return im.decode(self._from_client.receive_nowait())

    def close(self, code: int = 1000, reason: str = "", *, violation: bool = False) -> None:
        """End the connection: with a close frame, without one (1006), or by breaking the protocol."""
        self._to_client.send_nowait(TransportClosed(code, reason, violation=violation))

    def end(self) -> None:
        """Close all streams; only after the client has ended."""
        for stream in (self._to_client, self._client_receives, self._client_sends, self._from_client):
            stream.close()

    async def connect(self, task_group: TaskGroup) -> Transport:
        """The client's end, in the form that a session is opened with."""
        return _MemoryTransport(self)


class _MemoryTransport(Transport):
    def __init__(self, peer: MemoryPeer) -> None:
        self.output_ready: Callable[[], None] = lambda: None
        self.stats = AgentStats()
        self.heard = anyio.current_time()
        self._peer = peer

    async def receive(self) -> list[bytes]:
        arrived = await self._peer._client_receives.receive()
        if isinstance(arrived, TransportClosed):
            raise arrived
        self.heard = anyio.current_time()
        return arrived

    async def send(self, messages: list[bytes]) -> None:
        if messages:
            await self._peer.writable.wait()
        if self._peer.broken:
            raise anyio.BrokenResourceError
        for message in messages:
            await self._peer._client_sends.send(message)

    def ping(self) -> None:
        self._peer.pings += 1

    def close(self, code: int) -> None:
        self._peer.close_code = code
        if self._peer.answers_close:
            self._peer.close(code)

    async def aclose(self) -> None:
        self._peer._client_receives.close()
        self._peer._client_sends.close()


@asynccontextmanager
async def memory_agent(
    *,
    wire: str = "native",
    status: om.Status | None = None,
    dialect: Dialect | str | None = None,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    timeouts: Timeouts = Timeouts(),  # noqa: B008
    heartbeat: Heartbeat | None = None,
    on_notice: Callable[[om.ServerMessage], object] | None = None,
) -> AsyncIterator[tuple[Agent, MemoryPeer]]:
    """An `Agent` and the `MemoryPeer` that it talks to, without a socket or a thread.

    `wire` is ``"native"`` (the peer's status lists ids and cancel) or ``"single"`` (it lists nothing);
    `status` replaces that status. The rest is as in `open_agent`, except that there is no heartbeat unless
    asked for.
    """
    peer = MemoryPeer()
    if status is None:
        features = ("ids", "cancel") if by_name(wire).lanes is None else ()
        status = om.Status("ready", features)
    peer.send(status)

    try:
        async with run_agent(
            peer.connect,
            dialect=by_name(dialect) if isinstance(dialect, str) else dialect,
            limits=limits,
            timeouts=timeouts,
            heartbeat=heartbeat,
            on_notice=on_notice,
        ) as agent:
            yield agent, peer
    finally:
        peer.end()
