"""A place for one observer of every request, such as `anyagent.otel`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._request import ResponseStats
    from .om import EventEnd

__all__ = ["ObservedRequest", "Observer", "RequestOutcome", "observer"]


class ObservedRequest(msgspec.Struct, frozen=True):
    """A request that is being made: of which agent, in which conversation."""

    host: str
    port: int
    conversation: str | None


class RequestOutcome(msgspec.Struct, frozen=True):
    """How a request ended: with `end`, with `error`, or with neither if its caller left it.

    `started` is when it was made, in seconds of `anyio.current_time`, as the times in `stats` are.
    """

    end: EventEnd | None
    error: Exception | None
    started: float
    stats: ResponseStats


Observer: TypeAlias = "Callable[[ObservedRequest], Callable[[RequestOutcome], object]]"
"""Called in the task that makes a request; what it returns is called once, wherever the request ends."""

observer: Observer | None = None
