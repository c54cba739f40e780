"""The wire without ids: one request at a time, and everything that arrives belongs to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from .. import im, om
from ..errors import ProtocolError
from ._base import Dialect

if TYPE_CHECKING:
    from ..im import ClientMessage
    from ..om import AgentEvent, ServerMessage

__all__ = ["SINGLE", "SingleDialect"]

_LANE = ""


class SingleDialect(Dialect):
    """One anonymous lane; no id and no ``CANCEL`` is ever written."""

    name = "single"
    lanes = (_LANE,)

    def encode(self, message: ClientMessage) -> bytes:
        return im.encode(msgspec.structs.replace(message, id=None))

    def decode(self, data: bytes | memoryview) -> ServerMessage:
        try:
            return om.decode(data)
        except ProtocolError as exc:
            # An id means nothing on this wire, so it cannot tell whose message this was.
            raise ProtocolError(exc.reason, close_code=exc.close_code) from exc

    def lane_of(self, event: AgentEvent) -> str | None:
        return None if isinstance(event, om.Unknown) else _LANE


SINGLE = SingleDialect()
