"""One attempt to have a prompt answered: what its failure means, and when it has taken too long."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from ..errors import AgentError, AnyAgentError, Disconnected, ProtocolError
from ._config import BUSY_CODES
from ._result import ErrorRecord

if TYPE_CHECKING:
    from .._request import ResponseStats
    from ._config import AttemptTimeouts, Retry

__all__ = ["AttemptTimeout", "Failure", "NotCompleted", "deadline_of", "failure_of"]


class AttemptTimeout(Exception):
    """An attempt took longer than its `kind` of timeout allows, which is `seconds`."""

    def __init__(self, kind: str, seconds: float) -> None:
        super().__init__(kind, seconds)
        self.kind = kind
        self.seconds = seconds


class NotCompleted(Exception):
    """The agent ended an answer with another `status` than ``"completed"``; `text` is what there is of it."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(status)
        self.status = status
        self.text = text


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed, and what follows from that.

    `retry`: the prompt may be tried again, after `retry_after` seconds at least; `unseen`: no agent has seen
    it; `busy`: the agent is asked too much; `partial`: what there is of an answer.
    """

    error: ErrorRecord
    retry: bool = False
    unseen: bool = False
    busy: bool = False
    retry_after: float = 0
    partial: str = ""


def failure_of(exc: Exception, retry: Retry, *, sent: bool) -> Failure:
    """What the end of an attempt by `exc` means; `sent`: its message had begun to be written."""
    partial = exc.partial.text if isinstance(exc, AnyAgentError) and exc.partial is not None else ""
    anew = retry.safety == "idempotent" or not sent
    match exc:
        case AgentError():
            return Failure(
                ErrorRecord("AgentError", exc.code, exc.details),
                retry=exc.code in retry.codes,
                busy=exc.code in BUSY_CODES,
                retry_after=max(exc.retry_after or 0, 0),
                partial=partial,
            )
        case Disconnected():
            error = ErrorRecord("Disconnected", exc.code, str(exc))
            return Failure(error, anew, unseen=not sent, partial=partial)
        case ProtocolError():
            error = ErrorRecord("ProtocolError", exc.close_code, str(exc))
            return Failure(error, anew, unseen=not sent, partial=partial)
        case AttemptTimeout():
            details = f"longer than the timeout {exc.kind} of {exc.seconds:g} s"
            return Failure(ErrorRecord("TimeoutError", exc.kind, details), anew)
        case NotCompleted():
            details = f"the agent says that its answer is {exc.status}"
            return Failure(ErrorRecord("NotCompleted", exc.status, details), partial=exc.text)
        case AnyAgentError():
            return Failure(ErrorRecord(type(exc).__name__, None, str(exc)), partial=partial)
    # The prompt has no encoding; what the exception says may quote it.
    return Failure(ErrorRecord(type(exc).__name__, None, "the prompt cannot be sent as JSON"))


def deadline_of(
    stats: ResponseStats, begun: float, timeouts: AttemptTimeouts
) -> tuple[float, AttemptTimeout]:
    """Until when the attempt that was `begun` then may go on as it is, and what it runs into there."""
    sent = begun if stats.sent is None else stats.sent
    deadlines = []
    if timeouts.total is not None:
        deadlines.append((sent + timeouts.total, "total", timeouts.total))
    if timeouts.first_event is not None and stats.first_event is None:
        deadlines.append((sent + timeouts.first_event, "first_event", timeouts.first_event))
    if timeouts.idle is not None:
        last = sent if stats.last_event is None else stats.last_event
        deadlines.append((last + timeouts.idle, "idle", timeouts.idle))
    deadline, kind, seconds = min(deadlines, default=(math.inf, "", math.inf))
    return deadline, AttemptTimeout(kind, seconds)
