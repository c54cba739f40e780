"""The multiplexer: one connection, its routing table, receiver task, writer task."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import anyio
import anyio.lowlevel
import msgspec

from . import im, om
from ._failure import LEFT, Failure
from ._lanes import Lanes
from ._log import logger
from ._request import agent_error
from ._transports import TransportClosed
from ._writer import Outgoing, Writer
from .dialects.native import NativeDialect
from .errors import ProtocolError, SlowConsumerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from anyio.abc import TaskGroup

    from ._request import Request
    from ._stats import AgentStats
    from ._transports import Transport, Waker
    from .config import Heartbeat, Limits, Timeouts
    from .dialects import Dialect

    _Event: TypeAlias = (
        om.EventTextChunk | om.EventReasoningChunk | om.EventToolCall | om.EventEnd | om.Error | om.Unknown
    )

__all__ = ["Owner", "Session"]

_TOMBSTONES: Final = 4_096
_DECODED_AT_ONCE: Final = 256  # messages, whose structs are held meanwhile
_CONTENT: Final = (om.EventTextChunk, om.EventReasoningChunk, om.EventToolCall, om.Unknown)


class Owner(Protocol):
    """What a session needs of whoever opened it. All of it is called synchronously."""

    stats: AgentStats
    status: om.Status
    """The newest one of any session."""

    on_notice: Callable[[om.ServerMessage], object] | None

    def new_waker(self) -> Waker: ...

    def serve(self) -> None:
        """The session may be ready for another request."""

    def unavailable(self, session: Session, failure: Failure) -> None:
        """The session takes no more requests."""

    def take_back(self, requests: Iterable[Request]) -> bool:
        """Have `requests`, of which nothing was written, done by another session; false: there is none."""

    def crashed(self, exc: BaseException) -> None:
        """Something failed that is not the connection's fault: an exception in `on_notice`, a Ctrl-C."""


