"""Structured-concurrency client for AI agents that answer over a WebSocket."""

from . import im as IM
from . import om as OM
from ._agent import Agent
from ._open import open_agent
from ._pool import open_pool
from ._request import ResponseStats
from ._response import Reply, Response
from ._stats import AgentStats
from .config import Backoff, Heartbeat, Limits, Timeouts
from .errors import (
    AgentError,
    AnyAgentError,
    ConnectError,
    Disconnected,
    ProtocolError,
    SlowConsumerError,
)

__all__ = [
    "IM",
    "OM",
    "Agent",
    "AgentError",
    "AgentStats",
    "AnyAgentError",
    "Backoff",
    "ConnectError",
    "Disconnected",
    "Heartbeat",
    "Limits",
    "ProtocolError",
    "Reply",
    "Response",
    "ResponseStats",
    "SlowConsumerError",
    "Timeouts",
    "open_agent",
    "open_pool",
]
