"""A router over httpx-ws, with msgspec."""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
from httpx_ws import AsyncWebSocketSession, aconnect_ws

from ._base import Adapter
from ._messages import MESSAGE_SIZE
from ._router import routed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ._base import Client
    from ._router import Router

__all__ = ["ADAPTERS"]

_TLS = ssl.create_default_context()  # once: httpx would load the certificates for every client, for ws:// too


@asynccontextmanager
async def _connect(url: str) -> AsyncIterator[Client]:
    async with (
        httpx.AsyncClient(verify=_TLS, trust_env=False) as http,
        aconnect_ws(
            url, http, max_message_size_bytes=MESSAGE_SIZE, session_class=AsyncWebSocketSession
        ) as websocket,
    ):

        async def read(router: Router) -> None:
            while True:
                router.dispatch(await websocket.receive_text())

        async with routed(websocket.send_text, read) as router:
            yield router


ADAPTERS = (
    Adapter(
        name="httpx-ws",
        label="httpx-ws + msgspec",
        backend="asyncio",
        distributions=("httpx-ws", "httpx", "wsproto", "msgspec"),
        modules=("asyncio", "httpx_ws", "anyio._backends._asyncio", "msgspec"),
        multiplexes=True,
        connect=_connect,
    ),
)
