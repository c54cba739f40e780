from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar

from .. import im, om

if TYPE_CHECKING:
    from ..im import ClientMessage
    from ..om import AgentEvent, ServerMessage, Status

__all__ = ["Dialect"]


class Dialect(abc.ABC):
    """How IM and OM structs are spelled on a wire, and its lanes. Pure: no I/O, no event loop, no state.

    Inside anyagent a client message always carries the name of its lane as its ``id``; what becomes of
    that on the wire is the dialect's to say. The defaults are the JSON of `anyagent.im` and `anyagent.om`.
    """

    name: ClassVar[str]

    lanes: ClassVar[tuple[str, ...] | None]
    """The wire's lanes by name, each used again after a terminal; ``None``: a new one for each request."""

    def can_cancel(self, status: Status) -> bool:
        """Whether the agent whose first message was `status` can be told to stop; if not, lanes drain."""
        return False

    def encode(self, message: ClientMessage) -> bytes:
        """The text message (UTF-8) for `message`; raises `ValueError` or `TypeError` if there is none."""
        return im.encode(message)

    def decode(self, data: bytes | memoryview) -> ServerMessage:
        """The message in one text message (UTF-8).

        Raises `ProtocolError` for anything else, its `request_id` the lane where that can be told.
        """
        return om.decode(data)

    @abc.abstractmethod
    def lane_of(self, event: AgentEvent) -> str | None:
        """The lane that `event` came in on; ``None`` where it names none."""
