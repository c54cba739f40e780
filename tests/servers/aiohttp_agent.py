"""The agent on the server of `aiohttp`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from aiohttp import WSMsgType, web

from tests.servers.agent import WIRES, GoneError, Pongs, converse
from tests.servers.process import begin, ready

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class _Link:
    def __init__(self, connection: web.WebSocketResponse) -> None:
        self._connection = connection
        self._pongs = Pongs()

    async def messages(self) -> AsyncIterator[str]:
        async for message in self._connection:
            match message.type:
                case WSMsgType.TEXT:
                    yield message.data
                case WSMsgType.PING:
                    await self._connection.pong(message.data)
                case WSMsgType.PONG:
                    self._pongs.arrived(bytes(message.data))
                case _:
                    raise AssertionError(f"the client sent a message of type {message.type!r}")

    async def send(self, message: str) -> None:
        try:
            await self._connection.send_str(message)
        except ConnectionResetError as exc:
            raise GoneError from exc

    async def ping(self) -> None:
        try:
            await self._connection.ping(self._pongs.next_ping())
        except ConnectionResetError as exc:
            raise GoneError from exc

    async def pongs(self) -> None:
        await self._pongs.wait()

    async def close(self, code: int, reason: str) -> None:
        await self._connection.close(code=code, message=reason.encode())


async def _handle(request: web.Request) -> web.WebSocketResponse:
    connection = web.WebSocketResponse(autoping=False)  # which hands out the pongs, and leaves pings to us
    await connection.prepare(request)
    with contextlib.suppress(GoneError):
        await converse(request.path.removeprefix("/"), _Link(connection))
    return connection


async def main() -> None:
    app = web.Application()
    app.add_routes(web.get(f"/{wire}", _handle) for wire in WIRES)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    ready(runner.addresses[0][1])
    await asyncio.Event().wait()


if __name__ == "__main__":
    begin()
    asyncio.run(main())
