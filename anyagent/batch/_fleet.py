"""The agents of a batch: their connections, and which of them takes the next prompt."""

from __future__ import annotations

import dataclasses
import heapq
import math
import random
from typing import TYPE_CHECKING

import anyio

from .._log import logger
from .._open import open_agent
from .._target import Target
from ..dialects import by_name, for_agent
from ..errors import ConnectError
from ._config import Adaptive, kept, label_of
from ._limit import AdaptiveLimit

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from .._agent import Agent
    from .._target import HeadersLike
    from ..errors import AnyAgentError
    from ._config import BatchConfig

    StartSoon: TypeAlias = Callable[..., object]

__all__ = ["Fleet", "Host", "Line"]


class Host:
    """One agent of the fleet, under its `url`.

    `limit` is ``None`` where the number in flight is fixed for all agents together. Of those `in_flight`, so
    many are `waiting` for their rate.
    """

    def __init__(self, url: str, headers: HeadersLike | None, limit: AdaptiveLimit | None) -> None:
        self.url = url
        self.headers = headers
        self.label = label_of(url)
        target = Target.parse(url)
        self.address = target.host, target.port
        self.limit = limit
        self.in_flight = 0
        self.waiting = 0
        self.resting: list[float] = []  # a heap: until when places are not to be used, as it was busy

    def rest(self, until: float) -> None:
        """One place of it is not to be used until then."""
        heapq.heappush(self.resting, until)

    def rested(self, now: float) -> int:
        """How many places are still not to be used."""
        while self.resting and self.resting[0] <= now:
            heapq.heappop(self.resting)
        return len(self.resting)


class Line:
    """One connection to a `host`, from before it is opened until it is closed.

    `tried` is set when it is open, or will never be; `refused` when it takes no more prompts, for the reason
    in `failure`.
    """

    def __init__(self, host: Host, cause: AnyAgentError | None) -> None:
        self.host = host
        self.cause = cause  # why the one before it ended
        self.agent: Agent
        self.multiplexed = False
        self.lanes: float = 1
        self.in_flight = 0
        self.opened: float | None = None
        self.tried = anyio.Event()
        self.failure: AnyAgentError | None = None
        self.refused = anyio.Event()
        self.idle = anyio.Event()

    def open(self, agent: Agent, lanes: int | None) -> None:
        """It is open; `lanes` as in `Dialect`."""
        self.agent = agent
        self.multiplexed = lanes is None
        self.lanes = lanes or math.inf
        self.opened = anyio.current_time()
        self.tried.set()

    @property
    def capacity(self) -> float:
        """How many prompts the agent can answer at once on this connection, by its newest status."""
        if self.multiplexed:
            self.lanes = self.agent.status.max_in_flight or self.lanes  # one that is not said stays as it was
        return self.lanes

    def refuse(self, failure: AnyAgentError) -> None:
        """It takes no more prompts."""
        self.failure = failure
        self.refused.set()
        if not self.in_flight:
            self.idle.set()


