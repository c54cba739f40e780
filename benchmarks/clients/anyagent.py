"""anyagent itself, as it is."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from anyagent import Limits, open_agent

from ._base import Adapter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ._base import Backend, Client

__all__ = ["ADAPTERS"]

_LIMITS = Limits(in_flight=20_000)  # the others have none, and a scenario asks for 10,000


@asynccontextmanager
async def _connect(url: str) -> AsyncIterator[Client]:
    async with open_agent(url, limits=_LIMITS) as agent:
        yield agent


def _adapter(backend: Backend, *distributions: str, modules: tuple[str, ...]) -> Adapter:
    return Adapter(
        name=f"anyagent-{backend}",
        label=f"anyagent ({backend})",
        backend=backend,
        distributions=("anyagent", "anyio", "msgspec", *distributions),
        modules=("anyagent", *modules),
        multiplexes=True,
        connect=_connect,
    )


_ON_ASYNCIO = ("anyagent._transports.asyncio", "anyio._backends._asyncio")

ADAPTERS = (
    _adapter("asyncio", "websockets", modules=_ON_ASYNCIO),
    _adapter("uvloop", "websockets", "uvloop", modules=(*_ON_ASYNCIO, "uvloop")),
    _adapter(
        "trio", "trio", "trio-websocket", modules=("anyagent._transports.trio", "anyio._backends._trio")
    ),
)
