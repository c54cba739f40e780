"""Messages into the agent: what a client sends.

`decode` is for the agent's side, `anyagent.testing` among them. All structs are immutable, and their
``repr`` shows no prompt, metadata or tool output.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import msgspec

from .errors import ProtocolError

__all__ = ["Cancel", "ClientMessage", "ToolResult", "UserMessage", "decode", "encode"]


class _Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """What all messages into the agent share: defaults left out on the wire, a ``repr`` without content."""

    id: str | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r}, ...)"

    def __rich_repr__(self) -> Any:  # what msgspec's own method returns; rich would show every field with it
        yield "id", self.id


class UserMessage(_Message, frozen=True, kw_only=True, tag="USER_MESSAGE"):
    """A prompt: opens a request.

    * `id` tells the request apart; only agents with the feature ``"ids"`` are sent one.
    * `conversation` names the conversation that the prompt continues, where the agent keeps them.
    * `metadata` is any JSON object, for the agent to interpret.
    """

    text: str
    conversation: str | None = None
    metadata: dict[str, Any] | None = None  # Any: JSON, whose types msgspec checks when it encodes


class Cancel(_Message, frozen=True, tag="CANCEL"):
    """Nobody waits for request `id` any more."""


class ToolResult(_Message, frozen=True, kw_only=True, tag="TOOL_RESULT"):
    """The outcome of the tool call `call_id` of request `id`, as text."""

    call_id: str
    output: str


ClientMessage: TypeAlias = UserMessage | Cancel | ToolResult
"""Everything that a client sends."""

_decoder: Final[msgspec.json.Decoder[ClientMessage]] = msgspec.json.Decoder(ClientMessage)
_encoder: Final = msgspec.json.Encoder()


def encode(message: ClientMessage) -> bytes:
    """Encode one message as JSON text (UTF-8); defaults are left out.

    Raises `ValueError` for text that is not Unicode (a lone surrogate) and `TypeError` for metadata that
    is not JSON.
    """
    try:
        return _encoder.encode(message)
    except UnicodeEncodeError:
        problem = "holds a lone surrogate, which UTF-8 cannot encode"
    except RecursionError:
        problem = "is nested too deeply, or contains itself"
    # Raised out here: the original holds the whole text, and would become the __context__.
    raise ValueError(f"the message {problem}")


def decode(data: str | bytes | memoryview) -> ClientMessage:
    """Decode one message into the agent from its JSON text; raises `ProtocolError` for anything else."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as exc:
        problem = type(exc).__name__
    # Raised out here: the original may hold the whole message, and would become the __context__.
    raise ProtocolError(f"not a message of a client ({problem})")
