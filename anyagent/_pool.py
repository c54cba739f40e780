"""`open_pool`: several connections behind one `Agent`."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from ._open import Endpoint, run_agent
from .config import (
    Backoff,
    Heartbeat,
    Limits,
    Timeouts,
    check_positive_integer,
    check_positive_number,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

    from ._agent import Agent
    from ._open import OnNotice, OnReconnect
    from ._target import HeadersLike
    from .dialects import Dialect

__all__ = ["open_pool"]


@asynccontextmanager
async def open_pool(
    url: str,
    *,
    connections: int = 4,
    max_age: float | None = None,
    dialect: Dialect | str | None = None,
    headers: HeadersLike | None = None,
    ssl_context: ssl.SSLContext | None = None,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    timeouts: Timeouts = Timeouts(),  # noqa: B008
    heartbeat: Heartbeat | None = Heartbeat(),  # noqa: B008
    reconnect: Backoff = Backoff(),  # noqa: B008
    on_reconnect: OnReconnect | None = None,
    on_notice: OnNotice | None = None,
) -> AsyncIterator[Agent]:
    """Connect to the agent at `url` up to `connections` times: an async context manager, gives an `Agent`.

    One connection is opened at once, and fails as that of `open_agent` does. Another one is opened when a
    request is made and every connection has some in flight. Each request goes to the connection with the
    fewest; on a wire that takes one request at a time, that makes `connections` at a time.

    * `connections` (default 4): how many take requests at most.
    * `max_age` (seconds, default ``None``, no limit): a connection that is older is replaced, and closed once
      its requests have ended.
    * `reconnect`: how long to wait before a broken connection is replaced; the others work on.

    The rest is as in `open_agent`. `Limits.in_flight` and `Timeouts.close` hold for the pool as a whole, the
    other limits for each connection or response. `Agent.status` is the newest status on any of them.
    """
    check_positive_integer("connections", connections)
    if max_age is not None:
        check_positive_number("max_age", max_age)
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
        connections=connections,
        max_age=max_age,
    ) as agent:
        yield agent
