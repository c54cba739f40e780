"""A channel for each request: what one writes over a Trio WebSocket library to have several in flight."""

from __future__ import annotations

import itertools
import math
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
import trio

from anyagent import OM

from ._messages import Collected, Routed, cancel, decode, end_of, user_message

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["RoutedAnswer", "Router"]


class Router:
    """Sends requests with `send`; hands what the library receives, given to `dispatch`, to their channels."""

    def __init__(self, send: Callable[[str], Awaitable[None]]) -> None:
        self._send = send
        self._ids = itertools.count(1)
        self._lost = False
        notices, self._notices = trio.open_memory_channel[Routed](math.inf)
        self._channels: dict[str | None, trio.MemorySendChannel[Routed]] = {None: notices}

    def dispatch(self, data: str | bytes) -> None:
        try:
            message = decode(data)
        except msgspec.ValidationError:
            return  # of a type that says nothing of a request
        channel = self._channels.get(message.id)
        if channel is not None:
            channel.send_nowait(message)

    def lost(self) -> None:
        """Ends whatever waits, with an error."""
        self._lost = True
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    async def first_status(self) -> None:
        """Returns once it is here; raises `ConnectionError` if it does not come."""
        with suppress(trio.EndOfChannel):
            if isinstance(await self._notices.receive(), OM.Status):
                return
        raise ConnectionError("the agent sent no status")

    async def send_message(self, text: str) -> RoutedAnswer:
        if self._lost:
            raise end_of(None)
        request_id = str(next(self._ids))
        self._channels[request_id], channel = trio.open_memory_channel[Routed](math.inf)
        try:
            await self._send(user_message(text, request_id))
        except BaseException:
            self.forget(request_id)
            raise
        return RoutedAnswer(self, request_id, channel)

    async def ask(self, text: str) -> Collected:
        async with await self.send_message(text) as answer:
            return Collected("".join([chunk.text async for chunk in answer]))

    def forget(self, request_id: str) -> bool:
        """Whether it was still waiting."""
        return self._channels.pop(request_id, None) is not None

    async def cancel(self, request_id: str) -> None:
        if self.forget(request_id):
            with trio.CancelScope(shield=True):  # a cancelled task, too, tells the agent
                await self._send(cancel(request_id))


class RoutedAnswer:
    def __init__(self, router: Router, request_id: str, channel: trio.MemoryReceiveChannel[Routed]) -> None:
        self._router = router
        self._id = request_id
        self._channel = channel

    def __aiter__(self) -> RoutedAnswer:
        return self

    async def __anext__(self) -> OM.EventTextChunk:
        message: Routed | None
        try:
            message = await self._channel.receive()
        except trio.EndOfChannel:
            message = None
        if isinstance(message, OM.EventTextChunk):
            return message
        self._router.forget(self._id)
        raise end_of(message)

    async def __aenter__(self) -> RoutedAnswer:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._router.cancel(self._id)
