"""`open_agent`: the order of start and teardown, and one exception out."""

from __future__ import annotations

import inspect
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import anyio

from . import _transports, om
from ._agent import Agent
from ._establish import establish
from ._supervisor import Supervisor
from ._target import Target
from .config import Heartbeat, Limits, Timeouts
from .dialects import by_name
from .errors import AnyAgentError, ConnectError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable

    from anyio.abc import TaskGroup

    from ._establish import Connect, Established
    from ._target import HeadersLike
    from ._transports import Transport
    from .config import Backoff
    from .dialects import Dialect

    OnNotice: TypeAlias = Callable[[om.ServerMessage], object]
    OnReconnect: TypeAlias = Callable[[AnyAgentError | None], Awaitable[HeadersLike | None]]
    Renew: TypeAlias = Callable[[AnyAgentError | None], Awaitable[None]]

__all__ = ["Endpoint", "open_agent", "run_agent"]


@asynccontextmanager
async def open_agent(
    url: str,
    *,
    dialect: Dialect | str | None = None,
    headers: HeadersLike | None = None,
    ssl_context: ssl.SSLContext | None = None,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    timeouts: Timeouts = Timeouts(),  # noqa: B008
    heartbeat: Heartbeat | None = Heartbeat(),  # noqa: B008
    reconnect: Backoff | None = None,
    on_reconnect: OnReconnect | None = None,
    on_notice: OnNotice | None = None,
) -> AsyncIterator[Agent]:
    """Connect to the agent at `url`; an async context manager that gives an `Agent`.

    * `url`: ``ws://`` or ``wss://``, with an optional path, query, and userinfo (sent as HTTP Basic).
    * `dialect`: ``"native"``, ``"single"`` or a `Dialect`; by default the agent's first status decides.
    * `headers`: a mapping or pairs, sent with the handshake.
    * `ssl_context`: for ``wss://``; by default `ssl.create_default_context`, which verifies.
    * `limits`, `timeouts`, `heartbeat`: see `Limits`, `Timeouts`, `Heartbeat`; ``heartbeat=None`` sends none.
    * `reconnect`: with a `Backoff`, a lost connection is replaced; by default it is not.
    * `on_reconnect`: an async function that is awaited before each further connection is opened, for
      ``timeouts.connect`` at most. It is given the error that made it necessary (``None``: none did), and
      returns new headers (a fresh token) in place of the present ones, or ``None``. A `ConnectError` or
      `TimeoutError` in it is a failed attempt; any other exception ends the block, and comes out of it as
      itself.
    * `on_notice`: called, in order, with every message behind the first status that belongs to no request.
      It runs on the receiver, so it must not block. An exception in it ends the block, and comes out of it
      as itself.

    Raises `ConnectError` if no connection comes about within ``timeouts.connect``, `ValueError` for a bad
    URL, header or dialect before anything is sent. No redirect is followed, no compression offered, no
    proxy used.

    When the block is left, for whatever reason, requests still in flight are cancelled, the agent is told
    so, and the connection is closed with a close handshake, all within ``timeouts.close``; cancellation
    does not cut that short. What comes out is the block's own exception, as itself, never wrapped in an
    `ExceptionGroup`.

    A lost connection does not end the block: it fails the requests in flight, and later ones, with
    `Disconnected`. With `reconnect`, requests whose message was not yet begun to be written, and later ones,
    wait for the next connection instead, as long as their callers let them. A message whose writing has begun
    is never sent a second time: its request fails with `Disconnected`, whose `phase` tells how far it came.
    After an ``OM.GracefulDisconnect`` new requests go to another connection, while the others run to their
    end on the old one.
    """
    endpoint = Endpoint(url, headers, ssl_context, limits.message_size, on_reconnect)
    async with run_agent(
        endpoint.connect,
        dialect=dialect,
        limits=limits,
        timeouts=timeouts,
        heartbeat=heartbeat,
        reconnect=reconnect,
        renew=endpoint.renew,
        on_notice=on_notice,
        address=endpoint.address,
    ) as agent:
        yield agent


