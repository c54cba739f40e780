"""The multiplexer: lanes, routing table, receiver task, writer task."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio
import msgspec

from . import im, om
from ._lanes import Lanes
from ._request import Request, agent_error
from ._transports import TransportClosed
from ._writer import Outgoing, Writer
from .errors import AnyAgentError, Disconnected, ProtocolError, SlowConsumerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

    from ._transports import Transport, Waker
    from .config import Heartbeat, Limits, Timeouts
    from .dialects import Dialect
    from .errors import Phase

    _Event: TypeAlias = (
        om.EventTextChunk | om.EventReasoningChunk | om.EventToolCall | om.EventEnd | om.Error | om.Unknown
    )

__all__ = ["AgentStats", "Session"]

_TOMBSTONES: Final = 4_096
_CONTENT: Final = (om.EventTextChunk, om.EventReasoningChunk, om.EventToolCall, om.Unknown)


@dataclasses.dataclass(slots=True)
class AgentStats:
    """Counters of one agent since it was opened.

    * `requests`: registered; each ends as one of `completed` (``OM.EventEnd``), `failed` or `cancelled`.
    * `events`: delivered to responses.
    * `late_events`: dropped, for a request that was left early.
    * `unroutable_events`: dropped, for an id that no request has (or had, as far as is remembered).
    """

    requests: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    events: int = 0
    late_events: int = 0
    unroutable_events: int = 0


class _Failure(msgspec.Struct, frozen=True):
    """Why the connection takes no more requests; every request gets an exception of its own."""

    code: int
    reason: str
    graceful: bool = False
    violation: ProtocolError | None = None
    cause: BaseException | None = None

    def for_request(self, phase: Phase) -> AnyAgentError:
        if self.violation is None:
            return self.for_newcomer(phase)
        error = ProtocolError(self.violation.reason, close_code=self.violation.close_code)
        error.__cause__ = self.cause
        return error

    def for_newcomer(self, phase: Phase = "not_sent") -> AnyAgentError:
        error = Disconnected(self.code, self.reason, graceful=self.graceful, phase=phase)
        error.__cause__ = self.violation or self.cause
        return error


_LEFT: Final = _Failure(1000, "the agent was closed")


class Session:
    """One connection and the requests on it.

    `run` is one task that holds all others; it is shielded, and ends when the connection is closed. Its
    tasks never raise: they record what went wrong and settle every request with it, synchronously. What is
    not the connection's fault (an exception in `on_notice`, Ctrl-C in one of the tasks) is kept in `crash`,
    and `on_crash` is called.
    """

    def __init__(
        self,
        transport: Transport,
        dialect: Dialect,
        status: om.Status,
        backlog: list[bytes],
        *,
        limits: Limits,
        timeouts: Timeouts,
        heartbeat: Heartbeat | None,
        on_notice: Callable[[om.ServerMessage], object] | None,
        run_soon: Callable[[Callable[[], object]], None],
        new_waker: Callable[[], Waker],
    ) -> None:
        self.status = status
        self.stats = AgentStats()
        self.crash: BaseException | None = None
        self.on_crash: Callable[[], None] = lambda: None
        self._transport = transport
        self._dialect = dialect
        self._can_cancel = dialect.can_cancel(status)
        self._backlog = backlog
        self._limits = limits
        self._timeouts = timeouts
        self._heartbeat = heartbeat
        self._on_notice = on_notice
        self._run_soon = run_soon
        self._new_waker = new_waker
        self._lanes = Lanes(dialect.lanes, self._in_flight_limit(status))
        self._requests: dict[str | None, Request] = {}  # never under None, which `lane_of` may say
        self._tombstones: OrderedDict[str, None] = OrderedDict()
        self._abandoned: deque[Request] = deque()
        self._wake_reaper = anyio.Event()
        self._graceful: om.GracefulDisconnect | None = None
        self._last_error: om.Error | None = None
        self._failure: _Failure | None = None
        self._closing = False
        self._heard = anyio.current_time()
        self._receiver_done = anyio.Event()
        self._running = anyio.Event()
        self._closed = anyio.Event()
        self._scope = anyio.CancelScope(shield=True)
        self._tasks: TaskGroup
        self._writer = Writer(transport, new_waker())

    # What Agent and Response call

    @property
    def in_flight(self) -> int:
        return len(self._requests)

    async def open_request(self, message: im.UserMessage) -> Request:
        """Wait for a lane, register the request, queue its message. Cancelled: nothing was sent."""
        lane = await self._lanes.acquire()
        try:
            data = self._dialect.encode(msgspec.structs.replace(message, id=lane))
        except BaseException:
            self._lanes.release(lane)
            raise
        request = Request(lane, self._limits, self._new_waker())
        self._requests[lane] = request
        self.stats.requests += 1
        self._writer.queue(Outgoing(data, request))
        return request

    async def send_tool_result(self, request: Request, call_id: str, output: str) -> None:
        """Queue a result and wait until the writer has taken it. Cancelled before that: it is not sent."""
        data = self._dialect.encode(im.ToolResult(id=request.lane, call_id=call_id, output=output))
        taken = anyio.Event()
        outgoing = Outgoing(data, request, taken)
        if not request.settled:
            self._writer.queue(outgoing)
            try:
                await taken.wait()
            except BaseException:
                self._writer.withdraw(outgoing)
                raise
        if request.settled:
            raise request.error or anyio.ClosedResourceError

    def leave(self, request: Request) -> None:
        """The consumer of `request` leaves; the agent is told if it is still busy with it."""
        if not request.settled:
            self.stats.cancelled += 1
            self._stop(request, None)
        request.discard()

    def abandon(self, request: Request) -> None:
        """As `leave`, but from a finalizer: any thread, and in the middle of anything."""
        if request.settled:
            request.discard()
        else:
            self._abandoned.append(request)
            self._run_soon(lambda: self._wake_reaper.set())

    async def aclose(self) -> None:
        """Cancel what is in flight, close with a handshake, end all tasks; cannot be cancelled."""
        with anyio.CancelScope(shield=True):
            await self._running.wait()
            for request in self._requests.values():
                if not request.settled:
                    self.stats.cancelled += 1
                    self._tell_to_stop(request)
                    self._settle(request, _LEFT.for_request(request.phase))
            self._fail(_LEFT)
            await self._closed.wait()

    # Tasks

    async def running(self) -> None:
        """Wait until `run` has got under way, which takes a moment and is not cancelled."""
        with anyio.CancelScope(shield=True):
            await self._running.wait()

    async def run(self) -> None:
        try:
            with self._scope:
                async with anyio.create_task_group() as self._tasks:
                    self._start(self._receive)
                    self._start(self._write)
                    self._start(self._reap)
                    if self._heartbeat is not None:
                        self._start(self._beat, self._heartbeat)
                    self._running.set()
        finally:
            with anyio.CancelScope(shield=True):
                await self._transport.aclose()
            self._closing = True  # reached without it where asyncio cancels all tasks at its end
            self._fail(_Failure(1006, "the event loop ended"))
            self._closed.set()

    def _start(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        self._tasks.start_soon(self._guard, function, *args)

    async def _guard(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        try:
            await function(*args)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as exc:
            self.crash = self.crash or exc
            self._fail(_Failure(1011, "a callback failed", cause=exc))
            self.on_crash()

    async def _receive(self) -> None:
        try:
            self._process(self._backlog)
            while True:
                batch = await self._transport.receive()
                self._heard = anyio.current_time()
                self._process(batch)
        except TransportClosed as exc:
            graceful = self._graceful is not None
            violation = ProtocolError(exc.reason, close_code=exc.code) if exc.violation else None
            cause = exc.__cause__ or (agent_error(self._last_error) if self._last_error else None)
            self._fail(
                _Failure(exc.code, exc.reason, graceful, violation, cause), exc.code if violation else 1000
            )
        finally:
            self._receiver_done.set()

    async def _write(self) -> None:
        try:
            await self._writer.run()
        except anyio.BrokenResourceError:
            # What has arrived is still read, and the receiver learns the reason; but not for ever.
            self._start_closing()

    async def _reap(self) -> None:
        """Leave the requests that were abandoned."""
        while True:
            await self._wake_reaper.wait()
            self._wake_reaper = anyio.Event()
            while self._abandoned:
                self.leave(self._abandoned.popleft())

    async def _beat(self, heartbeat: Heartbeat) -> None:
        while True:
            quiet = anyio.current_time() - self._heard
            if quiet < heartbeat.interval:
                await anyio.sleep(heartbeat.interval - quiet)
                continue
            asked = anyio.current_time()
            self._transport.ping()
            await anyio.sleep(heartbeat.timeout)
            if self._heard < asked:
                reason = f"nothing heard for {heartbeat.interval + heartbeat.timeout:g} s"
                self._fail(_Failure(1006, reason), close_code=1011)
                return

    async def _drain(self, request: Request, drained: anyio.Event) -> None:
        with anyio.move_on_after(self._timeouts.drain):
            await drained.wait()
        if drained.is_set() or self._failure is not None:
            return
        if self._dialect.lanes is None:
            self._bury(request)
        else:
            reason = f"an answer that was left did not end within {self._timeouts.drain:g} s"
            self._fail(_Failure(1000, reason))

    async def _leave_at_deadline(self, deadline: float) -> None:
        await anyio.sleep(max(deadline, 0))
        self._fail_gracefully()

    async def _close_transport(self, code: int) -> None:
        with anyio.move_on_after(self._timeouts.close):
            await self._writer.flushed()
            self._transport.close(code)
            await self._receiver_done.wait()
            await self._writer.flushed()
        self._fail(_Failure(1006, "the connection could not be written to"))
        self._scope.cancel()

    # Receiving

    def _process(self, batch: list[bytes]) -> None:
        """Decode and route everything that arrived together; each waiting consumer is woken at most once."""
        decode, lane_of, requests = self._dialect.decode, self._dialect.lane_of, self._requests
        delivered = 0
        try:
            for data in batch:
                if self._failure is not None:
                    break
                try:
                    message = decode(data)
                except ProtocolError as exc:
                    self._reject(exc)
                else:
                    if isinstance(message, _CONTENT):  # nearly always
                        request = requests.get(lane_of(message))
                        if request is not None and (request.streaming or self._has_started(request)):
                            try:
                                request.push(message, len(data))
                            except SlowConsumerError as exc:
                                self._fail_request(request, exc)
                            else:
                                delivered += 1
                            continue
                    if isinstance(message, om.AgentEvent):
                        self._route(message)
                    else:
                        self._notice(message)
        finally:
            self.stats.events += delivered

    def _has_started(self, request: Request) -> bool:
        """Whether the next event is the first one of `request`."""
        if request.phase != "sent" or request.settled:
            return False
        request.phase = "started"
        request.streaming = True
        request.stats.first_event = self._heard
        return True

    def _route(self, event: _Event) -> None:
        """See to an event that is not to be delivered."""
        lane = self._dialect.lane_of(event)
        request = self._requests.get(lane)
        if request is None or request.phase == "not_sent":
            self._route_elsewhere(event, lane)
        elif isinstance(event, om.EventEnd | om.Error):
            self._terminate(request, event)
        else:
            self.stats.late_events += 1

    def _route_elsewhere(self, event: _Event, lane: str | None) -> None:
        """An event of no live request."""
        if lane is None and not isinstance(event, om.Error | om.Unknown):
            self._reject(ProtocolError("an event names no request"))
        elif lane is None or event.id is None:
            self._notice(event)
        elif lane not in self._tombstones:
            self.stats.unroutable_events += 1
        else:
            self.stats.late_events += 1
            if isinstance(event, om.EventEnd | om.Error):
                del self._tombstones[lane]

    def _terminate(self, request: Request, terminal: om.EventEnd | om.Error) -> None:
        if request.drained is not None:
            request.drained.set()
        elif isinstance(terminal, om.EventEnd):
            self.stats.completed += 1
            self._last_error = None
            self._settle(request, terminal)
        else:
            self.stats.failed += 1
            self._settle(request, agent_error(terminal))
        self._remove(request)

    def _notice(self, message: om.ServerMessage) -> None:
        if isinstance(message, om.Status) and message.id is None:
            self.status = message
            if message.max_in_flight is not None:
                self._lanes.resize(self._in_flight_limit(message))
        elif isinstance(message, om.GracefulDisconnect) and self._graceful is None:
            self._disconnect_gracefully(message)
        elif isinstance(message, om.Error):
            self._last_error = message
        if self._on_notice is not None:
            self._on_notice(message)

    def _disconnect_gracefully(self, message: om.GracefulDisconnect) -> None:
        """Take no new request; what was written runs to its end, or to the agent's deadline."""
        self._graceful = message
        newcomers = _Failure(1001, message.reason, graceful=True)
        self._lanes.close(newcomers.for_newcomer)
        for request in [request for request in self._requests.values() if request.phase == "not_sent"]:
            self.stats.failed += 1
            self._settle(request, newcomers.for_newcomer())
            del self._requests[request.lane]
            self._lanes.release(request.lane)
        if not self._requests:
            self._fail_gracefully()
        elif message.deadline is not None:
            self._start(self._leave_at_deadline, message.deadline)

    def _reject(self, exc: ProtocolError) -> None:
        """An invalid message fails its request, if it can be told whose it is; else everything."""
        request = None if exc.request_id is None else self._requests.get(exc.request_id)
        if request is not None and request.phase != "not_sent":
            if request.settled:
                self.stats.late_events += 1
            else:
                self._fail_request(request, exc)
        elif exc.request_id in self._tombstones:
            self.stats.late_events += 1
        else:
            failure = _Failure(exc.close_code, exc.reason, violation=exc, cause=exc.__cause__)
            self._fail(failure, exc.close_code)

    # Ending requests

    def _fail_request(self, request: Request, error: Exception) -> None:
        self.stats.failed += 1
        self._stop(request, error)

    def _stop(self, request: Request, error: Exception | None) -> None:
        """Settle a request that the agent has not ended, and see to its lane."""
        self._tell_to_stop(request)
        self._settle(request, error)
        if request.phase == "not_sent":
            self._remove(request)
        elif self._can_cancel and self._dialect.lanes is None:
            self._bury(request)
        else:
            request.drained = anyio.Event()
            self._start(self._drain, request, request.drained)

    def _settle(self, request: Request, outcome: om.EventEnd | Exception | None) -> None:
        request.settle(outcome, anyio.current_time())
        for outgoing in tuple(request.queued):
            self._writer.withdraw(outgoing)

    def _tell_to_stop(self, request: Request) -> None:
        if self._can_cancel and request.phase != "not_sent" and not request.settled:
            self._writer.queue(Outgoing(self._dialect.encode(im.Cancel(request.lane))))

    def _bury(self, request: Request) -> None:
        """Remember the id of a request that the agent may not have ended yet."""
        self._tombstones[request.lane] = None
        if len(self._tombstones) > _TOMBSTONES:
            self._tombstones.popitem(last=False)
        self._remove(request)

    def _remove(self, request: Request) -> None:
        del self._requests[request.lane]
        self._lanes.release(request.lane)
        if self._graceful is not None and not self._requests:
            self._fail_gracefully()

    # Ending the connection

    def _fail_gracefully(self) -> None:
        assert self._graceful is not None
        self._fail(_Failure(1001, self._graceful.reason, graceful=True))

    def _fail(self, failure: _Failure, close_code: int = 1000) -> None:
        """Settle everything with the first failure, and start to close. Later failures change nothing."""
        if self._failure is not None:
            return
        self._failure = failure
        self._lanes.close(failure.for_newcomer)
        requests, self._requests = self._requests, {}
        for request in requests.values():
            if not request.settled:
                self.stats.failed += 1
                self._settle(request, failure.for_request(request.phase))
        self._start_closing(close_code)

    def _start_closing(self, code: int = 1000) -> None:
        if not self._closing:
            self._closing = True
            self._start(self._close_transport, code)

    def _in_flight_limit(self, status: om.Status) -> int:
        if status.max_in_flight is None:
            return self._limits.in_flight
        return min(self._limits.in_flight, status.max_in_flight)
