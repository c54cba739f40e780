"""One request: what the session that routes to it and the response that reads from it share."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import TYPE_CHECKING, Final

import anyio

from .errors import AgentError, SlowConsumerError
from .om import Error, EventReasoningChunk, EventTextChunk

if TYPE_CHECKING:
    from ._writer import Outgoing
    from .config import Limits
    from .errors import Phase
    from .om import AgentEvent, EventEnd

__all__ = ["Request", "ResponseStats"]

_MERGEABLE: Final = (EventTextChunk, EventReasoningChunk)


@dataclasses.dataclass(slots=True)
class ResponseStats:
    """When things happened to one request, in seconds of `anyio.current_time`; ``None``: not yet, or never.

    * `sent`: its message was handed to the transport.
    * `first_event`: the batch with its first event arrived.
    * `end`: its terminal arrived, it failed, or it was cancelled.
    """

    sent: float | None = None
    first_event: float | None = None
    end: float | None = None


class Request:
    """One ``IM.UserMessage`` and everything that answers it.

    It is `settled` once its outcome is fixed. The agent may still be answering then, if its lane has to be
    drained; `drained` is set when it has ended. `queued` are its messages that wait for the writer.

    Events reach the consumer in batches, through a memory object stream of one batch. While that batch has
    not been taken, further events join it.
    """

    def __init__(self, lane: str, limits: Limits) -> None:
        self.lane = lane
        self.phase: Phase = "not_sent"
        self.stats = ResponseStats()
        self.end: EventEnd | None = None
        self.error: Exception | None = None
        self.settled = False
        self.drained: anyio.Event | None = None
        self.queued: list[Outgoing] = []
        self._limits = limits
        self._send, self._receive = anyio.create_memory_object_stream[list["AgentEvent"]](1)
        self._pending: list[AgentEvent] | None = None
        self._tail: list[AgentEvent] = []  # to be joined to the last pending event, which is of their kind
        self._handed_over = False
        self._pending_size = 0

    def push(self, event: AgentEvent, size: int) -> bool:
        """Add an event of `size` bytes; true if it opened a new batch, which `hand_over` has to follow.

        Raises `SlowConsumerError` at a limit of the buffer; the event is lost then.
        """
        pending = self._pending
        if pending is None:
            self._pending, self._pending_size = [event], size
            return True
        if self._pending_size + size > self._limits.response_bytes:
            raise SlowConsumerError("response_bytes", self._limits.response_bytes)
        if len(pending) < self._limits.response_events:
            pending.append(event)
        elif isinstance(event, _MERGEABLE) and type(event) is type(pending[-1]):
            self._tail.append(event)
            if len(self._tail) >= self._limits.response_events:
                self._join_tail(pending)
        else:
            self._join_tail(pending)
            pending[:] = _merge(pending)
            if len(pending) >= self._limits.response_events:
                raise SlowConsumerError("response_events", self._limits.response_events)
            pending.append(event)
        self._pending_size += size
        return False

    def hand_over(self) -> None:
        """Pass an opened batch to the consumer. Once per batch."""
        if self._pending is not None and not self._handed_over:
            self._handed_over = True
            self._send.send_nowait(self._pending)

    async def take(self) -> list[AgentEvent]:
        """Wait for the next batch, at a checkpoint in any case. Raises `anyio.EndOfStream` after the last."""
        batch = await self._receive.receive()
        self._join_tail(batch)
        self._pending = None
        self._handed_over = False
        return batch

    def settle(self, outcome: EventEnd | Exception | None, now: float) -> None:
        """Fix the outcome: a terminal, an error, or ``None`` for a consumer that left. Once per request.

        What had arrived stays there to be taken first.
        """
        self.hand_over()
        self.settled = True
        self.stats.end = now
        if isinstance(outcome, Exception):
            self.error = outcome
        else:
            self.end = outcome
        self._send.close()

    def discard(self) -> None:
        """Close the reading end: nobody will take what is left."""
        self._receive.close()

    def _join_tail(self, pending: list[AgentEvent]) -> None:
        if self._tail:
            pending[-1:] = _merge([pending[-1], *self._tail])
            self._tail.clear()


def agent_error(message: Error) -> AgentError:
    return AgentError(message.code, message.details, retry_after=message.retry_after)


def _merge(events: list[AgentEvent]) -> list[AgentEvent]:
    """The same events, each run of chunks of one kind joined to one chunk with the `seq` of the last."""
    merged: list[AgentEvent] = []
    for kind, group in groupby(events, type):
        run = list(group)
        if kind in _MERGEABLE and len(run) > 1:
            text = "".join(event.text for event in run if isinstance(event, _MERGEABLE))
            merged.append(kind(text, id=run[-1].id, seq=run[-1].seq))
        else:
            merged += run
    return merged
