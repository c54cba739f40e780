"""The agent on the asyncio server of `websockets`."""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus
from typing import TYPE_CHECKING

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from tests.servers.agent import WIRES, GoneError, converse
from tests.servers.process import begin, ready

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from websockets.http11 import Request, Response


class _Link:
    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self._pongs: list[Awaitable[float]] = []

    async def messages(self) -> AsyncIterator[str]:
        with contextlib.suppress(ConnectionClosed):
            while True:
                message = await self._connection.recv()
                assert isinstance(message, str)
                yield message

    async def send(self, message: str) -> None:
        try:
            await self._connection.send(message)
        except ConnectionClosed as exc:
            raise GoneError from exc

    async def ping(self) -> None:
        try:
            self._pongs.append(await self._connection.ping())
        except ConnectionClosed as exc:
            raise GoneError from exc

    async def pongs(self) -> None:
        try:
            await asyncio.gather(*self._pongs)
        except ConnectionClosed as exc:
            raise GoneError from exc

    async def close(self, code: int, reason: str) -> None:
        await self._connection.close(code, reason)


async def _handle(connection: ServerConnection) -> None:
    assert connection.request is not None
    with contextlib.suppress(GoneError):
        await converse(connection.request.path.removeprefix("/"), _Link(connection))


def _refuse_other_paths(connection: ServerConnection, request: Request) -> Response | None:
    if request.path.removeprefix("/") in WIRES:
        return None
    return connection.respond(HTTPStatus.NOT_FOUND, "no such wire")


async def main() -> None:
    async with serve(_handle, "127.0.0.1", 0, process_request=_refuse_other_paths) as server:
        ready(next(iter(server.sockets)).getsockname()[1])
        await server.serve_forever()


if __name__ == "__main__":
    begin()
    asyncio.run(main())
