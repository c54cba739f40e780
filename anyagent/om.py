"""Messages out of the agent: what an agent sends.

`decode` turns one JSON text message into one of the structs below, told apart by ``type``. Unknown
fields are ignored; an unknown ``type`` becomes an `Unknown`. All structs are immutable.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Final, TypeAlias

import msgspec

from .errors import ProtocolError

__all__ = [
    "AgentEvent",
    "Error",
    "EventEnd",
    "EventReasoningChunk",
    "EventTextChunk",
    "EventToolCall",
    "GracefulDisconnect",
    "ServerMessage",
    "Status",
    "Unknown",
    "decode",
    "encode",
]


class _Message(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What all messages out of the agent share: a tag, and defaults left out on the wire."""


class Status(_Message, frozen=True, tag="STATUS"):
    """The agent's state; the first message of every connection.

    * `features` of the first one settle the dialect: ``"ids"`` (requests may carry an id, and the agent
      echoes it) and ``"cancel"`` (the agent understands ``IM.Cancel``).
    * `max_in_flight`: how many requests the agent takes at once, at least 1.
    * `session`: the agent's name for this connection.
    * `id`: the request that this status speaks of, if it speaks of one.
    """

    state: str
    features: tuple[str, ...] = ()
    max_in_flight: Annotated[int, msgspec.Meta(ge=1)] | None = None
    session: str | None = None
    id: str | None = None


class AgentEvent(_Message, frozen=True, kw_only=True, gc=False):
    """Base of everything that may belong to a request: `id` says to which, `seq` numbers its events."""

    id: str | None = None
    seq: int | None = None


class EventTextChunk(AgentEvent, frozen=True, gc=False, tag="AGENT_EVENT_TEXT_CHUNK"):
    """A piece of the answer."""

    text: str


class EventReasoningChunk(AgentEvent, frozen=True, gc=False, tag="AGENT_EVENT_REASONING_CHUNK"):
    """A piece of the agent's reasoning."""

    text: str


class EventToolCall(AgentEvent, frozen=True, gc=False, tag="AGENT_EVENT_TOOL_CALL"):
    """The agent asks for a tool to be run; answer with `Response.send_tool_result`.

    `arguments` is JSON text, as the agent wrote it and not checked here.
    """

    call_id: str
    name: str
    arguments: str


class EventEnd(AgentEvent, frozen=True, gc=False, tag="AGENT_EVENT_END"):
    """The end of an answer. `status` is ``"completed"``, ``"cancelled"`` or ``"incomplete"``."""

    tokens_used: int
    status: str = "completed"


class Error(AgentEvent, frozen=True, gc=False, tag="ERROR"):
    """The agent failed: one request where it can be told which, else the agent as a whole.

    `retry_after` is in seconds.
    """

    code: str | int
    details: str
    retry_after: float | None = None


class GracefulDisconnect(_Message, frozen=True, tag="GRACEFUL_DISCONNECT"):
    """The agent is going away: it takes no new request, and closes within `deadline` seconds."""

    reason: str = ""
    deadline: float | None = None


class Unknown(AgentEvent, frozen=True):
    """A well-formed message whose ``type`` this version does not know; `raw` is its JSON text."""

    type: str
    raw: str


_KnownMessage: TypeAlias = (
    Status | EventTextChunk | EventReasoningChunk | EventToolCall | EventEnd | Error | GracefulDisconnect
)
ServerMessage: TypeAlias = _KnownMessage | Unknown
"""Everything that `decode` returns."""


class _Envelope(msgspec.Struct):
    """What can still be read of a message that is none of the known ones; the values may be of any type."""

    type: Any = None
    id: Any = None


_decoder: Final[msgspec.json.Decoder[_KnownMessage]] = msgspec.json.Decoder(_KnownMessage)
decode_known: Final = _decoder.decode
"""`decode` without its care, and faster: raises whatever msgspec does, also for an unknown ``type``."""

_envelope_decoder: Final = msgspec.json.Decoder(_Envelope)
_encoder: Final = msgspec.json.Encoder()
_known_types: Final = frozenset(
    struct.__struct_config__.tag
    for struct in (
        Status,
        EventTextChunk,
        EventReasoningChunk,
        EventToolCall,
        EventEnd,
        Error,
        GracefulDisconnect,
    )
)


def decode(data: bytes | memoryview) -> ServerMessage:
    """Decode one message out of the agent from its JSON text (UTF-8).

    Raises `ProtocolError` for whatever is not such a message; its `request_id` is the message's ``id``
    where the JSON was well-formed enough to have one.
    """
    problem: Exception
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        problem = exc
    if isinstance(problem, msgspec.ValidationError):
        try:
            envelope = _envelope_decoder.decode(data)
            text = str(data, "utf-8")
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
            problem = exc
        else:
            request_id = envelope.id if isinstance(envelope.id, str) else None
            if isinstance(envelope.type, str) and envelope.type not in _known_types:
                return Unknown(envelope.type, text, id=request_id)
            raise ProtocolError(f"a message has a wrong field: {problem}", request_id=request_id)
    # Raised without a context: the original may hold the whole message.
    raise _undecodable(data, problem)


def encode(message: ServerMessage) -> bytes:
    """Encode one message as JSON text (UTF-8), as an agent does; defaults are left out."""
    if isinstance(message, Unknown):
        return message.raw.encode()
    return _encoder.encode(message)


def _undecodable(data: bytes | memoryview, exc: Exception) -> ProtocolError:
    with contextlib.suppress(UnicodeDecodeError):
        str(data, "utf-8")
        return _malformed(exc)
    return ProtocolError("a message is not valid UTF-8", close_code=1007)


def _malformed(exc: Exception) -> ProtocolError:
    if isinstance(exc, RecursionError):
        return ProtocolError("a message is nested too deeply")
    return ProtocolError(f"a message is not one JSON object: {exc}")
