"""One request: what the session that routes to it and the response that reads from it share."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import TYPE_CHECKING, Final

import anyio.lowlevel

from . import _observation
from .errors import AgentError, SlowConsumerError
from .om import Error, EventReasoningChunk, EventTextChunk

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from . import im
    from ._dispatcher import Connection
    from ._observation import RequestOutcome
    from ._stats import AgentStats
    from ._transports import Waker
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
    * `first_event`, `last_event`: the batch with its first, or newest, event arrived.
    * `end`: its terminal arrived, it failed, or it was cancelled.
    * `events`: how many have arrived, without the terminal.
    """

    sent: float | None = None
    first_event: float | None = None
    last_event: float | None = None
    end: float | None = None
    events: int = 0


class Request:
    """One `message` and everything that answers it.

    It waits for a `connection`, and on that has a `lane`. As long as its message was not written, it may be
    taken from there and wait again. It is `claimed` once its caller knows that it has had a lane; before, its
    message is not to be written, as the caller may have been cancelled.

    It is `settled` once its outcome is fixed. The agent may still be answering then, if its lane has to be
    drained; `drained` is set when it has ended. In between, from its first event on, it is `streaming`.
    `queued` are its messages that wait for the writer.

    Events wait here until the consumer takes them, all at once; it is woken when there is a first one. A
    consumer that collects is woken at the end, and only the text is kept for it, in `texts`. `size` is that
    of what waits, in bytes as it came; `size_limit` is the most that may.
    """

    def __init__(self, message: im.UserMessage, limits: Limits, totals: AgentStats, waker: Waker) -> None:
        self.message: im.UserMessage | None = message  # until it is written
        self.connection: Connection | None = None
        self.lane = ""
        self.claimed = False
        self._on_room: Callable[[Request], object] | None = None
        self.phase: Phase = "not_sent"
        self.stats = ResponseStats()
        self.end: EventEnd | None = None
        self.error: Exception | None = None
        self.settled = False
        self.streaming = False
        self.drained: anyio.Event | None = None
        self.queued: list[Outgoing] = []
        self._events_limit = limits.response_events
        self.size_limit = limits.response_bytes
        self._pending: list[AgentEvent] = []
        self.size = 0  # of what waits
        self._tail: list[AgentEvent] = []  # to be joined to the last pending event, which is of their kind
        self.texts: list[str] | None = None
        self._totals = totals
        self._waker = waker
        self._ended: Callable[[RequestOutcome], object] | None = None
        self._started = 0.0

    def observe(self, ended: Callable[[RequestOutcome], object], now: float) -> None:
        """Have `ended` called once, when the outcome is fixed."""
        self._ended = ended
        self._started = now

    def assignment(self) -> Awaitable[None]:
        """Wait for a connection, or the end; woken without one where it was taken away again."""
        return self._waker.wait()

    def assign(self, connection: Connection, lane: str) -> None:
        """Give it a lane of `connection`."""
        self.connection = connection
        self.lane = lane
        if not self.claimed:
            self._waker.wake()

    def push(self, event: AgentEvent, size: int) -> None:
        """Add an event that came in `size` bytes; wake the consumer if it waits for one.

        Raises `SlowConsumerError` at a limit of the buffer; the event is lost then.
        """
        pending = self._pending
        total = self.size + size
        if total > self.size_limit and self.size and self._keeps(event):
            raise SlowConsumerError("response_bytes", self.size_limit)
        if self.texts is not None:
            if not isinstance(event, EventTextChunk):
                return
            self.texts.append(event.text)
        elif len(pending) >= self._events_limit:
            self._squeeze_in(event)
        else:
            pending.append(event)
            if len(pending) == 1:
                self._waker.wake()
        self.size = total

    def hold(self, event: AgentEvent, size: int, on_room: Callable[[Request], object]) -> bool:
        """Add an event that `push` refused, beyond the limit; not where nobody takes any before the end.

        `on_room` is called when what waits has been taken, or the outcome is fixed.
        """
        if self.texts is not None:
            return False
        self._join_tail(self._pending)  # what waits there comes before it
        self._pending.append(event)
        self.size += size
        self._on_room = on_room
        return True

    def arrival(self) -> Awaitable[None]:
        """Wait until there is something to take, or nothing more to wait for; at a checkpoint in any case."""
        if self._pending or self.settled:
            return anyio.lowlevel.checkpoint()
        return self._waker.wait()

    def take(self) -> list[AgentEvent]:
        """All events that have arrived."""
        pending, self._pending = self._pending, []
        self._note_high_water(len(pending))
        self.size = 0
        self._join_tail(pending)
        self._make_room()
        return pending

    def start_collecting(self, unread: list[AgentEvent]) -> list[str]:
        """Keep nothing but text from now on; return the list to which the texts are added.

        It begins with those in `unread`, which were taken before. From then on the end alone is an `arrival`.
        """
        self._note_high_water(len(self._pending))
        waiting = [*unread, *self._pending, *self._tail]
        self.texts = [event.text for event in waiting if isinstance(event, EventTextChunk)]
        self._pending, self._tail = [], []
        self.size = sum(map(len, self.texts))
        self._make_room()
        return self.texts

    def settle(self, outcome: EventEnd | Exception | None, now: float) -> None:
        """Fix the outcome: a terminal, an error, or ``None`` for a consumer that left. Once per request.

        What had arrived stays there to be taken first.
        """
        self.settled = True
        self.streaming = False
        self.stats.end = now
        if isinstance(outcome, Exception):
            self.error = outcome
        else:
            self.end = outcome
        self._note_high_water(len(self._pending))
        self._make_room()
        self._waker.wake()
        if self._ended is not None:
            self._ended(_observation.RequestOutcome(self.end, self.error, self._started, self.stats))

    def discard(self) -> None:
        """Drop what waits: nobody will take it."""
        self._pending, self._tail = [], []
        if self.texts is not None:
            self.texts = []

    def _note_high_water(self, events: int) -> None:
        totals = self._totals
        if events > totals.buffered_events:
            totals.buffered_events = events
        if self.size > totals.buffered_bytes:
            totals.buffered_bytes = self.size

    def _make_room(self) -> None:
        on_room, self._on_room = self._on_room, None
        if on_room is not None:
            on_room(self)

    def _keeps(self, event: AgentEvent) -> bool:
        return self.texts is None or isinstance(event, EventTextChunk)

    def _squeeze_in(self, event: AgentEvent) -> None:
        """Add an event beyond the limit, by joining chunks."""
        pending = self._pending
        if self._on_room is not None:
            pending.append(event)  # there will be few of them, and joining takes a pass over all
            return
        if isinstance(event, _MERGEABLE) and type(event) is type(pending[-1]):
            self._tail.append(event)
            if len(self._tail) >= self._events_limit:
                self._join_tail(pending)
            return
        self._join_tail(pending)
        pending[:] = _merge(pending)
        if len(pending) >= self._events_limit:
            raise SlowConsumerError("response_events", self._events_limit)
        pending.append(event)

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
