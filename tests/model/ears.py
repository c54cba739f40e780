"""What an agent hears of its client."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

if TYPE_CHECKING:
    from anyagent.testing import MemoryPeer

    from .plans import Wire

__all__ = ["Ears"]


class Ears:
    """Listens to a client whose prompts are the numbers of its requests.

    * `heard`: the messages, each as its type and the number of its request.
    * `lanes`: the lane that each request named; "" on a wire without lanes.
    """

    def __init__(self, peer: MemoryPeer, wire: Wire) -> None:
        self.heard: list[tuple[str, int]] = []
        self.lanes: dict[int, str] = {}
        self._messages = peer._from_client  # as bytes: not every wire spells them as `anyagent.im` does
        self._lane_field = wire.lane_field

    async def listen(self) -> None:
        with contextlib.suppress(anyio.EndOfStream, anyio.ClosedResourceError):
            while True:
                self._hear(msgspec.json.decode(await self._messages.receive()))

    def _hear(self, message: dict[str, Any]) -> None:
        lane = "" if self._lane_field is None else message.pop(self._lane_field)
        match message:
            case {"type": "USER_MESSAGE", "text": text, **others} if not others:
                self.lanes[int(text)] = lane
                self.heard.append(("USER_MESSAGE", int(text)))
            case {"type": "CANCEL", **others} if not others:
                (number,) = (number for number, each in self.lanes.items() if each == lane)
                self.heard.append(("CANCEL", number))
            case _:
                raise AssertionError(f"nobody sends {message}")
