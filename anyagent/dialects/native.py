"""The native wire: every request has an id of its own, which the agent echoes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._base import Dialect

if TYPE_CHECKING:
    from ..om import AgentEvent, Status

__all__ = ["NATIVE", "NativeDialect"]


class NativeDialect(Dialect):
    """Any number of requests at once; agents with the feature ``"cancel"`` are told of an early stop."""

    name = "native"
    lanes = None

    def can_cancel(self, status: Status) -> bool:
        return "cancel" in status.features

    def lane_of(self, event: AgentEvent) -> str | None:
        return event.id


NATIVE = NativeDialect()
