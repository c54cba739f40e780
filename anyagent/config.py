"""Settings of `open_agent`: small immutable values, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeAlias

__all__ = ["Backoff", "Heartbeat", "Limits", "Overflow", "Timeouts"]

Overflow: TypeAlias = Literal["fail", "block"]
"""What happens at a limit of a response's buffer; see `Limits`."""


def check_positive_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive, finite number of seconds, not {value!r}")


def check_positive_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an agent may hold. Every number is a positive integer, else `ValueError`.

    * `in_flight` (requests, default 1,000): how many requests may be in flight at once, on all connections
      together; where the agent allows fewer on one, its own limit holds there. Further requests wait their
      turn, first come, first served.
    * `message_size` (bytes, default 16 MiB): the largest message that is accepted. A larger one fails the
      connection with close code 1009 (RFC 6455, section 7.4.1).
    * `response_events` (events, default 65,536, more than come with one read): how many events of one
      response may wait to be read, behind the batch that is being read. Adjacent text chunks are joined
      before this limit counts; no text is lost.
    * `response_bytes` (bytes of JSON, default 16 MiB): the same, in bytes as received. With `ask` and
      `collect`, which are woken at the end only, it bounds the whole answer.

    * `overflow` (``"fail"`` or ``"block"``, default ``"fail"``): what happens when a response reaches one of
      those two. ``"fail"``: that response fails with `SlowConsumerError`, and no other is affected.
      ``"block"``: nothing more is read from its connection until it has been read, beyond the limit by what
      had arrived with it (at most 1 MiB). That holds up every other response of the connection, its errors
      and its end, and answers to the agent's pings, so that the agent may take the client for dead; the
      heartbeat rests meanwhile. A consumer that waits for another response of the connection waits for ever.
      ``"block"`` does not apply to `ask` and `collect`, which read nothing before the end.

    Bounded as well, without a setting: what the agent answers to the handshake (64 KiB, of a rejection
    nothing behind the status line), the fragments of a message (131,072), what waits to be written (requests
    wait once it is 1 MiB) and what is remembered of requests that were left (4,096 ids).
    """

    in_flight: int = 1_000
    message_size: int = 16 * 2**20
    response_events: int = 65_536
    response_bytes: int = 16 * 2**20
    overflow: Overflow = "fail"

    def __post_init__(self) -> None:
        for name in ("in_flight", "message_size", "response_events", "response_bytes"):
            check_positive_integer(f"Limits.{name}", getattr(self, name))
        if self.overflow not in ("fail", "block"):
            raise ValueError(f"Limits.overflow must be 'fail' or 'block', not {self.overflow!r}")


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
            check_positive_number(f"Timeouts.{field.name}", getattr(self, field.name))


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
            check_positive_number(f"Heartbeat.{field.name}", getattr(self, field.name))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """How a lost connection is replaced. A wrong value is a `ValueError`; times are positive and finite.

    Before the n-th attempt in a row, a random time between 0 and the smaller of `maximum` and
    ``initial * 2 ** (n - 1)`` is waited, so that many clients do not come back all at once ("full jitter").

    * `initial` (seconds, default 0.5).
    * `maximum` (seconds, default 30).
    * `attempts` (default ``None``, no limit): after so many in a row the agent is given up, and requests fail
      with `Disconnected`. A connection that is lost again before it was `healthy` counts as an attempt.
    * `healthy` (seconds, default 30): a connection that has lasted for this long ends the row.
    """

    initial: float = 0.5
    maximum: float = 30
    attempts: int | None = None
    healthy: float = 30

    def __post_init__(self) -> None:
        for name in ("initial", "maximum", "healthy"):
            check_positive_number(f"Backoff.{name}", getattr(self, name))
        if self.attempts is not None:
            check_positive_integer("Backoff.attempts", self.attempts)

    def bound(self, number: int) -> float:
        """The longest time, in seconds, that is waited before attempt `number`, counted from 1."""
        return min(self.maximum, self.initial * 2.0 ** min(number - 1, 64))
