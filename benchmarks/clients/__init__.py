"""The clients that are compared, one file each; a worker imports only the one that it measures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._base import Adapter

__all__ = ["NAMES", "load"]

_MODULES = {
    "anyagent-asyncio": "anyagent",
    "anyagent-uvloop": "anyagent",
    "anyagent-trio": "anyagent",
    "replaced": "replaced",
    "aiohttp": "aiohttp",
    "aiohttp-uvloop": "aiohttp",
    "websockets": "websockets",
    "picows": "picows",
    "picows-uvloop": "picows",
    "httpx-ws": "httpx_ws",
    "trio-websocket": "trio_websocket",
}

NAMES = tuple(_MODULES)
"""All clients, in the order of the tables."""


def load(name: str) -> Adapter:
    """The client `name`, whose libraries are imported only now. Raises `KeyError` for an unknown name."""
    module = importlib.import_module(f".{_MODULES[name]}", __name__)
    adapters: tuple[Adapter, ...] = module.ADAPTERS
    return next(adapter for adapter in adapters if adapter.name == name)
