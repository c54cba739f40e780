"""The wire, as the routers share it: the same structs and the same decoder as anyagent's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec

from anyagent import IM, OM

__all__ = ["MESSAGE_SIZE", "Collected", "Routed", "cancel", "decode", "end_of", "user_message"]

MESSAGE_SIZE: Final = 16 * 1024 * 1024
"""The largest message, in bytes, where a library wants to know: anyagent's default."""

Routed: TypeAlias = OM.Status | OM.EventTextChunk | OM.EventEnd | OM.Error
"""The messages that have to do with a request, and the status; `decode` refuses all others."""

decode: Final = msgspec.json.Decoder(Routed).decode


@dataclass(frozen=True, slots=True)
class Collected:
    """A whole answer."""

    text: str


def user_message(text: str, request_id: str) -> str:
    return IM.encode(IM.UserMessage(text=text, id=request_id)).decode()


def cancel(request_id: str) -> str:
    return IM.encode(IM.Cancel(request_id)).decode()


def end_of(last: Routed | None) -> Exception:
    """What ends an iteration when `last` came instead of a chunk; None stands for a lost connection."""
    match last:
        case OM.EventEnd():
            return StopAsyncIteration()
        case OM.Error(code=code, details=details):
            return RuntimeError(f"the agent failed: {code}: {details}")
        case None:
            return ConnectionError("the connection was lost")
        case _:
            return RuntimeError(f"not a part of an answer: {last!r}")
