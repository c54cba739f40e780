"""The connections of one agent: opened, replaced, retired, closed."""

from __future__ import annotations

import math
import random
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio

from . import _transports
from ._dispatcher import Dispatcher
from ._failure import LEFT, Failure
from ._log import logger
from ._session import Session
from ._stats import AgentStats
from .errors import ConnectError, Disconnected

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from anyio.abc import TaskGroup

    from . import im, om
    from ._request import Request
    from ._transports import Transport
    from .config import Backoff, Heartbeat, Limits, Timeouts
    from .dialects import Dialect
    from .errors import AnyAgentError

    Established: TypeAlias = tuple[Transport, Dialect, om.Status, list[bytes]]
    Establish: TypeAlias = Callable[[TaskGroup, AnyAgentError | None], Awaitable[Established]]

__all__ = ["Supervisor"]

_EXPIRED: Final = Failure(1000, "the connection has reached its maximum age")


class Supervisor:
    """Holds sessions, at most `connections` of them for new requests, and hands requests to them.

    `establish` connects another time; it is given the failure that made it necessary, if one did. Without a
    `backoff` there is no other time. A connection is opened when every other one has something to do, and
    before one that is older than `max_age` seconds is retired.

    `run` is one task that holds all others; it is shielded, and ends after `aclose`. What is no connection's
    fault (an exception in a callback, Ctrl-C in one of the tasks) is kept in `crash`, and `on_crash` is
    called.
    """

    def __init__(
        self,
        establish: Establish,
        first: Established,
        *,
        address: tuple[str, int],
        limits: Limits,
        timeouts: Timeouts,
        heartbeat: Heartbeat | None,
        backoff: Backoff | None,
        connections: int,
        max_age: float | None,
        on_notice: Callable[[om.ServerMessage], object] | None,
    ) -> None:
        self.stats = AgentStats()
        self.status = first[2]
        self.on_notice = on_notice
        self.crash: BaseException | None = None
        self.on_crash: Callable[[], object] = lambda: None
        self.new_waker = _transports.waker_factory()
        self._run_soon = _transports.thread_scheduler()
        self._establish = establish
        self._limits = limits
        self._timeouts = timeouts
        self._heartbeat = heartbeat
        self._backoff = backoff
        self._connections = connections
        self._max_age = max_age
        self._address = address
        self._sessions: list[Session] = []
        self._dispatcher = Dispatcher(self._sessions, limits, self.stats, self.new_waker, address)
        self._failures = 0  # in a row: connections lost before they were healthy, and attempts in vain
        self._cause: AnyAgentError | None = None  # the newest of these
        self._first = first
        self._wake_keeper = self.new_waker()
        self._abandoned: deque[Request] = deque()
        self._wake_reaper = anyio.Event()
        self._running = anyio.Event()
        self._leaving = anyio.Event()
        self._ended = anyio.Event()
        self._tasks: TaskGroup

    # What Agent and Response call

    @property
    def in_flight(self) -> int:
        return self._dispatcher.in_flight

    async def open_request(self, message: im.UserMessage) -> Request:
        """Wait for a lane of a connection; then the message is queued. Cancelled: nothing is sent."""
        return await self._dispatcher.open_request(message)

    async def send_tool_result(self, request: Request, call_id: str, output: str) -> None:
        """Queue a result and wait until the writer has taken it. Cancelled before that: it is not sent."""
        if request.connection is not None:
            await request.connection.send_tool_result(request, call_id, output)
        elif request.settled:
            raise request.error or anyio.ClosedResourceError
        else:
            raise Disconnected(1006, "the request waits for a new connection")

    def leave(self, request: Request) -> None:
        """The consumer of `request` leaves; the agent is told if it is still busy with it."""
        self._dispatcher.leave(request)

    def abandon(self, request: Request) -> None:
        """As `leave`, but from a finalizer: any thread, and in the middle of anything."""
        if request.settled:
            request.discard()
        else:
            self._abandoned.append(request)
            self._run_soon(lambda: self._wake_reaper.set())

    # Lifetime

    async def started(self) -> None:
        """Wait until `run` has got under way, which takes a moment and is not cancelled."""
        with anyio.CancelScope(shield=True):
            await self._running.wait()

    async def run(self) -> None:
        """Hold everything until `aclose`; then close every connection with a handshake, and end all tasks."""
        try:
            with anyio.CancelScope(shield=True) as scope:
                async with anyio.create_task_group() as self._tasks:
                    self._running.set()
                    self._start(self._tasks, self._reap)
                    self._add(self._first)
                    async with anyio.create_task_group() as keeping:
                        if self._backoff is not None:
                            self._dispatcher.on_demand = self._look_after
                            self._start(keeping, partial(self._keep, self._backoff))
                        await self._leaving.wait()
                        keeping.cancel_scope.cancel()
                    async with anyio.create_task_group() as closing:
                        for session in self._sessions:
                            closing.start_soon(session.aclose)
                    scope.cancel()
        finally:
            self._dispatcher.close(LEFT.for_newcomer)  # where asyncio cancels all tasks at its end
            self._ended.set()

    async def aclose(self) -> None:
        """Take no more requests, and wait for the end of `run`, which takes ``Timeouts.close`` at most.

        Cancelled (which takes asyncio's own kind of cancellation), `run` still comes to its end.
        """
        self._dispatcher.close(LEFT.for_newcomer)
        self._leaving.set()
        if self._running.is_set():
            with anyio.CancelScope(shield=True):
                await self._ended.wait()

    # What sessions call

    def serve(self) -> None:
        self._dispatcher.serve()

    def unavailable(self, session: Session, failure: Failure) -> None:
        if self._backoff is None:
            self._dispatcher.close(failure.for_newcomer)
        if failure is LEFT or failure is _EXPIRED or self.crash is not None:
            return
        if not failure.graceful:
            logger.warning("connection to %s:%d lost (code %d)", *self._address, failure.code)
        self._note(failure.for_newcomer())
        if self._backoff is not None and anyio.current_time() - session.opened >= self._backoff.healthy:
            self._failures = 0 if failure.graceful else 1
        self._look_after()

    def take_back(self, requests: Iterable[Request]) -> bool:
        if not self._dispatcher.take_back(requests):
            return False
        self.serve()
        return True

    def crashed(self, exc: BaseException) -> None:
        if self.crash is None or (isinstance(self.crash, Exception) and not isinstance(exc, Exception)):
            self.crash = exc
        self.on_crash()  # first, so that who waits is cancelled, and gets no `Disconnected` to raise instead
        self._dispatcher.close(Failure(1011, "a callback failed", cause=exc).for_newcomer)

    # Connections

    def _add(self, established: Established) -> None:
        session = Session(
            *established,
            limits=self._limits,
            timeouts=self._timeouts,
            heartbeat=self._heartbeat,
            owner=self,
        )
        self._sessions.append(session)
        self.stats.connections += 1
        self.stats.open_connections += 1
        logger.debug("connection to %s:%d opened", *self._address)
        self._start(self._tasks, partial(self._hold, session))

    def _note(self, failure: AnyAgentError) -> None:
        self._failures += 1
        self._cause = self.stats.last_failure = failure

    def _wanted(self) -> bool:
        """Whether another connection would take load off the others, or be the only one."""
        accepting = [session for session in self._sessions if session.accepting]
        return len(accepting) < self._connections and all(session.in_flight for session in accepting)

    def _look_after(self) -> None:
        if self._wanted():
            self._wake_keeper.wake()

    def _expiry(self) -> float:
        """When the first session is to be replaced."""
        if self._max_age is None:
            return math.inf
        opened = (session.opened for session in self._sessions if session.accepting)
        return min(opened, default=math.inf) + self._max_age

    def _retire_oldest_if_expired(self) -> None:
        if self._expiry() <= anyio.current_time():
            next(session for session in self._sessions if session.accepting).retire(_EXPIRED)

    # Tasks

    def _start(self, tasks: TaskGroup, function: Callable[[], Awaitable[None]]) -> None:
        tasks.start_soon(self._guard, function)

    async def _guard(self, function: Callable[[], Awaitable[None]]) -> None:
        try:
            await function()
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as exc:
            self.crashed(exc)

    async def _hold(self, session: Session) -> None:
        await session.run()
        self._sessions.remove(session)
        self.stats.open_connections -= 1
        logger.debug("connection to %s:%d closed", *self._address)

    async def _reap(self) -> None:
        """Leave the requests that were abandoned."""
        while True:
            await self._wake_reaper.wait()
            self._wake_reaper = anyio.Event()
            while self._abandoned:
                self.leave(self._abandoned.popleft())

    async def _keep(self, backoff: Backoff) -> None:
        """Open connections where they are wanted."""
        while True:
            # Points in time, not differences, which can round to no time at all.
            expired = self._expiry() <= anyio.current_time()
            if not self._wanted() and not expired:
                with anyio.CancelScope(deadline=self._expiry()):
                    await self._wake_keeper.wait()
            elif self._failures and not await self._pause(backoff):
                return
            elif self._wanted() or expired:
                await self._open()

    async def _pause(self, backoff: Backoff) -> bool:
        """Wait before the next attempt; false: there are to be no more."""
        if self._cause is None and anyio.current_time() - self._sessions[-1].opened >= backoff.healthy:
            self._failures = 0
            return True
        alone = not any(session.accepting for session in self._sessions)
        if alone and backoff.attempts is not None and self._failures > backoff.attempts:
            logger.error("no connection to %s:%d after %d attempts", *self._address, backoff.attempts)
            reason = f"no connection in {backoff.attempts} attempts"
            self._dispatcher.close(Failure(1006, reason, cause=self._cause).for_newcomer)
            return False
        wait = self.stats.reconnect_wait = random.uniform(0, backoff.bound(self._failures))
        await anyio.sleep(wait)
        return True

    async def _open(self) -> None:
        cause = self._cause
        if cause is not None:
            self.stats.reconnect_attempts += 1
        try:
            established = await self._establish(self._tasks, cause)
        except ConnectError as exc:
            logger.warning("could not connect to %s:%d again", *self._address)
            self._note(ConnectError(exc.reason, status_code=exc.status_code))  # which refers to no frame
            return
        except anyio.get_cancelled_exc_class() as exc:
            if not self._leaving.is_set():  # `on_reconnect` has awaited a task that was cancelled
                self.crashed(exc)
            raise
        if self._cause is cause:
            self._cause = None
        self.status = established[2]
        self._add(established)
        if cause is not None:
            self.stats.reconnects += 1
            logger.info("connection to %s:%d replaced", *self._address)
        self._retire_oldest_if_expired()
        self.serve()
