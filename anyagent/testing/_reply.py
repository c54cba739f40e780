"""`AgentReply`: what a handler of the embedded agent answers with."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

import anyio

from .. import im, om

if TYPE_CHECKING:
    from ._link import Link

__all__ = ["AgentReply", "Handler", "ToolCalls"]


class AgentReply:
    """The agent's side of one request: sends its events, and can misbehave on request.

    A handler is given one and returns when it has answered; the terminal is then sent for it. Whatever
    sends here waits while the client does not read, and when the connection is lost the handler is
    cancelled, as it is by the client's ``CANCEL``.

    `tokens_used` goes into the terminal; it counts the text chunks sent, and may be set.
    """

    def __init__(
        self, link: Link, request_id: str | None, tool_calls: ToolCalls, on_end: Callable[[], None]
    ) -> None:
        self.tokens_used = 0
        self._link = link
        self._id = request_id
        self._tool_calls = tool_calls
        self._on_end = on_end
        self._ended = False

    @property
    def id(self) -> str | None:
        """The request's id; ``None`` on a wire without ids."""
        return self._id

    @property
    def ended(self) -> bool:
        """Whether this request is over: nothing more is sent for it on its own."""
        return self._ended

    async def text(self, text: str) -> None:
        """Send an `OM.EventTextChunk`. Raises `RuntimeError` once the request has `ended`."""
        self._check_live()
        self.tokens_used += 1
        await self.send(om.EventTextChunk(id=self._id, text=text))

    async def reasoning(self, text: str) -> None:
        """Send an `OM.EventReasoningChunk`. Raises `RuntimeError` once the request has `ended`."""
        self._check_live()
        await self.send(om.EventReasoningChunk(id=self._id, text=text))

    async def tool_call(self, name: str, arguments: str) -> str:
        """Send an `OM.EventToolCall`, wait for the client's ``TOOL_RESULT`` and return its output.

        `arguments` is JSON text, sent unchecked. Raises `RuntimeError` once the request has `ended`.
        """
        self._check_live()
        call = self._tool_calls.open(self._id)
        try:
            await self.send(
                om.EventToolCall(id=self._id, call_id=call.call_id, name=name, arguments=arguments)
            )
            await call.answered.wait()
        finally:
            self._tool_calls.discard(call)
        return call.output

    async def end(self, status: str = "completed") -> None:
        """End the request with an `OM.EventEnd`, before the handler returns.

        Raises `RuntimeError` if the request has `ended`.
        """
        self._check_live()
        self.end_silently()
        await self.send(om.EventEnd(id=self._id, tokens_used=self.tokens_used, status=status))

    async def error(self, code: str | int, details: str, retry_after: float | None = None) -> None:
        """End the request with an `OM.Error`; `retry_after` is in seconds.

        Raises `RuntimeError` if the request has `ended`.
        """
        self._check_live()
        self.end_silently()
        await self.send(om.Error(id=self._id, code=code, details=details, retry_after=retry_after))

    def end_silently(self) -> None:
        """Fault: the request is over for the agent, and the client is not told. May be called again."""
        self._ended = True
        self._on_end()

    async def hang(self) -> None:
        """Never return; wait to be cancelled."""
        await anyio.sleep_forever()

    async def send(self, message: om.ServerMessage) -> None:
        """Send any message as it is: no id is filled in, and an `OM.EventEnd` does not end the request."""
        await self.raw(om.encode(message).decode())

    async def raw(self, data: str | bytes) -> None:
        """Fault: send any text (`str`) or binary (`bytes`) WebSocket message."""
        await self._link.send(data)

    def write(self, data: bytes) -> None:
        """Fault: write bytes to the connection beneath WebSocket, frame headers and all."""
        self._link.write(data)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Fault: close the connection with a close frame. The handler is then cancelled."""
        await self._link.close(code, reason)

    def reset(self) -> None:
        """Fault: reset the connection (TCP RST), so that what was sent before may be lost.

        The handler is cancelled.
        """
        self._link.reset()

    def drop(self) -> None:
        """Fault: end the connection without a close frame (TCP FIN), after what was sent before.

        The handler is cancelled when the client has closed its side too.
        """
        self._link.drop()

    def stop_reading(self) -> None:
        """Fault: read nothing more from the connection. Pings go unanswered, and its end unnoticed."""
        self._link.stop_reading()

    def _check_live(self) -> None:
        if self._ended:
            raise RuntimeError("the request has ended")


Handler: TypeAlias = Callable[[im.UserMessage, AgentReply], Awaitable[None]]
"""Answers one request: ``async def handler(message: IM.UserMessage, reply: AgentReply) -> None``."""


class _ToolCall:
    """A tool call that waits for its result."""

    def __init__(self, request_id: str | None, call_id: str) -> None:
        self.request_id = request_id
        self.call_id = call_id
        self.answered = anyio.Event()
        self.output = ""


class ToolCalls:
    """The tool calls of one connection that wait for their results."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[tuple[str | None, str], _ToolCall] = {}

    def open(self, request_id: str | None) -> _ToolCall:
        """A new call, with a `call_id` that no other call of the connection has."""
        call = _ToolCall(request_id, f"call-{next(self._numbers)}")
        self._open[request_id, call.call_id] = call
        return call

    def settle(self, result: im.ToolResult) -> None:
        """Give a result to its call; one that belongs to none is ignored."""
        call = self._open.pop((result.id, result.call_id), None)
        if call is not None:
            call.output = result.output
            call.answered.set()

    def discard(self, call: _ToolCall) -> None:
        """Forget a call, answered or not."""
        self._open.pop((call.request_id, call.call_id), None)
