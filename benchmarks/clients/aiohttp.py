"""A router over aiohttp, with msgspec."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp

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
    async with (
        aiohttp.ClientSession() as session,
        # As bytes: msgspec takes them as they are.
        session.ws_connect(url, max_msg_size=MESSAGE_SIZE, compress=0, decode_text=False) as websocket,
    ):

        async def read(router: Router) -> None:
            async for message in websocket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    router.dispatch(message.data)

        async with routed(websocket.send_str, read) as router:
            yield router


ADAPTERS = (
    Adapter(
        name="aiohttp",
        label="aiohttp + msgspec",
        backend="asyncio",
        distributions=("aiohttp", "msgspec"),
        modules=("asyncio", "aiohttp", "msgspec"),
        multiplexes=True,
        connect=_connect,
    ),
    Adapter(
        name="aiohttp-uvloop",
        label="aiohttp + msgspec (uvloop)",
        backend="uvloop",
        distributions=("aiohttp", "msgspec", "uvloop"),
        modules=("asyncio", "uvloop", "aiohttp", "msgspec"),
        multiplexes=True,
        connect=_connect,
    ),
)