class Session:
    """One connection and the requests on it.

    `run` is one task that holds all others; it ends when the connection is closed. Its tasks never raise:
    they record what went wrong and settle every request with it, synchronously.
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
        owner: Owner,
    ) -> None:
        self.accepting = True
        self.opened = anyio.current_time()
        self._owner = owner
        self._stats = owner.stats
        self._transport = transport
        self._dialect = dialect
        self._can_cancel = dialect.can_cancel(status)
        self._as_written = type(dialect) is NativeDialect  # with nothing in between that could be different
        self._backlog = backlog
        self._limits = limits
        self._timeouts = timeouts
        self._heartbeat = heartbeat
        self._lanes = Lanes(dialect.lanes, self._in_flight_limit(status))
        self._requests: dict[str | None, Request] = {}  # never under None, which `lane_of` may say
        self._full: set[Request] = set()  # nothing is read before their events are taken
        self._room = owner.new_waker()
        self._tombstones: OrderedDict[str, None] = OrderedDict()
        self._retiring: Failure | None = None
        self._last_error: om.Error | None = None
        self._failure: Failure | None = None
        self._closing = False
        self._heard = transport.heard
        self._pinged: float | None = None
        self._receiver_done = anyio.Event()
        self._running = anyio.Event()
        self._closed = anyio.Event()
        self._scope = anyio.CancelScope(shield=True)
        self._tasks: TaskGroup
        self._writer = Writer(transport, owner.new_waker(), self._serve)
        self._stats.bytes_received += transport.stats.bytes_received  # the first status
        self._stats.bytes_sent += transport.stats.bytes_sent
        transport.stats = owner.stats

    # What the owner calls

    @property
    def in_flight(self) -> int:
        return len(self._requests)

    @property
    def ready(self) -> bool:
        return self.accepting and self._lanes.free and not (self._closing or self._writer.full)

    def start(self, request: Request) -> None:
        """Give a lane to `request` and queue its message; it is settled if that has no encoding."""
        assert request.message is not None, "it was not written yet"
        lane = self._lanes.take()
        try:
            data = self._dialect.encode(msgspec.structs.replace(request.message, id=lane))
        except Exception as exc:
            self._lanes.release(lane)
            self._stats.failed += request.claimed
            request.settle(exc, anyio.current_time())
            return
        self._requests[lane] = request
        request.assign(self, lane)
        self._writer.queue(Outgoing(data, request))

    def claim(self, request: Request) -> None:
        """The caller of `request` knows of it, so that its message may be written."""
        request.claimed = True
        self._stats.requests += 1
        self._writer.wake()

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
            self._stats.cancelled += request.claimed
            self._stop(request, None)

    def retire(self, failure: Failure) -> None:
        """Take no new request; what was written runs to its end, and then the connection is closed."""
        self._retiring = failure
        self._refuse(failure)
        self._give_back(failure)
        if not self._requests:
            self._fail(failure)

    async def aclose(self) -> None:
        """Cancel what is in flight, close with a handshake, end all tasks; not to be cancelled."""
        await self._running.wait()
        for request in self._requests.values():
            if not request.settled:
                self._stats.cancelled += request.claimed
                self._tell_to_stop(request)
                self._settle(request, LEFT.for_request(request.phase), anyio.current_time())
        self._fail(LEFT)
        await self._closed.wait()

    # Tasks

    async def run(self) -> None:
        try:
            with self._scope:
                async with anyio.create_task_group() as self._tasks:
                    self._start(self._receive)
                    self._start(self._write)
                    if self._heartbeat is not None:
                        self._start(self._beat, self._heartbeat)
                    self._running.set()
        finally:
            with anyio.CancelScope(shield=True):
                await self._transport.aclose()
            self._closing = True  # reached without it where asyncio cancels all tasks at its end
            self._fail(Failure(1006, "the event loop ended"))
            self._closed.set()

    def _start(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        self._tasks.start_soon(self._guard, function, *args)

    async def _guard(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        try:
            await function(*args)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as exc:
            self._owner.crashed(exc)
            self._fail(Failure(1011, "a callback failed", cause=exc))

    async def _receive(self) -> None:
        try:
            self._process(self._backlog)
            while True:
                while self._full:
                    await self._room.wait()
                batch = await self._transport.receive()
                self._heard = self._transport.heard
                if self._pinged is not None:
                    self._stats.ping_round_trip = self._heard - self._pinged
                    self._pinged = None
                self._process(batch)
        except TransportClosed as exc:
            graceful = self._retiring is not None and self._retiring.graceful
            violation = ProtocolError(exc.reason, close_code=exc.code) if exc.violation else None
            cause = exc.__cause__ or (agent_error(self._last_error) if self._last_error else None)
            self._fail(
                Failure(exc.code, exc.reason, graceful, violation, cause), exc.code if violation else 1000
            )
        finally:
            self._receiver_done.set()

    async def _write(self) -> None:
        try:
            await self._writer.run()
        except anyio.BrokenResourceError:
            # What has arrived is still read, and the receiver learns the reason; but not for ever.
            self._start_closing()

    async def _beat(self, heartbeat: Heartbeat) -> None:
        transport = self._transport
        while True:
            # Points in time, not differences, which can round to no time at all.
            quiet_until = transport.heard + heartbeat.interval
            if self._full:
                quiet_until = anyio.current_time() + heartbeat.interval  # nobody listens
            if anyio.current_time() < quiet_until:
                await anyio.sleep_until(quiet_until)
                continue
            asked = self._pinged = anyio.current_time()
            transport.ping()
            await anyio.sleep(heartbeat.timeout)
            await anyio.lowlevel.checkpoint()  # if this task comes late, an answer may wait in the socket
            if transport.heard < asked and not self._full:
                reason = f"nothing heard for {heartbeat.interval + heartbeat.timeout:g} s"
                self._fail(Failure(1006, reason), close_code=1011)
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
            self._fail(Failure(1000, reason))

    async def _leave_at_deadline(self, deadline: float, failure: Failure) -> None:
        await anyio.sleep(max(deadline, 0))
        self._fail(failure)

    async def _close_transport(self, code: int) -> None:
        with anyio.move_on_after(self._timeouts.close):
            await self._writer.flushed()
            self._transport.close(code)
            await self._receiver_done.wait()
            await self._writer.flushed()
        self._fail(Failure(1006, "the connection could not be written to"))
        self._scope.cancel()

    # Receiving

    def _process(self, batch: list[bytes]) -> None:
        """Decode and route everything that arrived together; each waiting consumer is woken at most once."""
        for start in range(0, len(batch), _DECODED_AT_ONCE):
            if self._failure is not None:
                break
            part = batch[start : start + _DECODED_AT_ONCE]
            if not (self._as_written and self._process_chunks(part)):
                for data in part:
                    if self._failure is None:
                        self._process_one(data)

    def _process_chunks(self, part: list[bytes]) -> bool:
        """As `_process_one` for each of `part`, the fast way; false: one of them is invalid, nothing is done.

        Nearly all messages are chunks of answers, so a chunk goes to its request without a further call.
        """
        try:
            messages = list(map(om.decode_known, part))
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return False
        requests, heard, delivered = self._requests, self._heard, 0
        for data, message in zip(part, messages, strict=True):
            if type(message) is om.EventTextChunk:
                request = requests.get(message.id)
                if request is not None and request.streaming:
                    texts, size = request.texts, len(data)
                    if texts is not None and request.size + size <= request.size_limit:
                        texts.append(message.text)
                        request.size += size
                    elif not self._push(request, message, size):
                        continue
                    stats = request.stats
                    stats.events += 1
                    stats.last_event = heard
                    delivered += 1
                    continue
            self._process_message(message, len(data))
            if self._failure is not None:
                break
        self._stats.events += delivered
        return True

    def _process_one(self, data: bytes) -> None:
        try:
            message = self._dialect.decode(data)
        except ProtocolError as exc:
            self._reject(exc)
        else:
            self._process_message(message, len(data))

    def _process_message(self, message: om.ServerMessage, size: int) -> None:
        """Route a message that came in `size` bytes."""
        if isinstance(message, _CONTENT):
            request = self._requests.get(self._dialect.lane_of(message))
            if request is not None and (request.streaming or self._has_started(request)):
                if self._push(request, message, size):
                    self._stats.events += 1
                    request.stats.events += 1
                    request.stats.last_event = self._heard
                return
        if isinstance(message, om.AgentEvent):
            self._route(message)
        else:
            self._notice(message)

    def _push(self, request: Request, event: om.AgentEvent, size: int) -> bool:
        """Deliver an event; return whether there was room for it, or it is delivered all the same."""
        try:
            request.push(event, size)
        except SlowConsumerError as exc:
            if self._limits.overflow == "block" and request.hold(event, size, self._make_room):
                self._full.add(request)
                return True
            logger.warning("request %s failed: its consumer is slow (Limits.%s)", request.lane, exc.limit)
            self._fail_request(request, exc)
            return False
        return True

    def _make_room(self, request: Request) -> None:
        self._full.remove(request)
        self._transport.heard = anyio.current_time()  # nobody listened before
        if not self._full:
            self._room.wake()

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
            self._stats.late_events += 1

    def _route_elsewhere(self, event: _Event, lane: str | None) -> None:
        """An event of no live request."""
        if lane is None and not isinstance(event, om.Error | om.Unknown):
            self._reject(ProtocolError("an event names no request"))
        elif lane is None or event.id is None:
            self._notice(event)
        elif lane not in self._tombstones:
            self._stats.unroutable_events += 1
        else:
            self._stats.late_events += 1
            if isinstance(event, om.EventEnd | om.Error):
                del self._tombstones[lane]

    def _terminate(self, request: Request, terminal: om.EventEnd | om.Error) -> None:
        if request.drained is not None:
            request.drained.set()
        elif isinstance(terminal, om.EventEnd):
            self._stats.completed += 1
            self._last_error = None
            self._settle(request, terminal, self._heard)
        else:
            self._stats.failed += 1
            self._settle(request, agent_error(terminal), self._heard)
        self._remove(request)

    def _notice(self, message: om.ServerMessage) -> None:
        if isinstance(message, om.Status) and message.id is None:
            self._owner.status = message
            if message.max_in_flight is not None:
                self._lanes.resize(self._in_flight_limit(message))
                self._owner.serve()
        elif isinstance(message, om.GracefulDisconnect) and self._retiring is None:
            logger.info("the agent announced that it will disconnect; %d requests in flight", self.in_flight)
            failure = Failure(1001, message.reason, graceful=True)
            self.retire(failure)
            if self._failure is None and message.deadline is not None:
                self._start(self._leave_at_deadline, message.deadline, failure)
        elif isinstance(message, om.Error):
            self._last_error = message
        if self._owner.on_notice is not None:
            try:
                self._owner.on_notice(message)
            except anyio.get_cancelled_exc_class() as exc:  # of a task that it has asked for its result
                self._owner.crashed(exc)
                raise

    def _reject(self, exc: ProtocolError) -> None:
        """An invalid message fails its request, if it can be told whose it is; else everything."""
        request = None if exc.request_id is None else self._requests.get(exc.request_id)
        if request is not None and request.phase != "not_sent":
            if request.settled:
                self._stats.late_events += 1
            else:
                self._fail_request(request, exc)
        elif exc.request_id in self._tombstones:
            self._stats.late_events += 1
        else:
            exc.__traceback__ = None  # which would keep this session and what it has read
            failure = Failure(exc.close_code, exc.reason, violation=exc, cause=exc.__cause__)
            self._fail(failure, exc.close_code)

    # Ending requests

    def _fail_request(self, request: Request, error: Exception) -> None:
        self._stats.failed += 1
        self._stop(request, error)

    def _stop(self, request: Request, error: Exception | None) -> None:
        """Settle a request that the agent has not ended, and see to its lane."""
        self._tell_to_stop(request)
        self._settle(request, error, anyio.current_time())
        if request.phase == "not_sent":
            self._remove(request)
        elif self._can_cancel and self._dialect.lanes is None:
            self._bury(request)
        else:
            request.drained = anyio.Event()
            self._start(self._drain, request, request.drained)

    def _settle(self, request: Request, outcome: om.EventEnd | Exception | None, now: float) -> None:
        request.settle(outcome, now)
        self._withdraw_queued(request)

    def _withdraw_queued(self, request: Request) -> None:
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
        if self._retiring is not None and not self._requests:
            self._fail(self._retiring)
        self._owner.serve()

    def _serve(self) -> None:
        if self.accepting:  # else those who wait would overtake those who are about to be given back
            self._owner.serve()

    def _give_back(self, failure: Failure) -> None:
        """Part with the requests of which nothing was written: to another session, if there may be one."""
        unsent = [
            request
            for request in self._requests.values()
            if request.phase == "not_sent" and not request.settled
        ]
        movable = {request: None for request in unsent if len(request.queued) == 1}  # no tool result behind
        for request in unsent:
            del self._requests[request.lane]
            self._lanes.release(request.lane)
            self._withdraw_queued(request)
        taken = movable if self._owner.take_back(movable) else {}
        for request in unsent:
            if request not in taken:
                self._stats.failed += request.claimed
                error = failure.for_request("not_sent") if request.claimed else failure.for_newcomer()
                request.settle(error, anyio.current_time())

    # Ending the connection

    def _refuse(self, failure: Failure) -> None:
        if self.accepting:
            self.accepting = False
            self._owner.unavailable(self, failure)

    def _fail(self, failure: Failure, close_code: int = 1000) -> None:
        """Settle everything with the first failure, and start to close. Later failures change nothing."""
        if self._failure is not None:
            return
        self._failure = failure
        self._refuse(failure)
        self._give_back(failure)
        requests, self._requests = self._requests, {}
        for request in requests.values():
            if not request.settled:
                self._stats.failed += 1
                self._settle(request, failure.for_request(request.phase), anyio.current_time())
        self._owner.serve()  # the limit of all connections together has room for others now
        self._start_closing(close_code)

    def _start_closing(self, code: int = 1000) -> None:
        if not self._closing:
            self._closing = True
            self._start(self._close_transport, code)

    def _in_flight_limit(self, status: om.Status) -> int:
        if status.max_in_flight is None:
            return self._limits.in_flight
        return min(self._limits.in_flight, status.max_in_flight)
