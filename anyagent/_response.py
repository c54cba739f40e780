"""The client's handle on one request."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

from .errors import AnyAgentError

if TYPE_CHECKING:
    from types import TracebackType

    from ._request import Request, ResponseStats
    from ._supervisor import Supervisor
    from .om import AgentEvent, EventEnd

__all__ = ["Reply", "Response"]

_EVENTS_PER_CHECKPOINT: Final = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer: its `text` and its `tokens_used` (``None`` in an error's `partial`)."""

    text: str
    tokens_used: int | None = None


class Response:
    """What answers one request: an async iterator of its events, and an async context manager.

    ::

        async with await agent.send_message("Hello!") as response:
            async for event in response:
                ...
        print(response.tokens_used)

    Iterating yields every `OM.AgentEvent` but the terminal, in order. What had arrived comes before the
    end, or before the error: `AgentError`, `Disconnected`, `ProtocolError` or `SlowConsumerError`. There is
    one consumer at a time; a second one gets `anyio.BusyResourceError`.

    Leaving early cancels the request: leaving the ``async with`` block, `aclose`, or cancellation while
    waiting for an event. Then nothing more can be read (`anyio.ClosedResourceError`). A response that is
    dropped without any of that warns with `ResourceWarning` and is cancelled too.
    """

    _closed = True

    def __init__(self, supervisor: Supervisor, request: Request) -> None:
        self._supervisor = supervisor
        self._request = request
        self._batch: list[AgentEvent] = []  # the last one comes first
        self._ready: list[AgentEvent] = []  # likewise: what is yielded before the next checkpoint
        self._waiting = False
        self._closed = False
        self._exhausted = False

    @property
    def id(self) -> str:
        """The request's id on the wire; on a wire without ids, the name of its lane.

        It changes if the request moves to another connection, before anything was sent.
        """
        return self._request.lane

    @property
    def tokens_used(self) -> int | None:
        """How many tokens the agent says it used; ``None`` until the end has arrived."""
        return None if self._request.end is None else self._request.end.tokens_used

    @property
    def end(self) -> EventEnd | None:
        """The ``OM.EventEnd``; ``None`` until it has arrived, which may be before the last event is read."""
        return self._request.end

    @property
    def stats(self) -> ResponseStats:
        """When the message was sent, the first event came and the request ended; live."""
        return self._request.stats

    def __repr__(self) -> str:
        state = "settled" if self._request.settled else self._request.phase.replace("_", " ")
        return f"<Response id={self.id!r} {state}>"

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> AgentEvent:
        if not self._ready:
            await self._arrival()
            self._refill()
        return self._ready.pop()

    async def _arrival(self) -> None:
        """Wait if there is nothing to be read yet; at a checkpoint in any case.

        Cancelled: so is the request.
        """
        self._raise_if_waiting()
        self._waiting = True
        try:
            if self._batch or self._closed:
                await anyio.lowlevel.checkpoint()
            else:
                await self._request.arrival()
        except BaseException:
            self._close()
            raise
        finally:
            self._waiting = False

    def _raise_if_waiting(self) -> None:
        if self._waiting:
            raise anyio.BusyResourceError("iterating over this response")

    def _refill(self) -> None:
        """Make ready what is yielded before the next checkpoint."""
        if not self._batch:
            self._batch = self._request.take()
            self._batch.reverse()
            if not self._batch:
                self._finish()
                raise StopAsyncIteration
        if len(self._batch) <= _EVENTS_PER_CHECKPOINT:
            self._ready, self._batch = self._batch, []
        else:
            self._ready = self._batch[-_EVENTS_PER_CHECKPOINT:]
            del self._batch[-_EVENTS_PER_CHECKPOINT:]

    def _finish(self) -> None:
        """Close at the end of what there was to read. Raises what it ended with, if not well."""
        self._exhausted = self._exhausted or not self._closed  # else it was closed before its end
        self._close()
        if not self._exhausted:
            raise anyio.ClosedResourceError
        if self._request.error is not None:
            raise self._request.error

    async def aclose(self) -> None:
        """Leave: if the agent is still busy with the request, tell it to stop.

        Waits for nothing, so it cannot be cancelled half-way. Idempotent.
        """
        self._close()

    async def __aenter__(self) -> Response:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    async def collect(self) -> Reply:
        """Wait for the end and return the text of all text chunks that were not read yet, as one `Reply`.

        The caller is woken once, and only text is kept; `Limits.response_bytes` bounds all of it.

        Nothing answers an `OM.EventToolCall` here, and the agent would wait: iterate if it may call tools.
        Raises what iterating raises, with the `Reply` so far as its `partial`. Cancelled: so is the request.
        """
        self._raise_if_waiting()
        unread = (self._batch + self._ready)[::-1]
        self._batch, self._ready = [], []
        texts = [] if self._closed else self._request.start_collecting(unread)
        await self._arrival()
        reply = Reply("".join(texts), self.tokens_used)
        try:
            self._finish()
        except AnyAgentError as exc:
            exc.partial = exc.partial or reply  # that of the first one, if there was one before
            raise
        return reply

    async def send_tool_result(self, call_id: str, output: str) -> None:
        """Answer the ``OM.EventToolCall`` `call_id` with `output`.

        Returns once the message is being written. Cancelled before that: it is not sent. Raises the
        request's error, or `anyio.ClosedResourceError`, if the request is over, and `Disconnected` while it
        waits for a new connection.
        """
        await self._supervisor.send_tool_result(self._request, call_id, output)

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._supervisor.leave(self._request)
            self._batch, self._ready = [], []

    def __del__(self) -> None:
        if not self._closed:
            self._supervisor.abandon(self._request)  # first: the warning may be an error
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=1)
