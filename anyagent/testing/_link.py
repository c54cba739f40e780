"""One WebSocket connection of the embedded agent, with the means to break it."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING

import anyio.lowlevel
from websockets.exceptions import ConnectionClosed

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection

__all__ = ["Link"]

_LINGER_NOT = struct.pack("ii", 1, 0)  # on, for 0 seconds: closing then sends RST instead of FIN


class Link:
    """A `ServerConnection` on which sending never raises: whoever sends on a lost one is cancelled.

    `scope` is for the owner to enter around everything that lives on the connection.
    """

    def __init__(self, websocket: ServerConnection) -> None:
        self.websocket = websocket
        self.scope = anyio.CancelScope()
        self._dropped = False

    async def send(self, data: str | bytes) -> None:
        """Send a text (`str`) or binary (`bytes`) message."""
        # websockets does not wait as long as there is room, and a busy handler must see its cancellation.
        await anyio.lowlevel.checkpoint()
        if not self._dropped:
            with contextlib.suppress(ConnectionClosed):
                await self.websocket.send(data)
                return
        await self._lost()

    def write(self, data: bytes) -> None:
        """Write bytes beneath WebSocket; in order with the messages."""
        if not self._dropped:
            self.websocket.transport.write(data)

    async def close(self, code: int, reason: str) -> None:
        """Close with a close frame."""
        if not self._dropped:
            await self.websocket.close(code, reason)
        await self._lost()

    def reset(self) -> None:
        """Close with RST; what has not been transmitted is discarded."""
        transport = self.websocket.transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        transport.abort()

    def drop(self) -> None:
        """End the stream to the client with FIN (on TLS with its close_notify), without a close frame."""
        self._dropped = True
        transport = self.websocket.transport
        if transport.can_write_eof():
            transport.write_eof()  # and not close(): that sends RST in answer to whatever still arrives
        else:
            transport.close()

    def stop_reading(self) -> None:
        """Read nothing more: no message, no ping, no end of the connection."""
        self.websocket.transport.pause_reading()

    def resume_reading(self) -> None:
        """Undo `stop_reading`."""
        self.websocket.transport.resume_reading()

    async def _lost(self) -> None:
        await self.websocket.wait_closed()
        self.scope.cancel()
        await anyio.lowlevel.checkpoint()
