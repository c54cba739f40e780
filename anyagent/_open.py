"""`open_agent`: the order of start and teardown, and one exception out."""

from __future__ import annotations

import inspect
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import anyio

from . import _transports, om
from ._agent import Agent
from ._session import Session
from ._target import Target
from .config import Heartbeat, Limits, Timeouts
from .dialects import NATIVE, Dialect, by_name, for_agent
from .errors import AnyAgentError, ConnectError, ProtocolError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable

    from anyio.abc import TaskGroup

    from ._target import HeadersLike
    from ._transports import Transport

    Connect: TypeAlias = Callable[[TaskGroup], Awaitable[Transport]]
    OnNotice: TypeAlias = Callable[[om.ServerMessage], object]

__all__ = ["open_agent", "run_agent"]


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
    on_notice: OnNotice | None = None,
) -> AsyncIterator[Agent]:
    """Connect to the agent at `url`; an async context manager that gives an `Agent`.

    * `url`: ``ws://`` or ``wss://``, with an optional path, query, and userinfo (sent as HTTP Basic).
    * `dialect`: ``"native"``, ``"single"`` or a `Dialect`; by default the agent's first status decides.
    * `headers`: a mapping or pairs, sent with the handshake.
    * `ssl_context`: for ``wss://``; by default `ssl.create_default_context`, which verifies.
    * `limits`, `timeouts`, `heartbeat`: see `Limits`, `Timeouts`, `Heartbeat`; ``heartbeat=None`` sends none.
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
    `Disconnected`.
    """
    target = Target.parse(url, headers, ssl_context)
    if isinstance(dialect, str):
        dialect = by_name(dialect)

    async def connect(task_group: TaskGroup) -> Transport:
        return await _transports.connect(target, limits.message_size, task_group)

    async with run_agent(
        connect, dialect=dialect, limits=limits, timeouts=timeouts, heartbeat=heartbeat, on_notice=on_notice
    ) as agent:
        yield agent


@asynccontextmanager
async def run_agent(
    connect: Connect,
    *,
    dialect: Dialect | None,
    limits: Limits,
    timeouts: Timeouts,
    heartbeat: Heartbeat | None,
    on_notice: OnNotice | None,
) -> AsyncIterator[Agent]:
    """`open_agent` over whatever transport `connect` makes."""
    if inspect.iscoroutinefunction(on_notice):
        raise TypeError("on_notice must be a plain function: it is called on the receiver, not awaited")
    session: Session | None = None
    outcome: BaseException | None = None
    crash: BaseException | None = None
    try:
        async with anyio.create_task_group() as task_group:
            # The block's exception must not pass through the task group, which would wrap it.
            try:
                transport, chosen, status, backlog = await _establish(connect, task_group, dialect, timeouts)
                session = Session(
                    transport,
                    chosen,
                    status,
                    backlog,
                    limits=limits,
                    timeouts=timeouts,
                    heartbeat=heartbeat,
                    on_notice=on_notice,
                    run_soon=_transports.thread_scheduler(),
                    new_waker=_transports.waker_factory(),
                )
                task_group.start_soon(session.run)
                await session.running()
                with anyio.CancelScope() as block:
                    session.on_crash = block.cancel
                    yield Agent(session)
            except BaseException as exc:
                outcome = exc
            if session is not None:
                await session.aclose()
    except BaseException as exc:
        crash = _without_group(exc)
    if session is not None and session.crash is not None:
        crash = session.crash
    if crash is not None and _gives_way(outcome, crash):
        outcome = crash
    try:
        if outcome is not None:
            raise outcome
    finally:
        del outcome, crash, session  # an exception must not refer to a frame that refers to it


async def _establish(
    connect: Connect, task_group: TaskGroup, dialect: Dialect | None, timeouts: Timeouts
) -> tuple[Transport, Dialect, om.Status, list[bytes]]:
    """Connect and wait for the first status; what came right behind it is returned, too."""
    missing = "no connection"
    try:
        with anyio.fail_after(timeouts.connect):
            transport = await connect(task_group)
            missing = "no status from the agent"
            async with _closed_on_error(transport):
                batch: list[bytes] = []
                while not batch:
                    batch = await transport.receive()
                    await transport.send([])  # pongs; there is no writer yet
                first, *backlog = batch
                status = (dialect or NATIVE).decode(first)
                if not isinstance(status, om.Status):
                    raise ConnectError(f"the agent sent {type(status).__name__} first, not its Status")
                return transport, dialect or for_agent(status), status, backlog
    except TimeoutError as exc:
        raise ConnectError(f"{missing} within {timeouts.connect:g} s") from exc
    except _transports.TransportClosed as exc:
        raise ConnectError(f"the agent closed the connection before its first status: {exc}") from exc
    except anyio.BrokenResourceError as exc:
        raise ConnectError("the agent closed the connection before its first status") from exc
    except ProtocolError as exc:
        raise ConnectError(f"the agent's first message is no Status: {exc}") from exc


@asynccontextmanager
async def _closed_on_error(transport: Transport) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        with anyio.CancelScope(shield=True):
            await transport.aclose()
        raise


def _gives_way(outcome: BaseException | None, crash: BaseException) -> bool:
    """Whether `crash`, which came from one of our tasks, comes out instead of the block's own `outcome`."""
    if outcome is None or isinstance(outcome, (AnyAgentError, anyio.get_cancelled_exc_class())):
        return True
    return isinstance(outcome, Exception) and not isinstance(crash, Exception)


def _without_group(exc: BaseException) -> BaseException:
    """`exc`, or the Ctrl-C or exit request somewhere in it."""
    urgent = exc.subgroup((KeyboardInterrupt, SystemExit)) if isinstance(exc, BaseExceptionGroup) else None
    leaf: BaseException | None = urgent
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return exc if leaf is None else leaf
