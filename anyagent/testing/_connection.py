"""What the embedded agent does on one connection: reads it, and runs a handler for each request."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NoReturn

import anyio
from websockets.exceptions import ConnectionClosed

from .. import im, om
from ..errors import ProtocolError
from ._link import Link
from ._reply import AgentReply, Handler, ToolCalls

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup
    from websockets.asyncio.server import ServerConnection

__all__ = ["Behaviour", "Connection"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Behaviour:
    """How an agent behaves on every connection; `first` is the message that it opens each with."""

    handler: Handler
    first: str | bytes | None
    multiplexed: bool
    cancellable: bool
    max_in_flight: int | None


class Connection:
    """Serves one connection; `record` is told of every message of the client, before it is acted upon."""

    def __init__(
        self,
        websocket: ServerConnection,
        behaviour: Behaviour,
        record: Callable[[im.ClientMessage], None],
    ) -> None:
        self.link = Link(websocket)
        self._behaviour = behaviour
        self._record = record
        self._live: dict[str | None, anyio.CancelScope] = {}
        self._tool_calls = ToolCalls()
        self._turn = anyio.Lock()

    async def serve(self) -> None:
        """Serve until the connection is closed and all handlers have ended."""
        with self.link.scope:
            async with anyio.create_task_group() as handlers:
                try:
                    # Not by way of the link, which yields first: something might be broadcast before it.
                    if self._behaviour.first is not None:
                        await self.link.websocket.send(self._behaviour.first)
                    await self._receive(handlers)
                except ConnectionClosed:
                    self.link.scope.cancel()
                except ProtocolError as exc:
                    await self.link.close(exc.close_code, exc.reason)

    async def _receive(self, handlers: TaskGroup) -> NoReturn:
        while True:
            message = im.decode(await self.link.websocket.recv())
            self._record(message)
            match message:
                case im.UserMessage():
                    await self._open(handlers, message)
                case im.Cancel():
                    self._cancel(message)
                case _:
                    self._tool_calls.settle(message)

    async def _open(self, handlers: TaskGroup, message: im.UserMessage) -> None:
        limit = self._behaviour.max_in_flight
        if not self._behaviour.multiplexed:
            handlers.start_soon(self._answer_in_turn, message)
        elif message.id in self._live:
            await self._refuse(message, "duplicate_id", "a request with this id is in flight")
        elif limit is not None and len(self._live) >= limit:
            await self._refuse(message, "busy", f"{limit} requests are in flight")
        else:
            scope = self._live[message.id] = anyio.CancelScope()
            handlers.start_soon(self._answer, message, message.id, scope)

    async def _refuse(self, message: im.UserMessage, code: str, details: str) -> None:
        await self.link.send(om.encode(om.Error(id=message.id, code=code, details=details)).decode())

    def _cancel(self, message: im.Cancel) -> None:
        if self._behaviour.cancellable and message.id in self._live:
            # Its place is free at once: the client may use it without waiting for the terminal.
            self._live.pop(message.id).cancel()

    async def _answer_in_turn(self, message: im.UserMessage) -> None:
        async with self._turn:
            await self._answer(message, None, anyio.CancelScope())

    async def _answer(
        self, message: im.UserMessage, request_id: str | None, scope: anyio.CancelScope
    ) -> None:
        def on_end() -> None:
            if self._live.get(request_id) is scope:
                del self._live[request_id]

        reply = AgentReply(self.link, request_id, self._tool_calls, on_end)
        failure: str | None = None
        try:
            with scope:
                await self._behaviour.handler(message, reply)
        except BaseException as exc:  # pytest.fail() and sys.exit() too; a Ctrl-C is the main thread's
            failure = type(exc).__name__
        if reply.ended:
            return
        if failure is not None:
            await reply.error("internal_error", failure)
        else:
            await reply.end("cancelled" if scope.cancelled_caught else "completed")