class Endpoint:
    """Where an agent is, and with which headers to connect to it. Raises `ValueError`."""

    def __init__(
        self,
        url: str,
        headers: HeadersLike | None,
        ssl_context: ssl.SSLContext | None,
        message_size: int,
        on_reconnect: OnReconnect | None,
    ) -> None:
        self._url = url
        self._target = Target.parse(url, headers, ssl_context)
        self._message_size = message_size
        self._on_reconnect = on_reconnect

    @property
    def address(self) -> tuple[str, int]:
        return self._target.host, self._target.port

    async def connect(self, task_group: TaskGroup) -> Transport:
        return await _transports.connect(self._target, self._message_size, task_group)

    async def renew(self, cause: AnyAgentError | None) -> None:
        """Let the application renew the headers."""
        if self._on_reconnect is not None:
            headers = await self._on_reconnect(cause)
            if headers is not None:
                self._target = Target.parse(self._url, headers, self._target.ssl_context)


@asynccontextmanager
async def run_agent(
    connect: Connect,
    *,
    dialect: Dialect | str | None,
    limits: Limits,
    timeouts: Timeouts,
    heartbeat: Heartbeat | None,
    reconnect: Backoff | None = None,
    renew: Renew | None = None,
    on_notice: OnNotice | None,
    address: tuple[str, int] = ("memory", 0),
    connections: int = 1,
    max_age: float | None = None,
) -> AsyncIterator[Agent]:
    """`open_agent` and `open_pool` over whatever transports `connect` makes."""
    if inspect.iscoroutinefunction(on_notice):
        raise TypeError("on_notice must be a plain function: it is called on the receiver, not awaited")
    chosen = by_name(dialect) if isinstance(dialect, str) else dialect

    async def establish_again(task_group: TaskGroup, cause: AnyAgentError | None) -> Established:
        if renew is not None:
            try:
                with anyio.fail_after(timeouts.connect):
                    await renew(cause)
            except TimeoutError as exc:
                raise ConnectError(f"no new headers within {timeouts.connect:g} s") from exc
        return await establish(connect, task_group, chosen, timeouts)

    supervisor: Supervisor | None = None
    outcome: BaseException | None = None
    crash: BaseException | None = None
    try:
        async with anyio.create_task_group() as task_group:
            # The block's exception must not pass through the task group, which would wrap it.
            try:
                supervisor = Supervisor(
                    establish_again,
                    await establish(connect, task_group, chosen, timeouts),
                    address=address,
                    limits=limits,
                    timeouts=timeouts,
                    heartbeat=heartbeat,
                    backoff=reconnect,
                    connections=connections,
                    max_age=max_age,
                    on_notice=on_notice,
                )
                block = anyio.CancelScope()
                supervisor.on_crash = block.cancel
                task_group.start_soon(supervisor.run)
                await supervisor.started()
                with block:
                    yield Agent(supervisor)
            except BaseException as exc:
                outcome = exc
            if supervisor is not None:
                await supervisor.aclose()
    except BaseException as exc:
        crash = _without_group(exc)
    if supervisor is not None and supervisor.crash is not None:
        crash = supervisor.crash
    if crash is not None and _gives_way(outcome, crash):
        outcome = crash
    try:
        if outcome is not None:
            raise outcome
    finally:
        del outcome, crash, supervisor  # an exception must not refer to a frame that refers to it


def _gives_way(outcome: BaseException | None, crash: BaseException) -> bool:
    """Whether `crash`, which came from one of our tasks, comes out instead of the block's own `outcome`."""
    cancelled = anyio.get_cancelled_exc_class()
    if outcome is None or isinstance(outcome, (AnyAgentError, cancelled)):
        return True
    return isinstance(outcome, Exception) and not isinstance(crash, (Exception, cancelled))


def _without_group(exc: BaseException) -> BaseException:
    """`exc`, or the Ctrl-C or exit request somewhere in it."""
    urgent = exc.subgroup((KeyboardInterrupt, SystemExit)) if isinstance(exc, BaseExceptionGroup) else None
    leaf: BaseException | None = urgent
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return exc if leaf is None else leaf
