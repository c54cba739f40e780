"""What splitting costs: each byte is copied a few times at most, and little more than a message is held."""

from __future__ import annotations

import ast
import inspect
import tracemalloc
from typing import TYPE_CHECKING, Any, SupportsIndex

import pytest

from anyagent._transports import frames
from anyagent._transports.frames import FrameSplitter

from .wire_server import BINARY, CONTINUATION, PING, TEXT, frame, text

if TYPE_CHECKING:
    from collections.abc import Iterable

MEBIBYTE = 2**20


class Copies:
    """Counts the bytes that `bytes` and `bytearray` copy where these of its own take their place."""

    def __init__(self) -> None:
        copies = self
        self.copied = 0

        class Bytes(bytes):
            def __new__(cls, *args: Any) -> Bytes:
                made = super().__new__(cls, *args)
                copies.copied += len(made)
                return made

            def __getitem__(self, key: SupportsIndex | slice) -> Any:
                if isinstance(key, slice):
                    part = super().__getitem__(key)
                    return self if len(part) == len(self) else Bytes(part)
                return super().__getitem__(key)

            def __add__(self, other: Any) -> Bytes:
                return Bytes(super().__add__(other))

            def join(self, parts: Iterable[Any]) -> Any:
                parts = list(parts)
                return parts[0] if len(parts) == 1 else Bytes(super().join(parts))

            def decode(self, *args: Any) -> str:
                copies.copied += len(self)
                return super().decode(*args)

        class Array(bytearray):
            def __iadd__(self, other: Any) -> Array:
                copies.copied += len(other)
                super().__iadd__(other)
                return self

            def __add__(self, other: Any) -> Array:
                copies.copied += len(self) + len(other)
                return Array(super().__add__(other))

            def __getitem__(self, key: SupportsIndex | slice) -> Any:
                item = super().__getitem__(key)
                copies.copied += len(item) if isinstance(item, bytearray) else 0
                return item

            def __delitem__(self, key: SupportsIndex | slice) -> None:
                super().__delitem__(key)
                copies.copied += len(self)

        self.bytes, self.bytearray = Bytes, Array

    def splitter(self, message_size: int) -> FrameSplitter:
        """One whose code counts: its literals, too, are of `self.bytes`."""
        code = ast.parse(inspect.getsource(frames))
        namespace: dict[str, Any] = {"__name__": frames.__name__, "bytes": self.bytes}
        namespace["bytearray"] = self.bytearray
        exec(compile(ast.fix_missing_locations(_Literals().visit(code)), frames.__name__, "exec"), namespace)
        splitter: FrameSplitter = namespace["FrameSplitter"](message_size)
        return splitter


class _Literals(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if not isinstance(node.value, bytes):
            return node
        return ast.Call(ast.Name("bytes", ast.Load()), [node], [])


ARRIVING = {
    "tiny texts": (10_000 * text(100 * b"x"), 66),
    "texts of 64 KiB": (text(65_536 * b"x"), 1_024),
    "texts of 16 MiB": (text(16 * MEBIBYTE * b"x"), 4),
    "fragments of 64 KiB": (
        (frame(TEXT, 65_536 * b"x", fin=False) + 99 * frame(CONTINUATION, 65_536 * b"x", fin=False))
        + frame(CONTINUATION),
        10,
    ),
    "tiny fragments": (
        frame(TEXT, fin=False) + 100_000 * frame(CONTINUATION, 100 * b"x", fin=False) + frame(CONTINUATION),
        7,
    ),
    "binary frames of 16 MiB": (frame(BINARY, 16 * MEBIBYTE * b"x"), 4),
    "pings": (10_000 * frame(PING, 125 * b"x"), 52),
    "a close frame": (frame(0x8) + 64 * MEBIBYTE * b"x", 1),
}


@pytest.mark.parametrize(("unit", "times"), ARRIVING.values(), ids=ARRIVING.keys())
def test_each_byte_is_copied_a_few_times_at_most_however_small_the_reads_are(unit: bytes, times: int) -> None:
    copies = Copies()
    splitter = copies.splitter(16 * MEBIBYTE)
    received = taken = passed_on = 0
    for _ in range(times):
        for start in range(0, len(unit), 1_024):
            data = copies.bytes(unit[start : start + 1_024])
            copies.copied -= len(data)
            texts, passed = splitter.split(data)
            received += len(data)
            taken += sum(map(len, texts))
            passed_on += len(passed)
    assert not splitter.exceeded
    assert received >= 60 * MEBIBYTE
    assert taken + passed_on > 0.9 * received
    assert taken <= copies.copied <= 4 * taken + passed_on + received


def test_a_text_that_arrives_in_tiny_reads_costs_little_more_memory_than_its_bytes() -> None:
    whole = text(MEBIBYTE // 4 * b"x")
    splitter = FrameSplitter(MEBIBYTE)
    tracemalloc.start()
    try:
        for start in range(0, len(whole) - 2, 2):
            assert splitter.split(whole[start : start + 2]) == ([], b"")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(whole) - 2 <= peak < 2 * len(whole)
    assert splitter.split(whole[-2:]) == ([MEBIBYTE // 4 * b"x"], b"")
