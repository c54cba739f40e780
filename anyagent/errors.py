"""The exceptions that anyagent raises.

::

    AnyAgentError
    ├── ConnectError        no usable connection came about
    ├── Disconnected        the connection ended before the request did
    ├── AgentError          the agent answered with an ``OM.Error``
    ├── ProtocolError       the agent sent what the dialect does not allow
    └── SlowConsumerError   a response's buffer limit was reached

Every field is stored and the message is formatted from the fields, so nothing has to be parsed back out
of a string. Deadlines raise the builtin `TimeoutError`; a wrong argument is a `ValueError`. No exception
carries a prompt, a header, or a URL's userinfo and query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ._response import Reply

__all__ = [
    "AgentError",
    "AnyAgentError",
    "ConnectError",
    "Disconnected",
    "Phase",
    "ProtocolError",
    "SlowConsumerError",
]

Phase = Literal["not_sent", "sent", "started"]
"""How far a request had come: its message not written, at least partly written, or being answered."""


class AnyAgentError(Exception):
    """Base of every error of this library.

    `partial` is the `Reply` that had arrived when `Agent.ask` or `Response.collect` failed, else ``None``.
    """

    partial: Reply | None = None

    def __reduce__(self) -> tuple[object, ...]:  # the default calls the class with `args` alone
        return _rebuild, (type(self), self.args, self.__dict__)


class ConnectError(AnyAgentError):
    """No usable connection came about.

    The host was not found or refused, TLS failed, the agent rejected the WebSocket handshake (then
    `status_code` is its HTTP status), sent no ``OM.Status`` in time, or sent something else first.
    The failure beneath, where there is one, is the ``__cause__``.
    """

    def __init__(self, reason: str, *, status_code: int | None = None) -> None:
        self.reason = reason
        self.status_code = status_code
        super().__init__(reason, status_code)

    def __str__(self) -> str:
        return self.reason if self.status_code is None else f"{self.reason} (HTTP {self.status_code})"


class Disconnected(AnyAgentError):
    """The connection ended before the request did, or there is none to send it on.

    * `code`, `reason`: of the agent's close frame (RFC 6455, section 7.4), and 1006 if the connection ended
      without one; 1000 or 1001 if it was closed from this side, or will be after a graceful disconnect.
    * `graceful`: the agent had announced it with an ``OM.GracefulDisconnect``.
    * `phase`: how far this request had come. Only ``"not_sent"`` is certain not to have reached the agent.
    """

    def __init__(
        self, code: int, reason: str = "", *, graceful: bool = False, phase: Phase = "not_sent"
    ) -> None:
        self.code = code
        self.reason = reason
        self.graceful = graceful
        self.phase = phase
        super().__init__(code, reason, graceful, phase)

    def __str__(self) -> str:
        how = "disconnected gracefully" if self.graceful else "disconnected"
        why = f": {self.reason}" if self.reason else ""
        return f"{how} (code {self.code}, request {self.phase.replace('_', ' ')}){why}"


class AgentError(AnyAgentError):
    """The agent answered with an ``OM.Error``.

    `code` and `details` are the agent's; `retry_after` is in seconds, or ``None`` where it gave none.
    """

    def __init__(self, code: str | int, details: str, *, retry_after: float | None = None) -> None:
        self.code = code
        self.details = details
        self.retry_after = retry_after
        super().__init__(code, details, retry_after)

    def __str__(self) -> str:
        later = "" if self.retry_after is None else f" (retry after {self.retry_after:g} s)"
        return f"{self.code}: {self.details}{later}"


class ProtocolError(AnyAgentError):
    """The agent sent what the dialect, or WebSocket, does not allow.

    `request_id` is the id that the offending message carried where it could still be read, and
    `close_code` the code that a connection which cannot go on after it is closed with
    (RFC 6455, section 7.4.1: 1002, or 1007 for bad UTF-8).
    """

    def __init__(self, reason: str, *, request_id: str | None = None, close_code: int = 1002) -> None:
        self.reason = reason
        self.request_id = request_id
        self.close_code = close_code
        super().__init__(reason, request_id, close_code)

    def __str__(self) -> str:
        return self.reason


class SlowConsumerError(AnyAgentError):
    """A response was not read while events came in, and reached a limit of its buffer.

    `limit` names the field of `Limits` that was reached and `value` is its setting. Only this response
    fails; the request is cancelled, and what had been buffered is delivered first.
    """

    def __init__(self, limit: str, value: int) -> None:
        self.limit = limit
        self.value = value
        super().__init__(limit, value)

    def __str__(self) -> str:
        return f"the response was not read and its buffer reached Limits.{self.limit} = {self.value}"


def _rebuild(
    error_type: type[AnyAgentError], args: tuple[object, ...], state: dict[str, object]
) -> AnyAgentError:
    error = error_type.__new__(error_type, *args)
    error.__dict__.update(state)
    return error
