"""The agent on Starlette under `uvicorn`; the argument names uvicorn's WebSocket implementation."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from tests.servers.agent import WIRES, GoneError, converse
from tests.servers.process import begin, ready

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator


class _Link:
    def __init__(self, connection: WebSocket) -> None:
        self._connection = connection

    async def messages(self) -> AsyncIterator[str]:
        while (message := await self._connection.receive())["type"] != "websocket.disconnect":
            yield message["text"]

    async def send(self, message: str) -> None:
        try:
            await self._connection.send_text(message)
        except WebSocketDisconnect as exc:
            raise GoneError from exc

    async def ping(self) -> None:
        """ASGI has no pings; uvicorn sends its own, see `ws_ping_interval`."""

    async def pongs(self) -> None:
        """Nor has it pongs; uvicorn closes a connection whose pongs do not come."""

    async def close(self, code: int, reason: str) -> None:
        with contextlib.suppress(WebSocketDisconnect):
            await self._connection.close(code, reason)


async def _handle(connection: WebSocket) -> None:
    await connection.accept()
    with contextlib.suppress(GoneError):
        await converse(connection.url.path.removeprefix("/"), _Link(connection))


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        ready(self.servers[0].sockets[0].getsockname()[1])


def main(implementation: str) -> None:
    app = Starlette(routes=[WebSocketRoute(f"/{wire}", _handle) for wire in WIRES])
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        ws=implementation,
        ws_ping_interval=0.01,  # so that pings stand between chunks in every longer answer
        log_level="warning",
    )
    _Server(config).run()


if __name__ == "__main__":
    begin()
    main(sys.argv[1])
