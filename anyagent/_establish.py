"""From a transport to a connection with a dialect and the agent's first status."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import anyio

from . import _transports, om
from .dialects import NATIVE, Dialect, for_agent
from .errors import ConnectError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from anyio.abc import TaskGroup

    from ._transports import Transport
    from .config import Timeouts

    Connect: TypeAlias = Callable[[TaskGroup], Awaitable[Transport]]
    Established: TypeAlias = tuple[Transport, Dialect, om.Status, list[bytes]]

__all__ = ["establish"]


async def establish(
    connect: Connect, task_group: TaskGroup, dialect: Dialect | None, timeouts: Timeouts
) -> Established:
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
