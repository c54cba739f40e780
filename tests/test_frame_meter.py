"""The meter stops a stream in front of the frame with which a message is too large, wherever it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent._transports.meter import FRAGMENTS, FrameMeter

from .wire_server import BINARY, CONTINUATION, PING, TEXT, frame

LIMIT = 70_000

SIZES = st.sampled_from([0, 1, 125, 126, 300, 65_535, 65_536, LIMIT, LIMIT + 1])
DATA_FRAMES = st.tuples(st.sampled_from([TEXT, BINARY, CONTINUATION]), SIZES, st.booleans())
CONTROL_FRAMES = st.tuples(st.just(PING), st.sampled_from([0, 1, 125]), st.just(True))


def admitted(frames: list[tuple[int, int, bool]]) -> tuple[bytes, bool]:
    """What is to come through of `frames`, and whether one of them is refused."""
    through, size = b"", 0
    for opcode, length, fin in frames:
        if opcode != PING:
            size += length
            if size > LIMIT:
                return through, True
            size = 0 if fin else size
        through += frame(opcode, length * b"\x81", fin=fin)
    return through, False


@settings(deadline=None)
@given(st.lists(DATA_FRAMES | CONTROL_FRAMES, max_size=8), st.lists(st.integers(0, 400_000), max_size=20))
def test_the_same_is_let_through_however_the_stream_is_cut(
    frames: list[tuple[int, int, bool]], cuts: list[int]
) -> None:
    stream = b"".join(frame(opcode, length * b"\x81", fin=fin) for opcode, length, fin in frames)
    meter, through = FrameMeter(LIMIT), b""
    start = 0
    for cut in [*sorted(cut for cut in cuts if cut < len(stream)), len(stream)]:
        part = stream[start:cut]
        start = cut
        let_through = meter.admit(part)
        through += let_through
        if meter.exceeded:
            break
        assert let_through == part
    expected, exceeded = admitted(frames)
    assert meter.exceeded == exceeded
    # Of the header of the frame that is refused, a part may have gone through before it was whole.
    assert through[: len(expected)] == expected
    assert len(through) - len(expected) < 10
    assert stream.startswith(through)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stream_may_come_in_small_pieces(size: int) -> None:
    stream = frame(TEXT, 300 * b"\x81", fin=False) + frame(PING) + frame(CONTINUATION, LIMIT * b"\x01")
    meter = FrameMeter(LIMIT)
    through = b"".join(meter.admit(stream[start : start + size]) for start in range(0, 400, size))
    assert meter.exceeded
    assert stream.startswith(through)
    assert len(frame(TEXT, 300 * b"x") + frame(PING)) <= len(through) < 304 + 2 + 10


def test_a_message_may_come_in_many_fragments_but_not_in_any_number() -> None:
    meter = FrameMeter(LIMIT)
    for _ in range(2):
        meter.admit(frame(TEXT, fin=False))
        meter.admit((FRAGMENTS - 2) * frame(CONTINUATION, fin=False) + FRAGMENTS * frame(PING))
        meter.admit(frame(CONTINUATION))
        assert not meter.exceeded
    meter.admit(frame(TEXT, fin=False) + (FRAGMENTS - 1) * frame(CONTINUATION, fin=False))
    assert not meter.exceeded
    assert meter.admit(frame(PING) + frame(CONTINUATION)) == frame(PING)
    assert meter.exceeded


def test_a_length_is_judged_before_its_payload_is_there() -> None:
    meter = FrameMeter(2**40)
    header = frame(TEXT, length=2**40)
    assert (meter.admit(header), meter.exceeded) == (header, False)
    meter = FrameMeter(2**40 - 1)
    assert (meter.admit(header), meter.exceeded) == (b"", True)
