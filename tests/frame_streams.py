"""Byte streams of an agent, legal and not, cut into reads; and the WebSocket libraries that read them."""

from __future__ import annotations

import itertools
from typing import Final, NamedTuple, Protocol

from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.uri import WebSocketURI
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, TextMessage

from .wire_server import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, close_frame, frame, text

__all__ = [
    "ANYTHING",
    "BROKEN",
    "BoundedFrames",
    "Header",
    "Library",
    "Websockets",
    "Wsproto",
    "bounded_frames",
    "header_at",
    "reads",
    "streams",
    "with_length",
]

# The libraries


class Library(Protocol):
    """A WebSocket library behind the handshake: what it has delivered, and how the connection has ended."""

    messages: list[tuple[str, bytes]]
    end: tuple[str, int, str] | None

    def feed(self, data: bytes) -> None: ...


class Wsproto:
    """As trio-websocket uses it."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.end: tuple[str, int, str] | None = None
        self._connection = Connection(ConnectionType.CLIENT)
        self._message = b""

    def feed(self, data: bytes) -> None:
        self._connection.receive_data(data)
        for event in self._connection.events():
            if isinstance(event, TextMessage | BytesMessage):
                is_text = isinstance(event.data, str)
                self._message += event.data.encode() if isinstance(event.data, str) else event.data
                if event.message_finished:
                    self.messages.append(("text" if is_text else "binary", self._message))
                    self._message = b""
            elif isinstance(event, CloseConnection):
                assert self.end is None
                if self._connection.state is ConnectionState.REMOTE_CLOSING:
                    self.end = ("closed", int(event.code), event.reason or "")
                else:
                    self.end = ("failed", int(event.code), "")


class Websockets:
    """As the transport on asyncio uses it, but that binary messages are delivered."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.end: tuple[str, int, str] | None = None
        uri = WebSocketURI(False, "agent.example", 80, "/", "", None, None)
        self._protocol = ClientProtocol(uri, state=OPEN, max_size=None)
        self._opcode = Opcode.TEXT
        self._message = b""

    def feed(self, data: bytes) -> None:
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            assert isinstance(event, Frame)
            if event.opcode in (Opcode.PING, Opcode.PONG, Opcode.CLOSE):
                continue
            if event.opcode is not Opcode.CONT:
                self._opcode = event.opcode
            self._message += event.data
            if event.fin and self._opcode is Opcode.TEXT and not _is_utf8(self._message):
                self.end = ("failed", 1007, "")
                return
            if event.fin:
                self.messages.append((self._opcode.name.lower(), self._message))
                self._message = b""
        failure, close = self._protocol.parser_exc, self._protocol.close_rcvd
        if failure is not None:
            self.end = ("failed", 1007 if isinstance(failure, UnicodeDecodeError) else 1002, "")
        elif close is not None:
            self.end = ("closed", int(close.code), close.reason)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


# Headers


class Header(NamedTuple):
    first: int
    masked: bool
    minimal: bool
    start: int
    """Where the payload, or its mask, begins."""
    length: int


def header_at(stream: bytes, position: int) -> Header | None:
    """The header that begins at `position`, if it is whole."""
    size = 2
    if len(stream) >= position + 2:
        size = {126: 4, 127: 10}.get(stream[position + 1] & 0x7F, 2)
    if len(stream) < position + size:
        return None
    first, second = stream[position : position + 2]
    length = int.from_bytes(stream[position + 2 : position + size]) if size > 2 else second & 0x7F
    minimal = length >= {2: 0, 4: 126, 10: 65_536}[size]
    return Header(first, second > 0x7F, minimal, position + size, length)


def with_length(first: int, length: int, size: int, payload: bytes = b"", mask: int = 0) -> bytes:
    """A frame whose length is written in `size` bytes: 0, 2 or 8."""
    short = {0: length, 2: 126, 8: 127}[size]
    return bytes((first, mask | short)) + (length.to_bytes(size) if size else b"") + payload


# Streams

