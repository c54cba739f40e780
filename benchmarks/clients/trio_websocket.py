"""A router over trio-websocket, with msgspec."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio
from trio_websocket import ConnectionClosed, open_websocket_url

from ._base import Adapter
from ._messages import MESSAGE_SIZE
from ._trio_router import Router

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ._base import Client

__all__ = ["ADAPTERS"]


@asynccontextmanager
async def _connect(url: str) -> AsyncIterator[Client]:
    async with open_websocket_url(url, max_message_size=MESSAGE_SIZE) as websocket:
        router = Router(websocket.send_message)

        async def read() -> None:
            try:
                while True:
                    router.dispatch(await websocket.get_message())
            except ConnectionClosed:
                router.lost()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await router.first_status()
            yield router
            nursery.cancel_scope.cancel()


ADAPTERS = (
    Adapter(
        name="trio-websocket",
        label="trio-websocket + msgspec",
        backend="trio",
        distributions=("trio-websocket", "trio", "wsproto", "msgspec"),
        modules=("trio", "trio_websocket", "msgspec"),
        multiplexes=True,
        connect=_connect,
    ),
)