class Fleet:
    """Keeps ``config.connections`` open to each agent, and chooses among them.

    `on_change` is called when there may be room for another prompt, or none will ever be again: then
    `failure` is set. Its tasks are started with `start_soon`.
    """

    def __init__(
        self, config: BatchConfig, now: float, *, on_change: Callable[[], object], start_soon: StartSoon
    ) -> None:
        self.in_flight = 0
        self.reconnects = 0
        self.failure: ConnectError | None = None
        self._config = config
        self._on_change = on_change
        self._start_soon = start_soon
        self._fixed = None if isinstance(config.in_flight, Adaptive) else config.in_flight
        at_once = adaptive.maximum if isinstance(adaptive := config.in_flight, Adaptive) else adaptive
        self._limits = dataclasses.replace(config.limits, in_flight=at_once)
        self._lines: list[Line] = []
        self._slots = self._untried = len(config.urls) * config.connections
        self._ever_connected = False
        self._hosts = [
            Host(
                url, config.headers, AdaptiveLimit(adaptive, now) if isinstance(adaptive, Adaptive) else None
            )
            for url in config.urls
        ]

    @property
    def limit(self) -> int:
        """How many prompts may be in flight, over all agents that are connected."""
        if self._fixed is not None:
            return self._fixed
        hosts = {line.host for line in self._lines}
        return sum(host.limit.limit for host in hosts if host.limit is not None)

    def start(self) -> None:
        """Connect to all agents."""
        for host in self._hosts:
            for _ in range(self._config.connections):
                self._start_soon(self._keep, host)

    def take(self, now: float, avoided: str | None) -> Line | None:
        """A place for one more prompt, on the least loaded connection that has one.

        Those of agents that were busy of late, or have the label `avoided`, come last.
        """
        resting = sum(host.rested(now) for host in self._hosts)
        if self._fixed is not None and self.in_flight + resting >= self._fixed:
            return None
        best: Line | None = None
        least = (True, 0)
        for line in self._lines:
            host = line.host
            load = (bool(host.resting) or host.label == avoided, line.in_flight)
            if (best is None or load < least) and line.in_flight < line.capacity:
                limit = host.limit
                if limit is None or host.in_flight + len(host.resting) < limit.limit:
                    best, least = line, load
        if best is not None:
            best.in_flight += 1
            best.host.in_flight += 1
            self.in_flight += 1
        return best

    def give_back(self, line: Line) -> None:
        """The place on `line` is free again."""
        line.in_flight -= 1
        line.host.in_flight -= 1
        self.in_flight -= 1
        if line.failure is not None and not line.in_flight:
            line.idle.set()

    def refuse(self, line: Line, failure: AnyAgentError) -> None:
        """A prompt has found out that `line` takes no more of them."""
        if line.failure is None:
            self._lines.remove(line)
            line.refuse(failure)

    async def _keep(self, host: Host) -> None:
        """Have a connection to `host`, and another one when that is lost."""
        backoff = self._config.reconnect
        failures = 0
        cause: AnyAgentError | None = None
        given_up = False
        while True:
            line = Line(host, cause)
            self._start_soon(self._hold, line)
            await line.tried.wait()
            self._untried -= cause is None
            self._ever_connected |= line.opened is not None
            if given_up and line.opened is not None:
                given_up = False
                self._slots += 1
            self.reconnects += cause is not None and line.opened is not None
            await line.refused.wait()
            if line.opened is not None and anyio.current_time() >= line.opened + backoff.healthy:
                failures = 0
            failures += 1
            cause = line.failure
            assert cause is not None
            if not given_up and self._hopeless(failures):
                given_up = True  # unless it comes back while there are others
                self._slots -= 1
                tries = failures, type(cause).__name__
                logger.error("batch: %s:%d: %d failures in a row, the last: %s", *host.address, *tries)
                if not self._slots or not self._ever_connected:
                    self.failure = _given_up(cause)
                    self._on_change()
                    return
            logger.warning("batch: %s:%d: %s, connecting again", *host.address, type(cause).__name__)
            await anyio.sleep(random.uniform(0, backoff.bound(failures)))

    def _hopeless(self, failures: int) -> bool:
        attempts = self._config.reconnect.attempts
        if attempts is not None and failures > attempts:
            return True
        return not self._ever_connected and not self._untried

    async def _hold(self, line: Line) -> None:
        """Open a connection, and hold it until it takes no more prompts and none is in flight on it."""
        config, host = self._config, line.host
        try:
            if line.cause is not None:
                await self._renew(host, line.cause)
            async with open_agent(
                host.url,
                dialect=config.dialect,
                headers=host.headers,
                ssl_context=config.ssl_context_of(host.url),
                limits=self._limits,
                timeouts=config.connection_timeouts,
                heartbeat=config.heartbeat,
            ) as agent:
                dialect = by_name(config.dialect) if isinstance(config.dialect, str) else config.dialect
                lanes = (dialect or for_agent(agent.status)).lanes
                line.open(agent, None if lanes is None else len(lanes))
                self._lines.append(line)
                self._on_change()
                await line.refused.wait()
                await line.idle.wait()
        except ConnectError as exc:
            line.refuse(exc)
        finally:
            line.tried.set()

    async def _renew(self, host: Host, cause: AnyAgentError) -> None:
        """Let the application renew the headers. Raises `ConnectError` if that takes too long."""
        config = self._config
        if config.on_reconnect is None:
            return
        try:
            with anyio.fail_after(config.connection_timeouts.connect):
                headers = await config.on_reconnect(cause)
        except TimeoutError as exc:
            raise ConnectError(f"no new headers within {config.connection_timeouts.connect:g} s") from exc
        if headers is not None:
            host.headers = kept(headers)


def _given_up(cause: AnyAgentError) -> ConnectError:
    if isinstance(cause, ConnectError):
        return cause
    error = ConnectError(f"every connection was lost again: {cause}")
    error.__cause__ = cause
    return error