_LENGTHS: Final = st.one_of(
    st.integers(0, 12),
    st.sampled_from([100, 124, 125, 126, 127, 255, 256, 299, 300, 301]),
    st.sampled_from([65_534, 65_535, 65_536, 65_537, 69_999, 70_000, 70_001]),
)
_ASCII: Final = _LENGTHS.map(lambda length: (b"0123456789" * (length // 10 + 1))[:length])
_PAYLOADS: Final = st.one_of(st.text(max_size=12).map(str.encode), _ASCII, st.just("é\U0001f600".encode()))
_BAD_UTF8: Final = st.sampled_from(
    [b"\xff", b"\xc3", b"x\xc3", "\U0001f600".encode()[:3], b"\xc3\n", b"\xed\xa0\x80", b"\xa9", b"\xc0\x80"]
)
_SHORT: Final = st.binary(max_size=12) | st.sampled_from([125 * b"p", 124 * b"p"])

_controls = st.builds(frame, st.sampled_from([PING, PONG]), _SHORT)
_texts = _PAYLOADS.map(text)


@st.composite
def _fragmented(draw: st.DrawFn, payloads: st.SearchStrategy[bytes], opcode: int = TEXT) -> bytes:
    payload = draw(payloads)
    cuts = draw(st.lists(st.integers(0, len(payload)), max_size=6).map(sorted))
    pieces = [payload[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(payload)])]
    parts = []
    for number, piece in enumerate(pieces):
        parts += draw(st.lists(_controls, max_size=2)) if number else []
        parts.append(frame(CONTINUATION if number else opcode, piece, fin=number == len(pieces) - 1))
    return b"".join(parts)


_legal = st.one_of(
    _texts,
    _texts,
    _texts,
    _controls,
    _PAYLOADS.map(lambda payload: frame(BINARY, payload)),
    _fragmented(_PAYLOADS),
    _fragmented(_PAYLOADS, BINARY),
)

_codes = st.sampled_from([0, 999, 1000, 1001, 1003, 1004, 1005, 1006, 1007, 1011, 1014, 1015, 1016, 2999])
_closes = st.one_of(
    st.just(frame(CLOSE)),
    st.just(frame(CLOSE, b"x")),
    st.builds(
        close_frame, st.sampled_from([1000, 1001, 1011, 3000, 4999]), st.text(max_size=9).map(str.encode)
    ),
    st.builds(close_frame, _codes | st.sampled_from([3000, 4000, 4999, 5000, 65_535]), _PAYLOADS | _BAD_UTF8),
    st.just(close_frame(1000, b"\xff")),
)
_opcodes = st.integers(0, 15)
_rule_breaking = st.one_of(
    st.builds(frame, _opcodes, _PAYLOADS, fin=st.booleans(), rsv=st.integers(0, 7), masked=st.booleans()),
    st.builds(frame, _opcodes, _PAYLOADS, fin=st.booleans()),
    st.builds(frame, st.sampled_from([TEXT, PING]), _PAYLOADS, rsv=st.integers(1, 7)),
    st.builds(frame, st.sampled_from([TEXT, PING]), _PAYLOADS, masked=st.just(True)),
    st.builds(frame, st.sampled_from([PING, PONG, CLOSE]), st.just(126 * b"x") | st.just(70_000 * b"x")),
    # Lengths that would fit in fewer bytes, and such as never come true.
    st.builds(
        lambda first, size, payload: with_length(first, len(payload), size, payload),
        st.sampled_from([0x81, 0x01, 0x80, 0x82, 0x89, 0x88]),
        st.sampled_from([2, 8]),
        st.binary(max_size=3) | st.just(125 * b"x") | st.just(65_535 * b"x"),
    ),
    st.builds(
        with_length,
        st.sampled_from([0x81, 0x01, 0x80, 0x00, 0x82, 0x89, 0xC1]),
        st.sampled_from([2**31, 2**40, 2**40 + 1, 2**63 - 1, 2**63, 2**64 - 1]),
        st.just(8),
        st.binary(max_size=9),
    ),
)
_illegal = st.one_of(
    _BAD_UTF8.map(text),
    _BAD_UTF8.map(text),
    _fragmented(_BAD_UTF8),
    _rule_breaking,
    _rule_breaking,
    _closes,
    _closes,
    st.builds(frame, st.sampled_from([TEXT, BINARY, CONTINUATION]), _PAYLOADS, fin=st.just(False)),
)

ANYTHING: Final = st.lists(st.one_of(_legal, _illegal, st.binary(max_size=20)), max_size=5).map(b"".join)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Mostly legal for a while; then, in most, something that is not; then anything. Perhaps cut off."""
    stream = b"".join(
        [
            *draw(st.lists(_legal, max_size=6)),
            *draw(st.lists(_illegal, max_size=1)),
            draw(st.just(b"") | ANYTHING),
        ]
    )
    return stream[: len(stream) - draw(st.sampled_from([0, 0, 0, 0, 1, 2, 3, 7, 11]))]


def _frame_starts(stream: bytes) -> list[int]:
    starts, position = [], 0
    while (header := header_at(stream, position)) and position < len(stream):
        starts.append(position)
        position = header.start + 4 * header.masked + header.length
    return starts


@st.composite
def reads(draw: st.DrawFn, stream: bytes) -> list[bytes]:
    """`stream` at once, in equal pieces, or cut near the ends and beginnings of frames and anywhere else."""
    kind = draw(st.sampled_from(["drawn", "drawn", "frames", "equal", "one"]))
    if kind == "one":
        return [stream]
    if kind == "equal":
        size = draw(st.sampled_from([1, 2, 3, 7, 64, 1024])) * (1 + len(stream) // 2_000)
        return [stream[start : start + size] for start in range(0, len(stream), size)]
    cuts = starts = _frame_starts(stream)
    if kind == "drawn":
        near = st.builds(int.__add__, st.sampled_from([*starts, 0]), st.integers(-2, 12))
        cuts = draw(st.lists(near | st.integers(0, len(stream)), min_size=1, max_size=12))
    cuts = sorted({0, len(stream), *(cut for cut in cuts if 0 < cut < len(stream))})
    return [stream[start:stop] for start, stop in itertools.pairwise(cuts)]


# Streams about sizes only


class BoundedFrames(NamedTuple):
    """Legal frames, some of messages that are too large or in too many fragments for the limits."""

    stream: bytes
    message_size: int
    fragments: int


@st.composite
def bounded_frames(draw: st.DrawFn) -> BoundedFrames:
    message_size = draw(st.sampled_from([0, 1, 124, 125, 126, 300, 65_535, 65_536, 70_000]))
    fragments = draw(st.sampled_from([1, 2, 5]))
    sizes = _LENGTHS | st.sampled_from([message_size, message_size + 1, max(message_size - 1, 0)])
    payloads = st.builds(bytes.__mul__, st.just(b"x"), sizes)
    whole = payloads.map(text)
    messages = st.one_of(
        whole,
        whole,
        _controls,
        payloads.map(lambda payload: frame(BINARY, payload)),
        _fragmented(payloads),
        _fragmented(payloads, BINARY),
    )
    stream = b"".join(draw(st.lists(messages, max_size=7)))
    return BoundedFrames(stream, message_size, fragments)


BROKEN: Final = {
    "a close frame": close_frame(1000, b"bye"),
    "an empty close frame": frame(CLOSE),
    "a fragmented close frame": frame(CLOSE, fin=False),
    "a bad close frame": frame(CLOSE, b"x"),
    "a close frame within a message": frame(TEXT, b"x", fin=False) + close_frame(1000),
    "reserved bit 1": frame(TEXT, b"x", rsv=4),
    "reserved bit 2": frame(TEXT, b"x", rsv=2),
    "reserved bit 3": frame(TEXT, b"x", rsv=1),
    "a reserved bit of a ping": frame(PING, b"x", rsv=4),
    "a masked text": frame(TEXT, b"x", masked=True),
    "a long masked text": frame(TEXT, 300 * b"x", masked=True),
    "a very long masked text": frame(TEXT, 70_000 * b"x", masked=True),
    "a masked ping": frame(PING, b"x", masked=True),
    "a reserved opcode": frame(0x3, b"x"),
    "a reserved control opcode": frame(0xB, b"x"),
    "a continuation of nothing": frame(CONTINUATION, b"x"),
    "a text within a message": frame(TEXT, b"x", fin=False) + text(b"y"),
    "a binary frame within a message": frame(TEXT, b"x", fin=False) + frame(BINARY, b"y"),
    "a fragmented ping": frame(PING, fin=False),
    "a fragmented pong": frame(PONG, fin=False),
    "a ping of 126 bytes": frame(PING, 126 * b"x"),
    "a pong of 70,000 bytes": frame(PONG, 70_000 * b"x"),
    "a ping whose short length is in two bytes": with_length(0x89, 1, 2, b"x"),
    "bad UTF-8": text(b"\xff"),
    "a character that is cut": text(b"\xc3"),
    "a character cut where a line breaks": text(b"\xc3") + text(b"\n"),
    "a character in two texts": text(b"\xc3") + text(b"\xa9"),
    "a surrogate": text(b"\xed\xa0\x80"),
}
"""After each of these everything is passed on for good."""
