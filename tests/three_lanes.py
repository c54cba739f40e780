"""A dialect that is not built in: the wire has three lanes, and names them in a field of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec

from anyagent import IM, OM, ProtocolError
from anyagent.dialects import Dialect

if TYPE_CHECKING:
    from anyagent.im import ClientMessage
    from anyagent.om import AgentEvent, ServerMessage

__all__ = ["ThreeLanes"]


class _Lane(msgspec.Struct):
    lane: str | None = None


class ThreeLanes(Dialect):
    """Messages name one of the lanes "A", "B" and "C" in the field ``lane``, and have no ``id``."""

    name = "three lanes"
    lanes: ClassVar[tuple[str, ...]] = ("A", "B", "C")

    def encode(self, message: ClientMessage) -> bytes:
        fields = msgspec.json.decode(IM.encode(message))
        fields["lane"] = fields.pop("id")
        return msgspec.json.encode(fields)

    def decode(self, data: bytes | memoryview) -> ServerMessage:
        try:
            message = OM.decode(data)
        except ProtocolError as exc:
            raise ProtocolError(exc.reason, request_id=_lane(data), close_code=exc.close_code) from exc
        if isinstance(message, OM.GracefulDisconnect):
            return message
        return msgspec.structs.replace(message, id=_lane(data))

    def lane_of(self, event: AgentEvent) -> str | None:
        return event.id


def _lane(data: bytes | memoryview) -> str | None:
    try:
        return msgspec.json.decode(data, type=_Lane).lane
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
