"""Settings of `open_agent`: small immutable values, checked when they are made."""

from __future__ import annotations

import dataclasses
import math

__all__ = ["Heartbeat", "Limits", "Timeouts"]


def _positive_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive, finite number of seconds, not {value!r}")


def _positive_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one connection may hold. Every field is a positive integer, else `ValueError`.

    * `in_flight` (requests, default 1,000): how many requests may be in flight at once; where the agent
      allows fewer, its own limit holds. Further requests wait their turn, first come, first served.
    * `message_size` (bytes, default 16 MiB): the largest message that is accepted. A larger one fails the
      connection with close code 1009 (RFC 6455, section 7.4.1).
    * `response_events` (events, default 65,536, more than come with one read): how many events of one
      response may wait to be read, behind the batch that is being read. Adjacent text chunks are joined
      before this limit counts; no text is lost.
    * `response_bytes` (bytes of JSON, default 16 MiB): the same, in bytes as received. With `ask` and
      `collect`, which are woken at the end only, it bounds the whole answer.

    A response that reaches one of the last two fails with `SlowConsumerError`; no other is affected.
    """

    in_flight: int = 1_000
    message_size: int = 16 * 2**20
    response_events: int = 65_536
    response_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _positive_integer(f"Limits.{field.name}", getattr(self, field.name))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """How long each step may take, in seconds. Every field is positive and finite, else `ValueError`.

    * `connect` (default 10): TCP, TLS, the WebSocket handshake and the first ``OM.Status``, all together.
    * `close` (default 5): everything that is done when `open_agent`'s block is left, all together.
    * `drain` (default 30): how long an answer that was left early may go on arriving on a wire that cannot
      be told to stop. After that the connection is closed (one lane) or the request forgotten (ids).

    How long a request may take is the caller's to say, with a cancel scope.
    """

    connect: float = 10
    close: float = 5
    drain: float = 30

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _positive_number(f"Timeouts.{field.name}", getattr(self, field.name))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """How a dead connection is noticed. Both fields are in seconds, positive and finite, else `ValueError`.

    * `interval` (default 20): a ping goes out when nothing at all has arrived for this long.
    * `timeout` (default 20): and if nothing has arrived this long after the ping, the connection is failed.
    """

    interval: float = 20
    timeout: float = 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _positive_number(f"Heartbeat.{field.name}", getattr(self, field.name))
