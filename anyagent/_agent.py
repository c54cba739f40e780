"""What a user of `open_agent` holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import im
from ._response import Reply, Response

if TYPE_CHECKING:
    from ._stats import AgentStats
    from ._supervisor import Supervisor
    from .om import Status

__all__ = ["Agent"]


class Agent:
    """An agent, connected to by `open_agent` or `open_pool`; any number of tasks may use it at once."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    @property
    def status(self) -> Status:
        """The agent's newest ``OM.Status``."""
        return self._supervisor.status

    @property
    def in_flight(self) -> int:
        """How many requests hold a lane: sent and not ended, or left early and not drained."""
        return self._supervisor.in_flight

    @property
    def stats(self) -> AgentStats:
        """The counters of all its connections, as they are now."""
        return dataclasses.replace(self._supervisor.stats)

    def __repr__(self) -> str:
        return f"<Agent {self.status.state!r}, {self.in_flight} in flight>"

    async def send_message(
        self, text: str, *, conversation: str | None = None, metadata: Mapping[str, object] | None = None
    ) -> Response:
        """Send a prompt and return the `Response` to it, without waiting for any answer.

        Waits for a free lane, first come, first served; then the message is queued for the writer.
        Cancelled while waiting: nothing was sent. With ``reconnect``, it waits for a connection, too.

        `conversation` names the conversation that the prompt continues; `metadata` is any JSON object.

        Raises `Disconnected` (phase ``"not_sent"``) if the connection is gone, `ValueError` for text that
        UTF-8 cannot encode, `TypeError` for text that is no string or metadata that is not JSON.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {type(text).__name__}")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise TypeError(f"metadata must be a mapping, not {type(metadata).__name__}")
        message = im.UserMessage(
            text=text, conversation=conversation, metadata=None if metadata is None else dict(metadata)
        )
        return Response(self._supervisor, await self._supervisor.open_request(message))

    async def ask(
        self, text: str, *, conversation: str | None = None, metadata: Mapping[str, object] | None = None
    ) -> Reply:
        """Send a prompt and return the whole answer; not for agents that call tools (see `Response.collect`).

        Takes and raises what `send_message` and `Response.collect` do. Cancelled: the request is, too.
        """
        response = await self.send_message(text, conversation=conversation, metadata=metadata)
        return await response.collect()
