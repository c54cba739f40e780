"""What stands between the socket and the WebSocket library: whole text frames are taken out, the rest passes.

Nearly every message of an agent is one unfragmented, unmasked, uncompressed text frame, and that needs no
library.
"""

from __future__ import annotations

from typing import Final

__all__ = ["FRAGMENTS", "FRAMES_AT_ONCE", "FrameSplitter"]

FRAGMENTS: Final = 128 * 1024
"""In how many frames a message may come; each costs the library memory, however little it holds."""

FRAMES_AT_ONCE: Final = 256
"""How many frames the library may be given at once: the half million that a read may hold take it seconds."""

# First bytes of a frame: FIN, three reserved bits, opcode (RFC 6455, section 5.2).
_TEXT: Final = 0x81
_PING_OR_PONG: Final = (0x89, 0x8A)
_DATA: Final = (0x00, 0x01, 0x02, 0x80, 0x81, 0x82)
_FIN: Final = 0x80
_OPCODE: Final = 0x0F

_MASKED: Final = 0x80
_LONGEST_OF_CONTROL: Final = 125
_EXTENDED: Final = {126: (4, 126), 127: (10, 65_536)}
"""By a length's first byte: the size of such a header, and the smallest length that needs it."""


class FrameSplitter:
    """Splits a byte stream into the texts of whole text frames and the rest, which is for the library. Pure.

    Pings and pongs just pass. Anything else that is no whole text frame is passed on together with all that
    has been read behind it; frames are taken again from the first read that begins behind a whole message.
    By then the library has to have delivered what it was given: so order is kept. Behind a close frame or a
    violation everything passes, for good.

    `exceeded` is set when a message is larger than `message_size` bytes or comes in more than `FRAGMENTS`
    frames, by what their headers say: the frame that goes too far, and all behind it, is kept from the
    library, too. `dense` is whether the newest rest may hold more than `FRAMES_AT_ONCE` frames.
    """

    def __init__(self, message_size: int) -> None:
        self.exceeded = False
        self.dense = False
        self._message_size = message_size
        self._header = b""  # of the text frame of whose text the beginning is held
        self._held = bytearray()  # else: the beginning of a frame, or of the header of one to be passed on
        self._wanted = 0  # how much has to be held before there is something to do
        self._broken = False
        self._payload = 0  # how much is still to come of a payload that is being passed on
        self._frames = 0  # in the newest rest
        self._size = 0  # of the message that is being passed on in fragments
        self._fragments = 0

    def split(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Return the texts (valid UTF-8) of the frames that `data` completes, and what is for the library.

        The texts come before every message in the latter.
        """
        if self.exceeded:
            return [], b""
        texts: list[bytes] = []
        passed: list[bytes] = []
        self._frames = start = 0
        header, self._header = self._header, b""
        if header or self._held:
            missing = self._wanted - len(self._held)
            if len(data) < missing:
                self._held += data
                self._header = header
                return [], b""
            if header:
                self._held += data[:missing]
                texts.append(bytes(self._held))
                start = missing
            else:
                self._held += data
                data = bytes(self._held)
            self._held = bytearray()
        position, passing = start, True
        if not (self._payload or self._fragments or self._broken):
            position, passing = self._take(data, start, texts, passed)
            if not _is_utf8(texts):
                self._broken = self.dense = True
                self._header = b""
                return [], b"".join((header, texts[0], data[start:])) if header else data
        if passing:
            end = self._follow(data, position)
            passed.append(data[position:end])
            position = end
        if position < len(data) and not self.exceeded:
            self._held += data[position:]
        self.dense = self._broken or len(passed) + self._frames > FRAMES_AT_ONCE
        return texts, b"".join(passed)

    def _take(self, data: bytes, position: int, texts: list[bytes], passed: list[bytes]) -> tuple[int, bool]:
        """Take frames; return where the first begins that cannot be, and whether it has to be passed on.

        If not, it is incomplete; a whole header of a text is put aside then.
        """
        limit = self._message_size
        short = min(limit, _LONGEST_OF_CONTROL)
        available = len(data)
        last = available - 1
        while position < last:
            length = data[position + 1]
            if length <= short:
                start = position + 2
            elif length in _EXTENDED:
                header, shortest = _EXTENDED[length]
                start = position + header
                if start > available:
                    self._wanted = header
                    return position, False
                length = int.from_bytes(data[position + 2 : start])
                if not shortest <= length <= limit:
                    return position, True
            else:
                return position, True
            end = start + length
            if data[position] == _TEXT:
                if end > available:
                    self._wanted = length
                    self._header = data[position:start]
                    return start, False
                texts.append(data[start:end])
            elif data[position] in _PING_OR_PONG and end <= available and length <= short:
                passed.append(data[position:end])
            else:
                return position, True
            position = end
        self._wanted = 2
        return position, False

    def _follow(self, data: bytes, position: int) -> int:
        """Follow the frames that are passed on from `position`; return up to where they are.

        That is, whole headers, and as much of a payload as there is.
        """
        available = len(data)
        while not self._broken:
            self._frames += 1
            step = min(self._payload, available - position)
            self._payload -= step
            position += step
            self._wanted = 2
            if available - position < 2:
                return position
            first, length_byte = data[position], data[position + 1]
            if length_byte in _EXTENDED:
                self._wanted, _ = _EXTENDED[length_byte]
                start = position + self._wanted
                if start > available:
                    return position
                length = int.from_bytes(data[position + 2 : start])
            else:
                start, length = position + 2, length_byte
            if first in _DATA and length_byte < _MASKED and bool(first & _OPCODE) != bool(self._fragments):
                self._size += length
                self._fragments += 1
                if self._size > self._message_size or self._fragments > FRAGMENTS:
                    self.exceeded = True
                    return position
                if first & _FIN:
                    self._size = self._fragments = 0
            elif first not in _PING_OR_PONG or length_byte > _LONGEST_OF_CONTROL:
                self._broken = True
            position = start
            self._payload = length
        return available


def _is_utf8(texts: list[bytes]) -> bool:
    if not all(map(bytes.isascii, texts)):
        try:
            # A line break never completes a character that a text leaves incomplete.
            b"\n".join(texts).decode()
        except UnicodeDecodeError:
            return False
    return True
