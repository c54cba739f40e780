"""The counters of an agent."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import AnyAgentError

__all__ = ["AgentStats"]


@dataclasses.dataclass(slots=True)
class AgentStats:
    """Counters of one agent since it was opened, over all its connections.

    Requests:

    * `requests`: registered; each ends as one of `completed` (``OM.EventEnd``), `failed` or `cancelled`.
    * `events`: delivered to responses.
    * `late_events`: dropped, for a request that was left early.
    * `unroutable_events`: dropped, for an id that no request has (or had, as far as is remembered).
    * `buffered_events`, `buffered_bytes`: the most that has waited for the consumer of one response, to be
      held against `Limits.response_events` and `Limits.response_bytes`.

    Connections:

    * `connections`: opened. `open_connections`: open now.
    * `bytes_received`, `bytes_sent`: of the WebSocket protocol, behind the handshake.
    * `ping_round_trip`: seconds from the newest ping to what arrived next; ``None``: no ping was needed yet.
    * `reconnects`: connections that were opened in place of another one.
    * `reconnect_attempts`: how often that was tried. `reconnect_wait`: seconds waited before the newest try.
    * `last_failure`: why the newest connection that was lost was, or why the newest attempt failed.
    """

    requests: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    events: int = 0
    late_events: int = 0
    unroutable_events: int = 0
    buffered_events: int = 0
    buffered_bytes: int = 0
    connections: int = 0
    open_connections: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    ping_round_trip: float | None = None
    reconnects: int = 0
    reconnect_attempts: int = 0
    reconnect_wait: float | None = None
    last_failure: AnyAgentError | None = None
