"""Why a connection takes no more requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from .errors import Disconnected, ProtocolError

if TYPE_CHECKING:
    from .errors import AnyAgentError, Phase

__all__ = ["LEFT", "Failure"]


class Failure(msgspec.Struct, frozen=True):
    """What ended a connection, or will; every request gets an exception of its own."""

    code: int
    reason: str
    graceful: bool = False
    violation: ProtocolError | None = None
    cause: BaseException | None = None

    def for_request(self, phase: Phase) -> AnyAgentError:
        if self.violation is None:
            return self.for_newcomer(phase)
        error = ProtocolError(self.violation.reason, close_code=self.violation.close_code)
        error.__cause__ = self.cause
        return error

    def for_newcomer(self, phase: Phase = "not_sent") -> AnyAgentError:
        error = Disconnected(self.code, self.reason, graceful=self.graceful, phase=phase)
        error.__cause__ = self.violation or self.cause
        return error


LEFT: Final = Failure(1000, "the agent was closed")
