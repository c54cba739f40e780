"""The agent on a WebSocket server written out by hand, which frames what it sends as other servers seldom do.

The second part of the path says how (``/native/fragmented``):

* ``fragmented``: every message in several frames, some of them empty, cut anywhere, with a ping before each
  continuation. An END is sent only after a pong has come back for every ping before it.
* ``coalesced``: as many frames as possible in one write, the handshake's response with the first of them.
* ``dribbled``: every frame, and the handshake's response, in many small writes, mostly of one byte.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import random
from typing import TYPE_CHECKING

from tests.servers.agent import WIRES, GoneError, Pongs, converse
from tests.servers.process import begin, ready

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_CONTINUATION, _TEXT, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x8, 0x9, 0xA
_FIN = 0x80
_MASKED = 0x80


def _frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    first = opcode | (_FIN if fin else 0)
    length = len(payload)
    if length < 126:
        return bytes((first, length)) + payload
    if length < 1 << 16:
        return bytes((first, 126)) + length.to_bytes(2) + payload
    return bytes((first, 127)) + length.to_bytes(8) + payload


async def _read_frame(reader: asyncio.StreamReader) -> tuple[bool, int, bytes]:
    """Read one of the client's frames: whether it is final, its opcode, its payload unmasked."""
    first, second = await reader.readexactly(2)
    if first & 0x70 or not second & _MASKED:
        raise ValueError("a client's frame must be masked, and have no reserved bit")
    length = second & 0x7F
    if length == 126:
        length = int.from_bytes(await reader.readexactly(2))
    elif length == 127:
        length = int.from_bytes(await reader.readexactly(8))
    mask = await reader.readexactly(4)
    masked = await reader.readexactly(length)
    key = (mask * (length // 4 + 1))[:length]
    return bool(first & _FIN), first & 0x0F, (int.from_bytes(masked) ^ int.from_bytes(key)).to_bytes(length)


class _Link:
    """Sends every frame in one write."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._pongs = Pongs()
        self._closing = False
        self._writing = asyncio.Lock()

    async def messages(self) -> AsyncIterator[str]:
        parts: list[bytes] = []
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, GoneError):
            while True:
                fin, opcode, payload = await _read_frame(self._reader)
                if opcode == _CLOSE:
                    if not self._closing:
                        await self.put(_frame(_CLOSE, payload))
                    return
                if opcode == _PING:
                    await self.put(_frame(_PONG, payload))
                elif opcode == _PONG:
                    self._pongs.arrived(payload)
                elif opcode == (_CONTINUATION if parts else _TEXT):
                    parts.append(payload)
                    if fin:
                        yield b"".join(parts).decode()
                        parts.clear()
                else:
                    raise ValueError(f"the client sent a frame of opcode {opcode}, which is out of place")

    async def send(self, message: str) -> None:
        await self.put(_frame(_TEXT, message.encode()), more=_is_chunk(message))

    async def ping(self) -> None:
        await self.put(_frame(_PING, self._pongs.next_ping()), more=True)

    async def pongs(self) -> None:
        await self._pongs.wait()

    async def close(self, code: int, reason: str) -> None:
        self._closing = True
        await self.put(_frame(_CLOSE, code.to_bytes(2) + reason.encode()))

    async def put(self, data: bytes, *, more: bool = False) -> None:
        """Send the bytes of one frame; `more` says that the agent has another one to send at once."""
        async with self._writing:
            await self._write(data)

    async def _write(self, data: bytes) -> None:
        try:
            self._writer.write(data)  # asyncio has set TCP_NODELAY: the kernel joins no two writes
            await self._writer.drain()
        except ConnectionError as exc:
            raise GoneError from exc


class _Fragmented(_Link):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        self._random = random.Random(0)

    async def send(self, message: str) -> None:
        if not _is_chunk(message):
            await self.pongs()
        payload = message.encode()
        a, b = sorted(self._random.choices(range(len(payload) + 1), k=2))
        await self.put(_frame(_TEXT, payload[:a], fin=False))
        await self.ping()
        await self.put(_frame(_CONTINUATION, payload[a:b], fin=False))
        await self.ping()
        await self.put(_frame(_CONTINUATION, payload[b:]))


class _Coalesced(_Link):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        self._held = b""

    async def pongs(self) -> None:
        await self.put(b"")
        await super().pongs()

    async def put(self, data: bytes, *, more: bool = False) -> None:
        self._held += data
        if not more or len(self._held) > 4096:
            held, self._held = self._held, b""
            await super().put(held)


class _Dribbled(_Link):
    async def _write(self, data: bytes) -> None:
        step = max(1, len(data) // 256)
        cuts = (*range(min(16, len(data))), *range(16, len(data), step))
        for start, end in itertools.pairwise((*cuts, len(data))):
            await super()._write(data[start:end])
            await asyncio.sleep(0)  # gives the client a moment to read this much and no more


_LINKS = {"fragmented": _Fragmented, "coalesced": _Coalesced, "dribbled": _Dribbled}


def _is_chunk(message: str) -> bool:
    return bool(json.loads(message)["type"] == "AGENT_EVENT_TEXT_CHUNK")


def _upgrade(lines: list[str]) -> bytes:
    """The response to a handshake whose header these are the lines of."""
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    if headers["upgrade"].lower() != "websocket" or headers["sec-websocket-version"] != "13":
        raise ValueError("not a WebSocket handshake")
    digest = hashlib.sha1((headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode())
    accept = b"Sec-WebSocket-Accept: " + base64.b64encode(digest.digest())
    response = (b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", b"Connection: Upgrade", accept)
    return b"\r\n".join((*response, b"", b""))


async def _handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.closing(writer), contextlib.suppress(GoneError):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
        request, *lines = head.rstrip().split("\r\n")
        _, wire, framing, *_ = (*request.split(" ")[1].split("/"), "")
        if wire not in WIRES or framing not in _LINKS:
            writer.write(b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            return
        link = _LINKS[framing](reader, writer)
        await link.put(_upgrade(lines), more=True)
        await converse(wire, link)


async def main() -> None:
    async with await asyncio.start_server(_handle, "127.0.0.1", 0) as server:
        ready(server.sockets[0].getsockname()[1])
        await server.serve_forever()


if __name__ == "__main__":
    begin()
    asyncio.run(main())
