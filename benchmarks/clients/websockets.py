"""A router over websockets, with msgspec."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from websockets.asyncio.client import connect

from ._base import Adapter
from ._messages import MESSAGE_SIZE
from ._router import routed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ._base import Client
    from ._router import Router

__all__ = ["ADAPTERS"]


@asynccontextmanager
async def _connect(url: str) -> AsyncIterator[Client]:
    async with connect(url, compression=None, max_size=MESSAGE_SIZE, proxy=None) as websocket:

        async def read(router: Router) -> None:
            while True:  # decode=False: what its documentation advises for a parser that takes bytes
                router.dispatch(await websocket.recv(decode=False))

        async with routed(websocket.send, read) as router:
            yield router


ADAPTERS = (
    Adapter(
        name="websockets",
        label="websockets + msgspec",
        backend="asyncio",
        distributions=("websockets", "msgspec"),
        modules=("asyncio", "websockets.asyncio.client", "msgspec"),
        multiplexes=True,
        connect=_connect,
    ),
)
