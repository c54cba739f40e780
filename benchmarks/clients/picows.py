"""A router over picows, with msgspec."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from ._base import Adapter
from ._messages import MESSAGE_SIZE
from ._router import Router

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ._base import Client

__all__ = ["ADAPTERS"]


class _Listener(WSListener):
    def on_ws_connected(self, transport: WSTransport) -> None:
        async def send(text: str) -> None:
            transport.send(WSMsgType.TEXT, text.encode())

        self.router = Router(send)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.TEXT and frame.fin:  # nobody here sends fragments
            self.router.dispatch(frame.get_payload_as_memoryview())
        else:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self.router.lost()


@asynccontextmanager
async def _connect(url: str) -> AsyncIterator[Client]:
    transport, listener = await ws_connect(_Listener, url, max_frame_size=MESSAGE_SIZE)
    assert isinstance(listener, _Listener)
    try:
        await listener.router.first_status()
        yield listener.router
    finally:
        transport.send_close()
        transport.disconnect()
        await transport.wait_disconnected()


ADAPTERS = (
    Adapter(
        name="picows",
        label="picows + msgspec",
        backend="asyncio",
        distributions=("picows", "msgspec"),
        modules=("asyncio", "picows", "msgspec"),
        multiplexes=True,
        connect=_connect,
    ),
    Adapter(
        name="picows-uvloop",
        label="picows + msgspec (uvloop)",
        backend="uvloop",
        distributions=("picows", "msgspec", "uvloop"),
        modules=("asyncio", "uvloop", "picows", "msgspec"),
        multiplexes=True,
        connect=_connect,
    ),
)
