"""What an agent says on one connection, cut into the client's reads: drawn, played and foretold."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import socket
import struct
import termios
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio
import anyio.lowlevel
import msgspec
from hypothesis import strategies as st

from anyagent import IM

from ..wire_server import CLOSE, CONTINUATION, PING, STATUS, TEXT, Peer, close_frame, frame, text

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CLOSE_CODE", "LAST", "End", "Plan", "Say", "plans", "play"]

CLOSE_CODE: Final = 1011
"""With which an agent closes that does not wait for the client to do it."""

_KINDS: Final = {
    "text": {"type": "AGENT_EVENT_TEXT_CHUNK", "text": ...},
    "reasoning": {"type": "AGENT_EVENT_REASONING_CHUNK", "text": ...},
    "tool": {"type": "AGENT_EVENT_TOOL_CALL", "call_id": "c", "name": "tool", "arguments": ...},
    "unknown": {"type": ..., "text": "of no type that is known"},
    "end": {"type": "AGENT_EVENT_END", "tokens_used": 7},
    "error": {"type": "ERROR", "code": ..., "details": "of the agent"},
}


@dataclasses.dataclass(frozen=True)
class Say:
    """An event of the request `of`, or a notice if that is ``None``; between its `fragments` are pings."""

    kind: str
    of: int | None
    payload: str
    fragments: int


LAST: Final = Say("unknown", None, "of all", 1)

End: TypeAlias = tuple[str, str]
"""The kind and the payload of what ended a request, or ("cut", "")."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """`requests` are sent and then everything said, in reads of `sizes`, which come again and again.

    `collected` says of each request whether it is waited for as a whole. In the end the `client` closes, or
    the agent does, with a "close frame" or without one ("fin").
    """

    requests: int
    collected: list[bool]
    says: list[Say]
    sizes: list[int]
    ending: str

    def events(self, request: int) -> list[tuple[str, str]]:
        """What the client has to yield: kinds and payloads."""
        before_the_end = itertools.takewhile(lambda say: not _is_terminal(say), self._of(request))
        return [(say.kind, say.payload) for say in before_the_end]

    def end(self, request: int) -> End:
        terminals = ((say.kind, say.payload) for say in self._of(request) if _is_terminal(say))
        return next(terminals, ("cut", ""))

    def notices(self) -> list[str]:
        return [say.payload for say in [*self.says, LAST] if say.of is None]

    def _of(self, request: int) -> list[Say]:
        return [say for say in self.says if say.of == request]


def _is_terminal(say: Say) -> bool:
    return say.kind in ("end", "error")


_long_payloads = st.sampled_from(["\N{MUSICAL SYMBOL G CLEF}", 130 * "x", 50 * "\N{SNOWMAN}"])
_payloads = st.text(max_size=5) | _long_payloads
_fragments = st.sampled_from([1, 1, 1, 2, 3])

_drawn_sizes = st.lists(st.sampled_from([20, 1, 2, 5, 50, 130, 400]), min_size=2, max_size=6)
_sizes = st.integers(0, 7).flatmap(lambda kind: st.just([[100_000], [1]][kind]) if kind < 2 else _drawn_sizes)


@st.composite
def _plans(draw: st.DrawFn) -> Plan:
    requests = draw(st.integers(1, 3))
    kinds = st.sampled_from([*_KINDS, "text", "text", "end"])
    says = draw(
        st.lists(st.builds(Say, kinds, st.integers(0, requests - 1), _payloads, _fragments), max_size=6)
    )
    notices = st.builds(Say, st.just("unknown"), st.none(), _payloads, _fragments)
    for place, notice in draw(st.lists(st.tuples(st.integers(0, 6), notices), max_size=1)):
        says.insert(place, notice)
    ending = draw(st.sampled_from(["client", "close frame", "fin"]))
    if ending == "client":  # which waits for the end of every request
        says += [Say("end", number, "", draw(_fragments)) for number in range(requests)]
    return Plan(
        requests,
        draw(st.lists(st.booleans(), min_size=requests, max_size=requests)),
        says,
        draw(_sizes),
        ending,
    )


plans: Final = _plans()


class _Wire:
    """The agent's end of a connection whose other end is in the same event loop."""

    def __init__(self, sock: socket.socket, sizes: list[int]) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.peer = Peer(sock)
        self._sizes = itertools.cycle(sizes)
        self._arrived = b""

    async def send(self, data: bytes) -> None:
        """Send `data` in pieces, each of which the client reads before the next one comes."""
        with self.peer.client_socket() as client:
            while data:
                size = next(self._sizes)
                assert self.sock.send(data[:size]) == len(data[:size])
                data = data[size:]
                while _unread(client):
                    await anyio.lowlevel.checkpoint()

    async def upgrade(self) -> bytes:
        """Read the request; return the answer to it."""
        await anyio.wait_readable(self.sock)
        self.peer.read_request()  # which was written in one go
        return self.peer.switching()

    async def receive(self) -> tuple[int, bytes]:
        """The opcode and the payload of the next frame, which is a short one."""
        head = await self._take(2)
        mask, payload = await self._take(4), await self._take(head[1] & 0x7F)
        assert len(payload) < 126
        return head[0] & 0x0F, bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))

    async def receive_data(self) -> tuple[int, bytes]:
        """As `receive`, leaving out pongs."""
        while (received := await self.receive())[0] not in (TEXT, CLOSE):
            pass
        return received

    async def wait_gone(self) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await anyio.wait_readable(self.sock)
                if not self.sock.recv(65_536):
                    return

    async def _take(self, size: int) -> bytes:
        while len(self._arrived) < size:
            await anyio.wait_readable(self.sock)
            data = self.sock.recv(65_536)
            assert data, "the client has closed its socket"
            self._arrived += data
        taken, self._arrived = self._arrived[:size], self._arrived[size:]
        return taken


