"""What a session has to do, said in the plainest way: no task, no stream, one step after the other."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from .plans import Message, Wire

__all__ = ["IN_FLIGHT", "LEFT", "NO_LANE", "RESPONSE_EVENTS", "Event", "Model", "ModelRequest", "Outcome"]

IN_FLIGHT: Final = 3
RESPONSE_EVENTS: Final = 3

Event: TypeAlias = tuple[str, str]
"""Kind and text."""

Outcome: TypeAlias = tuple[object, ...]
"""How a request ended: the name of an exception and its fields, or "completed", or "left"."""

NO_LANE: Final = "none yet"

LEFT: Final[Outcome] = ("left",)


@dataclasses.dataclass(frozen=True)
class _Failure:
    code: int
    graceful: bool = False
    violation: bool = False

    def of(self, phase: str) -> Outcome:
        if self.violation:
            return ("ProtocolError", None, self.code)
        return ("Disconnected", self.code, self.graceful, phase)

    def of_newcomer(self) -> Outcome:
        return ("Disconnected", self.code, self.graceful, "not_sent")


@dataclasses.dataclass(eq=False)
class ModelRequest:
    """A request and its consumer. `buffer` is with the session, `batch` with the response."""

    number: int
    lane: str = NO_LANE
    phase: str = "not_sent"
    settled: Outcome | None = None
    draining: bool = False
    buffer: list[Event] = dataclasses.field(default_factory=list)
    batch: list[Event] = dataclasses.field(default_factory=list)
    closed: bool = False
    reads: int = 0
    yielded: list[Event] = dataclasses.field(default_factory=list)
    outcome: Outcome | None = None
    """What the consumer has seen, once it is done."""

    def push(self, event: Event) -> bool:
        """Buffer `event`; false at the limit, to which adjacent chunks of one kind count as one."""
        if len(self.buffer) >= RESPONSE_EVENTS:
            last_kind, last_text = self.buffer[-1]
            if event[0] == last_kind and last_kind in ("text", "reasoning"):
                self.buffer[-1] = (last_kind, last_text + event[1])
                return True
            merged: list[Event] = []
            for kind, events in groupby(self.buffer, lambda event: event[0]):
                texts = [text for _, text in events]
                merged += (
                    [(kind, "".join(texts))] if kind in ("text", "reasoning") else [(kind, t) for t in texts]
                )
            self.buffer = merged
            if len(merged) >= RESPONSE_EVENTS:
                return False
        self.buffer.append(event)
        return True

    def consume(self) -> None:
        """Let the consumer read as far as it was told to, and as far as there is something."""
        while self.reads and self.outcome is None:
            if not self.batch:
                self.batch, self.buffer = self.buffer, []
            if self.batch:
                self.reads -= 1
                self.yielded.append(self.batch.pop(0))
            elif self.settled is not None:
                self.outcome = LEFT if self.closed else self.settled
            else:
                break


class Model:
    """A session after each step of a plan. Requests are told apart by their number."""

    def __init__(self, wire: Wire) -> None:
        self.requests: list[ModelRequest] = []
        self.written: list[tuple[str, int]] = []
        self.notices: list[str] = []
        self.close_code: int | None = None
        self.closed = False
        self.failure: _Failure | None = None
        self.live: dict[str, ModelRequest] = {}
        self.stats = dict.fromkeys(
            ("requests", "completed", "failed", "cancelled", "events", "late_events", "unroutable_events"), 0
        )
        self._wire = wire
        self._free = [str(number) for number in range(1, 1_000)] if wire.names is None else list(wire.names)
        self._limit = IN_FLIGHT
        self._waiting: list[ModelRequest] = []
        self._served: list[ModelRequest] = []  # that have been given a lane, and not used it yet
        self._newcomers: Outcome | None = None
        self._left_early: set[str] = set()
        self._queue: list[tuple[str, ModelRequest]] = []
        self._stuck: list[tuple[str, int]] | None = None
        self._graceful = False
        self._deadline = False
        self._pending_close_code = 0

    # Steps

    def can_block(self) -> bool:
        """Whether a message that is sent now is written at once, and so would get stuck."""
        return self._stuck is None and self._newcomers is None and self._has_lane() and not self._waiting

    def block(self) -> None:
        """Write the next message, and get stuck in it."""
        self.send()
        self._stuck = [self.written.pop()]

    def unblock(self) -> None:
        if self._stuck is not None:
            stuck, self._stuck = self._stuck, None
            if not self.closed:
                self.written += stuck
            self._settle()

    def send(self) -> None:
        request = ModelRequest(len(self.requests))
        self.requests.append(request)
        self._waiting.append(request)
        self._settle()

    def read(self, request: ModelRequest, count: int) -> None:
        request.reads += count
        self._settle()

    def cancel(self, request: ModelRequest) -> None:
        if request.outcome is None:
            if request in self._waiting:
                self._waiting.remove(request)
            else:
                self.close(request)
            request.outcome = LEFT

    def close(self, request: ModelRequest) -> None:
        if request.outcome is not None or request.closed or request in self._waiting:
            return
        request.closed = True
        request.buffer, request.batch = [], []
        if request.settled is None:
            self.stats["cancelled"] += 1
            self._stop(request, LEFT)
        self._settle()

    def arrive(self, messages: list[Message]) -> None:
        for message in messages:
            if self.failure is None:
                self._receive(message)
        self._settle()

    def disconnect(self, code: int, violation: bool) -> None:
        failure = _Failure(code, self._graceful, violation)
        self._fail(failure, code if violation else 1000)
        self._settle()

    def advance(self) -> None:
        """Let all timeouts pass: of the agent's farewell, which is the shortest, of draining, of closing."""
        if self._deadline:
            self._fail(_Failure(1001, graceful=True))
        for request in [request for request in self.live.values() if request.draining]:
            if self._wire.names is None:
                self._left_early.add(request.lane)
                self._remove(request)
            else:
                self._fail(_Failure(1000))
        self._settle()
        if self.failure is not None:
            self.closed = True

    def leave(self) -> None:
        """The block of the agent is left, and all timeouts pass."""
        for request in self.live.values():
            if request.settled is None:
                self._tell_to_stop(request)
                self.stats["cancelled"] += 1
                request.settled = _Failure(1000).of(request.phase)
        self._fail(_Failure(1000))
        self._settle()
        self.closed = True

    # What arrives

    def _receive(self, message: Message) -> None:
        match message.kind:
            case "status" | "resize":
                if message.kind == "resize":
                    self._limit = 2
                    self._serve()
                self.notices.append("Status")
            case "graceful" | "graceful with deadline":
                self.notices.append("GracefulDisconnect")
                if not self._graceful:
                    self._say_farewell(with_deadline=message.kind != "graceful")
            case "wrong field":
                self._reject(message.lane if self._wire.lane_field else None)
            case "not JSON" | "not UTF-8":
                code = 1002 if message.kind == "not JSON" else 1007
                self._fail(_Failure(code, violation=True), code)
            case _:
                self._route(message)

    def _route(self, message: Message) -> None:
        lane = message.lane
        if self._wire.lane_field is None:
            lane = None if message.kind == "unknown" else ""
        request = None if lane is None else self.live.get(lane)
        if request is not None and request.phase != "not_sent":
            self._receive_event(request, message)
        elif lane is None or self._wire.lane_field is None:
            if lane is None and message.kind not in ("error", "unknown"):
                self._fail(_Failure(1002, violation=True), 1002)
            else:
                self.notices.append(_EVENT_NAMES[message.kind])
        elif lane in self._left_early:
            self.stats["late_events"] += 1
            if message.kind in ("end", "error"):
                self._left_early.remove(lane)
        else:
            self.stats["unroutable_events"] += 1

    def _receive_event(self, request: ModelRequest, message: Message) -> None:
        if message.kind in ("end", "error"):
            if request.settled is None and message.kind == "end":
                self.stats["completed"] += 1
                request.settled = ("completed", len(message.payload))
            elif request.settled is None:
                self.stats["failed"] += 1
                request.settled = ("AgentError", message.payload)
            self._remove(request)
        elif request.settled is not None:
            self.stats["late_events"] += 1
        else:
            request.phase = "started"
            if request.push((message.kind, message.payload)):
                self.stats["events"] += 1
            else:
                self.stats["failed"] += 1
                self._stop(request, ("SlowConsumerError", "response_events", RESPONSE_EVENTS))

    def _reject(self, lane: str | None) -> None:
        request = None if lane is None else self.live.get(lane)
        if request is not None and request.phase != "not_sent":
            if request.settled is not None:
                self.stats["late_events"] += 1
            else:
                self.stats["failed"] += 1
                self._stop(request, ("ProtocolError", lane, 1002))
        elif lane in self._left_early:
            self.stats["late_events"] += 1
        else:
            self._fail(_Failure(1002, violation=True), 1002)

    def _say_farewell(self, *, with_deadline: bool) -> None:
        self._graceful = True
        farewell = _Failure(1001, graceful=True)
        self._newcomers = self._newcomers or farewell.of_newcomer()
        for request in list(self.live.values()):
            if request.phase == "not_sent":
                self.stats["failed"] += 1
                request.settled = farewell.of_newcomer()
                self._free_lane(request)
        if not self.live:
            self._fail(farewell)
        self._deadline = with_deadline

    # What becomes of requests and lanes

    def _stop(self, request: ModelRequest, outcome: Outcome) -> None:
        self._tell_to_stop(request)
        request.settled = outcome
        if request.phase == "not_sent":
            self._remove(request)
        elif self._wire.cancel:
            self._left_early.add(request.lane)
            self._remove(request)
        else:
            request.draining = True

    def _tell_to_stop(self, request: ModelRequest) -> None:
        if self._wire.cancel and request.phase != "not_sent":
            self._queue.append(("CANCEL", request))

    def _remove(self, request: ModelRequest) -> None:
        self._free_lane(request)
        if self._graceful and not self.live:
            self._fail(_Failure(1001, graceful=True))

    def _free_lane(self, request: ModelRequest) -> None:
        del self.live[request.lane]
        if self._wire.names is not None:
            self._free.append(request.lane)
        self._serve()

    def _fail(self, failure: _Failure, close_code: int = 1000) -> None:
        if self.failure is None:
            self.failure = failure
            self._newcomers = self._newcomers or failure.of_newcomer()
            for request in self.live.values():
                if request.settled is None:
                    self.stats["failed"] += 1
                    request.settled = failure.of(request.phase)
            self.live.clear()
            self._pending_close_code = close_code

    def _has_lane(self) -> bool:
        return len(self.live) + len(self._served) < self._limit and bool(self._free)

    def _serve(self) -> None:
        """Give free lanes to those who have waited longest."""
        while self._newcomers is None and self._waiting and self._has_lane():
            request = self._waiting.pop(0)
            request.lane = self._free.pop(0)
            self._served.append(request)

    def _settle(self) -> None:
        """Let everything happen that needs no more time and no more messages."""
        self._serve()
        if self._newcomers is not None:
            for request in self._waiting + self._served:
                request.outcome = self._newcomers
            self._waiting.clear()
        else:
            for request in self._served:
                self.live[request.lane] = request
                self.stats["requests"] += 1
                self._queue.append(("USER_MESSAGE", request))
        self._served.clear()
        if self._stuck is None and not self.closed:
            for kind, request in self._queue:
                if kind == "CANCEL" or request.settled is None:
                    self.written.append((kind, request.number))
                    if kind == "USER_MESSAGE":
                        request.phase = "sent"
            self._queue.clear()
            if self.failure is not None:
                self.closed = True
                self.close_code = self._pending_close_code
        for request in self.requests:
            request.consume()


_EVENT_NAMES: Final = {
    "text": "EventTextChunk",
    "reasoning": "EventReasoningChunk",
    "tool": "EventToolCall",
    "end": "EventEnd",
    "error": "Error",
    "unknown": "Unknown",
}
