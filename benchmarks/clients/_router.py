"""A queue for each request: what one writes over an asyncio WebSocket library to have several in flight."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from anyagent import OM

from ._messages import Collected, Routed, cancel, decode, end_of, user_message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

__all__ = ["RoutedAnswer", "Router", "routed"]


class Router:
    """Sends requests with `send`; hands what the library receives, given to `dispatch`, to their queues."""

    def __init__(self, send: Callable[[str], Awaitable[None]]) -> None:
        self._send = send
        self._ids = itertools.count(1)
        self._lost = False
        self._notices: asyncio.Queue[Routed | None] = asyncio.Queue()
        self._queues: dict[str | None, asyncio.Queue[Routed | None]] = {None: self._notices}

    def dispatch(self, data: str | bytes | memoryview) -> None:
        try:
            message = decode(data)
        except msgspec.ValidationError:
            return  # of a type that says nothing of a request
        queue = self._queues.get(message.id)
        if queue is not None:
            queue.put_nowait(message)

    def lost(self) -> None:
        """Ends whatever waits, with an error."""
        self._lost = True
        for queue in self._queues.values():
            queue.put_nowait(None)
        self._queues.clear()

    async def first_status(self) -> None:
        """Returns once it is here; raises `ConnectionError` if it does not come."""
        if not isinstance(await self._notices.get(), OM.Status):
            raise ConnectionError("the agent sent no status")

    async def send_message(self, text: str) -> RoutedAnswer:
        if self._lost:
            raise end_of(None)
        request_id = str(next(self._ids))
        queue = self._queues[request_id] = asyncio.Queue()
        try:
            await self._send(user_message(text, request_id))
        except BaseException:
            self.forget(request_id)
            raise
        return RoutedAnswer(self, request_id, queue)

    async def ask(self, text: str) -> Collected:
        async with await self.send_message(text) as answer:
            return Collected("".join([chunk.text async for chunk in answer]))

    def forget(self, request_id: str) -> bool:
        """Whether it was still waiting."""
        return self._queues.pop(request_id, None) is not None

    async def cancel(self, request_id: str) -> None:
        if self.forget(request_id):
            await self._send(cancel(request_id))


class RoutedAnswer:
    def __init__(self, router: Router, request_id: str, queue: asyncio.Queue[Routed | None]) -> None:
        self._router = router
        self._id = request_id
        self._queue = queue

    def __aiter__(self) -> RoutedAnswer:
        return self

    async def __anext__(self) -> OM.EventTextChunk:
        message = await self._queue.get()
        if isinstance(message, OM.EventTextChunk):
            return message
        self._queue.put_nowait(message)  # so that it stays at its end
        self._router.forget(self._id)
        raise end_of(message)

    async def __aenter__(self) -> RoutedAnswer:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._router.cancel(self._id)


@asynccontextmanager
async def routed(
    send: Callable[[str], Awaitable[None]], read: Callable[[Router], Awaitable[None]]
) -> AsyncIterator[Router]:
    """A router whose messages come from `read`, a task that ends when the connection does."""
    router = Router(send)

    async def run() -> None:
        try:
            await read(router)
        finally:
            router.lost()

    reader = asyncio.create_task(run())
    try:
        await router.first_status()
        yield router
    finally:
        reader.cancel()
        await asyncio.wait([reader])
