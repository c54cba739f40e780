"""How much of a message a peer may make us hold."""

from __future__ import annotations

from typing import Final

__all__ = ["FRAGMENTS", "FrameMeter"]

FRAGMENTS: Final = 64 * 1024
"""In how many frames a message may come; each costs memory, however little it holds."""

_FIN: Final = 0x80
_CONTROL: Final = 0x08


class FrameMeter:
    """Follows the frame headers in a byte stream (RFC 6455, section 5.2) and measures each message by them.

    A message is measured before its payload is there. Nothing is validated: that is for whoever is given
    what `admit` lets through.
    """

    def __init__(self, message_size: int) -> None:
        self.exceeded = False
        self._limit = message_size
        self._header = b""  # the beginning of a header, where data ended within it
        self._payload = 0  # how much of the present frame's payload is still to come
        self._size = 0
        self._fragments = 0

    def admit(self, data: bytes) -> bytes:
        """`data`, or what comes before the frame with which a message is too large or in too many frames.

        Then `exceeded` is set.
        """
        seen = len(self._header)
        stream = self._header + data
        position = self._payload
        while len(stream) - position >= 2:
            first, second = stream[position], stream[position + 1]
            length = second & 0x7F
            start = position + 2
            if length > 125:
                start += 2 if length == 126 else 8
                if start > len(stream):
                    break
                length = int.from_bytes(stream[position + 2 : start])
            if not first & _CONTROL and not self._count(length, final=bool(first & _FIN)):
                self.exceeded = True
                return stream[seen:position]
            position = start + length
        self._header = stream[position:]
        self._payload = max(position - len(stream), 0)
        return data

    def _count(self, length: int, *, final: bool) -> bool:
        self._size += length
        self._fragments += 1
        if self._size > self._limit or self._fragments > FRAGMENTS:
            return False
        if final:
            self._size = self._fragments = 0
        return True