def _unread(sock: socket.socket) -> int:
    """How many bytes have arrived at `sock` and were not read yet."""
    (count,) = struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))
    assert isinstance(count, int)
    return count


async def play(plan: Plan, listener: socket.socket) -> None:
    """Be the agent of the next connection. What it says ends with the notice `LAST`."""
    await anyio.wait_readable(listener)
    sock, _ = listener.accept()
    with sock:
        wire = _Wire(sock, plan.sizes)
        await wire.send(await wire.upgrade() + text(STATUS))
        ids: dict[str, str] = {}
        while len(ids) < plan.requests:
            prompt = IM.decode((await wire.receive_data())[1])
            assert isinstance(prompt, IM.UserMessage)
            assert prompt.id is not None
            ids[prompt.text] = prompt.id
        said = b"".join(_frames(say, ids) for say in [*plan.says, LAST])
        match plan.ending:
            case "client":
                await wire.send(said)
                opcode, _ = await wire.receive_data()
                assert opcode == CLOSE
                await wire.send(close_frame(1000))
            case "close frame":
                await wire.send(said + close_frame(CLOSE_CODE, b"done"))
            case _:
                await wire.send(said)
                sock.shutdown(socket.SHUT_WR)
        await wire.wait_gone()


def _frames(say: Say, ids: dict[str, str]) -> bytes:
    message = {name: say.payload if value is ... else value for name, value in _KINDS[say.kind].items()}
    if say.kind == "unknown":
        message["type"] = f"NEW {say.payload}"
    if say.of is not None:
        message["id"] = ids[str(say.of)]
    return b"".join(_fragmented(msgspec.json.encode(message), say.fragments))


def _fragmented(payload: bytes, count: int) -> Iterator[bytes]:
    size = -(-len(payload) // count)
    for number in range(count):
        part = payload[number * size : (number + 1) * size]
        yield frame(CONTINUATION if number else TEXT, part, fin=number == count - 1)
        if number < count - 1:
            yield frame(PING, b"between")
