"""The agent behind every Python server here.

It speaks the wire with plain `json` and imports nothing of the package, so that a mistake in the package's
own messages is not mirrored. ``node/server.mjs`` is the same agent once more.

A prompt is echoed word by word. These prompts are answered otherwise:

* ``!count N``: N chunks, ``"0 "``, ``"1 "``, and so on.
* ``!error``: an ERROR of code ``"refused"``.
* ``!close CODE``: one chunk, then the connection is closed with that code.
* ``!ping``: ten chunks with a ping before each; where the server shows its pongs, the end waits for all ten.

On the wire ``native`` many answers are spoken at once, their chunks in random order; on ``single`` one after
another. Whatever a client may not send on its wire closes the connection with code 1002.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
import random
import re
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

__all__ = ["WIRES", "GoneError", "Link", "Pongs", "converse"]

WIRES = ("native", "single")

_STATUS: dict[str, dict[str, Any]] = {  # Any: JSON
    "native": {"type": "STATUS", "state": "ready", "features": ["ids", "cancel"]},
    "single": {"type": "STATUS", "state": "ready"},
}


class GoneError(Exception):
    """A link has nobody to send to any more."""


class Link(Protocol):
    """One connection of a server, as the agent needs it. `send`, `ping` and `close` may raise `GoneError`."""

    def messages(self) -> AsyncIterator[str]:
        """The client's messages; ends when the connection does, in whatever way."""

    async def send(self, message: str) -> None: ...

    async def ping(self) -> None:
        """Send a ping, where the server lets its application do that."""

    async def pongs(self) -> None:
        """Wait until every ping has been answered, where the server lets its application see that."""

    async def close(self, code: int, reason: str) -> None: ...


class Pongs:
    """Keeps the pings that a connection has sent, until each is answered by a pong of the same payload."""

    def __init__(self) -> None:
        self._sent = 0
        self._unanswered: set[bytes] = set()
        self._all_answered = asyncio.Event()
        self._all_answered.set()

    def next_ping(self) -> bytes:
        """The payload for the next ping, which no other has."""
        self._sent += 1
        payload = b"ping %d" % self._sent
        self._unanswered.add(payload)
        self._all_answered.clear()
        return payload

    def arrived(self, payload: bytes) -> None:
        self._unanswered.discard(payload)
        if not self._unanswered:
            self._all_answered.set()

    async def wait(self) -> None:
        await self._all_answered.wait()


class _Mark(enum.Enum):
    ERROR = enum.auto()
    PING = enum.auto()
    PONGS = enum.auto()


_Step: TypeAlias = str | int | _Mark
"""What an answer does next: send a chunk of this text, close with this code, or what the mark says."""


def _script(prompt: str) -> Iterator[_Step]:
    match prompt.split(" "):
        case ["!count", number]:
            yield from (f"{n} " for n in range(int(number)))
        case ["!error"]:
            yield _Mark.ERROR
        case ["!close", code]:
            yield "closing "
            yield int(code)
        case ["!ping"]:
            for n in range(10):
                yield _Mark.PING
                yield f"{n} "
            yield _Mark.PONGS
        case _:
            yield from re.findall("[^ ]+ *|^ +", prompt)


@dataclasses.dataclass
class _Answer:
    id: str | None
    steps: Iterator[_Step]
    chunks: int = 0
    status: str | None = None


class _ViolationError(Exception):
    """The client sent what it may not send on this wire."""


class _Agent:
    def __init__(self, wire: str, link: Link) -> None:
        self._with_ids = wire == "native"
        self._link = link
        self._live: list[_Answer] = []
        self._work = asyncio.Event()
        self._random = random.Random(0)

    def hear(self, text: str) -> None:
        message = json.loads(text)
        id = message.get("id")
        answer = next((a for a in self._live if a.id == id), None)
        match message["type"]:
            case _ if self._with_ids != isinstance(id, str):
                raise _ViolationError("an id is for the wire that has them, and there it is required")
            case "USER_MESSAGE" if answer is None or not self._with_ids:
                self._live.append(_Answer(id, _script(message["text"])))
                self._work.set()
            case "CANCEL" if self._with_ids:
                if answer is not None:
                    answer.steps = iter(())
                    answer.status = "cancelled"
            case _:
                raise _ViolationError("the message is unknown, or its id is in use")

    async def speak(self) -> None:
        """Answer while there is somebody to answer; one step at a time, of any answer that is due."""
        try:
            while True:
                while not self._live:
                    self._work.clear()
                    await self._work.wait()
                await self._step(self._random.choice(self._live) if self._with_ids else self._live[0])
                await asyncio.sleep(0)  # lets `hear` run, also where sending never has to wait
        except GoneError:
            pass

    async def _step(self, answer: _Answer) -> None:
        match next(answer.steps, None):
            case str(text):
                answer.chunks += 1
                await self._say(answer, "AGENT_EVENT_TEXT_CHUNK", text=text)
            case int(code):
                await self._link.close(code, "as asked")
                raise GoneError
            case _Mark.PING:
                await self._link.ping()
            case _Mark.PONGS:
                await self._link.pongs()
            case _Mark.ERROR:
                self._live.remove(answer)
                await self._say(answer, "ERROR", code="refused", details="as asked")
            case None:
                self._live.remove(answer)
                await self._say(answer, "AGENT_EVENT_END", tokens_used=answer.chunks, status=answer.status)

    async def _say(self, answer: _Answer, type: str, **fields: object) -> None:
        message = {"type": type, "id": answer.id} | fields
        present = {name: value for name, value in message.items() if value is not None}
        await self._link.send(json.dumps(present, ensure_ascii=False))


async def converse(wire: str, link: Link) -> None:
    """Be the agent on one connection, until the connection ends."""
    await link.send(json.dumps(_STATUS[wire]))
    agent = _Agent(wire, link)
    async with asyncio.TaskGroup() as tasks:
        speaking = tasks.create_task(agent.speak())
        try:
            async for text in link.messages():
                agent.hear(text)
        except _ViolationError as exc:
            speaking.cancel()
            await link.close(1002, str(exc))
        finally:
            speaking.cancel()
