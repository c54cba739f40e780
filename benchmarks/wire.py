"""What the replay server writes and reads: WebSocket frames, and the agent's messages, encoded beforehand."""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal

from anyagent import OM

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "CLOSE",
    "GO",
    "PING",
    "PONG",
    "PROBE",
    "PROMPT",
    "READY",
    "SYNC",
    "TEXT",
    "WARM_UP",
    "FrameReader",
    "Order",
    "accept_key",
    "chunk",
    "echo",
    "end",
    "frame",
    "round_frames",
    "round_messages",
    "text_of",
]

PROMPT: Final = "Hello, agent!"
WARM_UP: Final = "warm up"
"""A round in which this prompt occurs has as many chunks as the URL's ``warm`` says."""
SYNC: Final = "sync"
"""Answered at once with an end, whatever the URL says."""
READY: Final = "ready?"
"""In a round that is held: answered with an end as soon as all its prompts are there."""
GO: Final = "go"
"""In a round that is held: answered with an end, and then the round itself is."""
PROBE: Final = "probe"
"""The request whose chunks carry the time at which they were written."""

TEXT: Final = 0x1
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

Order = Literal["burst", "interleaved"]


def accept_key(key: str) -> str:
    """The ``Sec-WebSocket-Accept`` of a ``Sec-WebSocket-Key`` (RFC 6455, 4.2.2)."""
    digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode(), usedforsecurity=False)
    return base64.b64encode(digest.digest()).decode()


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """One whole, unmasked frame."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 1 << 16:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + payload


class FrameReader:
    """Takes the frames of a client out of the bytes that it sends; fragments and wrong frames are refused."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Opcode and payload of every frame that is complete with `data`; raises `ValueError`."""
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= 6:
            first, second = buffer[start], buffer[start + 1]
            if not first & 0x80 or not second & 0x80 or first & 0x0F == 0:
                raise ValueError("a frame is a fragment or not masked")
            size, header = second & 0x7F, 2
            if size > 125:
                header = 4 if size == 126 else 10
                size = int.from_bytes(buffer[start + 2 : start + header], "big")
            stop = start + header + 4 + size
            if len(buffer) < stop:
                break
            mask = bytes(buffer[start + header : start + header + 4])
            payload = bytes(buffer[start + header + 4 : stop])
            start = stop
            yield first & 0x0F, _unmask(payload, mask)
        del buffer[:start]


def _unmask(payload: bytes, mask: bytes) -> bytes:
    size = len(payload)
    stretched = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(stretched, "little")).to_bytes(size, "little")


def text_of(size: int) -> str:
    """`size` characters of ASCII."""
    return echo("The quick brown fox jumps over the lazy dog. ", size)


def echo(text: str, size: int) -> str:
    """`size` characters of `text`, over and over."""
    return (text * (size // len(text) + 1))[:size]


def chunk(request_id: str | None, text: str) -> bytes:
    """The message of one chunk."""
    return OM.encode(OM.EventTextChunk(text=text, id=request_id))


def end(request_id: str | None, tokens_used: int = 0, status: str = "completed") -> bytes:
    """The message that ends a request."""
    return OM.encode(OM.EventEnd(tokens_used=tokens_used, status=status, id=request_id))


def round_messages(ids: tuple[str | None, ...], chunks: int, size: int, order: Order) -> Iterator[bytes]:
    """Every message of a round: ``burst`` is request after request, ``interleaved`` round-robin over them."""
    text = text_of(size)
    pieces = [chunk(request_id, text) for request_id in ids]
    ends = [end(request_id, chunks) for request_id in ids]
    if order == "burst":
        for piece, last in zip(pieces, ends, strict=True):
            for _ in range(chunks):
                yield piece
            yield last
    else:
        for _ in range(chunks):
            yield from pieces
        yield from ends


# A run goes through all clients before it comes to the next variant, and all of them use the same ids: the
# rounds of one variant are all that needs to be kept.
@lru_cache(maxsize=16)
def round_frames(
    ids: tuple[str | None, ...], chunks: int, size: int, order: Order, with_end: bool = True
) -> bytes:
    """A round as it goes over the wire."""
    text = text_of(size)
    pieces = [frame(chunk(request_id, text)) for request_id in ids]
    ends = [frame(end(request_id, chunks)) if with_end else b"" for request_id in ids]
    if order == "burst":
        return b"".join(piece * chunks + last for piece, last in zip(pieces, ends, strict=True))
    return b"".join(pieces) * chunks + b"".join(ends)
