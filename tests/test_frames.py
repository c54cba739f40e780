"""Taking texts out of a stream in front of a WebSocket library changes nothing but who delivers them.

Held against both libraries that the transports use: each, fed with what the splitter passes on, and the same
library fed with the whole stream in the same reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent._transports import frames
from anyagent._transports.frames import FRAGMENTS, FrameSplitter

from .frame_streams import (
    ANYTHING,
    BROKEN,
    BoundedFrames,
    Library,
    Websockets,
    Wsproto,
    bounded_frames,
    header_at,
    reads,
    streams,
    with_length,
)
from .properties import REPEATABLE
from .wire_server import BINARY, CONTINUATION, PING, PONG, TEXT, frame, text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LARGE = 2**40
LIMIT = 70_000

LIBRARIES = pytest.mark.parametrize("library", [Wsproto, Websockets])


# What a splitter does to a stream, and what it never may


class Pieces(NamedTuple):
    texts: list[bytes]
    passed: bytes


class Checked:
    """A splitter, and the account of every byte that it was given: taken, passed on or `held`."""

    def __init__(self, message_size: int) -> None:
        self.consumed = 0
        self.held = b""
        self._message_size = message_size
        self._splitter = FrameSplitter(message_size)

    @property
    def exceeded(self) -> bool:
        return self._splitter.exceeded

    def split(self, data: bytes) -> Pieces:
        texts, passed = self._splitter.split(data)
        self._account(self.held + data, texts, passed)
        if not self.exceeded:
            self._check_held()
        return Pieces(texts, passed)

    def _account(self, given: bytes, texts: list[bytes], passed: bytes) -> None:
        """Nothing is lost, invented or moved, but for pings and pongs, which the texts behind overtake."""
        position = overtaken = 0
        for each in texts:
            each.decode()
            whole = text(each)
            while not given.startswith(whole, position):
                assert passed[overtaken] in (0x80 | PING, 0x80 | PONG)
                size = 2 + passed[overtaken + 1]
                assert given[position : position + size] == passed[overtaken : overtaken + size]
                position += size
                overtaken += size
            position += len(whole)
        assert given.startswith(passed[overtaken:], position)
        position += len(passed) - overtaken
        self.consumed += position
        self.held = given[position:]

    def _check_held(self) -> None:
        """Only the beginning of a header or of a text that can be taken is worth waiting for."""
        header = header_at(self.held, 0)
        if header is None:
            assert len(self.held) < 10
        else:
            assert (header.first, header.masked, header.minimal) == (0x81, False, True)
            assert header.length <= self._message_size
            assert len(self.held) < header.start + header.length


def first_excess(stream: bytes, message_size: int, fragments: int) -> tuple[int, int] | None:
    """Where the header begins and ends with which a message is too large or in too many frames.

    The frames before may be illegal: then the library has failed, and this is of no importance.
    """
    position = size = count = 0
    while (header := header_at(stream, position)) is not None:
        opcode = header.first & 0x0F
        legal = header.first & 0x70 == 0 and not header.masked
        if legal and opcode in (CONTINUATION, TEXT, BINARY) and (opcode == CONTINUATION) == (count > 0):
            size += header.length
            count += 1
            if size > message_size or count > fragments:
                return position, header.start
            if header.first & 0x80:
                size = count = 0
        elif not legal or opcode not in (PING, PONG):
            return None
        position = header.start + header.length
    return None


def check_nothing_changes(
    library: Callable[[], Library], pieces: Iterable[bytes], message_size: int, fragments: int = FRAGMENTS
) -> None:
    """Feed `pieces` to the library, with a splitter in front and without."""
    pieces = list(pieces)
    excess = first_excess(b"".join(pieces), message_size, fragments)
    splitter, behind, alone = Checked(message_size), library(), library()
    messages: list[tuple[str, bytes]] = []
    arrived = 0
    for data in pieces:
        if alone.end is None:
            alone.feed(data if excess is None else data[: max(excess[0] - arrived, 0)])
        arrived += len(data)
        texts, passed = splitter.split(data)
        behind.messages.clear()
        if passed:
            behind.feed(passed)
        messages += [("text", each) for each in texts] + behind.messages
        assert messages == alone.messages
        if behind.end is not None:
            assert behind.end == alone.end
            return  # both transports end here, and never come back for more
        assert splitter.exceeded == (excess is not None and excess[1] <= arrived and alone.end is None)
        if splitter.exceeded:
            assert excess is not None
            assert splitter.consumed == excess[0]
            return
        # What is held because it is incomplete a library may already know to be bad.
        assert alone.end in (None, ("failed", 1002 if header_at(splitter.held, 0) is None else 1007, ""))
        assert alone.end is None or splitter.held
    behind.messages.clear()
    if splitter.held:
        behind.feed(splitter.held)
    assert (behind.messages, behind.end) == ([], alone.end)


def split_all(splitter: FrameSplitter | Checked, pieces: Iterable[bytes]) -> Pieces:
    texts, passed = [], b""
    for data in pieces:
        more_texts, more_passed = splitter.split(data)
        texts += more_texts
        passed += more_passed
    return Pieces(texts, passed)


# Properties


@LIBRARIES
@settings(REPEATABLE, max_examples=600)
@given(data=st.data())
def test_a_library_behind_a_splitter_delivers_and_fails_as_it_does_alone(
    library: Callable[[], Library], data: st.DataObject
) -> None:
    stream = data.draw(streams())
    check_nothing_changes(library, data.draw(reads(stream)), LARGE)


@LIBRARIES
@settings(REPEATABLE, max_examples=400)
@given(data=st.data(), message_size=st.sampled_from([0, 5, 125, 126, 300, 65_535, LIMIT]))
def test_a_limit_changes_nothing_before_the_message_that_is_too_large(
    library: Callable[[], Library], data: st.DataObject, message_size: int
) -> None:
    stream = data.draw(streams())
    check_nothing_changes(library, data.draw(reads(stream)), message_size)


@LIBRARIES
@settings(REPEATABLE, max_examples=400)
@given(data=st.data(), bounded=bounded_frames())
def test_a_message_is_refused_exactly_when_its_headers_say_that_it_is_too_large(
    library: Callable[[], Library], data: st.DataObject, bounded: BoundedFrames
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "FRAGMENTS", bounded.fragments)
        pieces = data.draw(reads(bounded.stream))
        check_nothing_changes(library, pieces, bounded.message_size, bounded.fragments)


@LIBRARIES
@settings(REPEATABLE, max_examples=200)
@given(data=st.data(), junk=st.binary(max_size=300), message_size=st.sampled_from([50, LARGE]))
def test_random_bytes_change_nothing_either(
    library: Callable[[], Library], data: st.DataObject, junk: bytes, message_size: int
) -> None:
    check_nothing_changes(library, data.draw(reads(junk)), message_size)


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
@settings(REPEATABLE, max_examples=10)
@given(data=st.data(), before=st.lists(st.text(max_size=3), max_size=2), after=ANYTHING)
def test_behind_a_close_frame_or_a_violation_everything_passes_for_good(
    broken: bytes, data: st.DataObject, before: list[str], after: bytes
) -> None:
    splitter = Checked(LARGE)
    stream = b"".join(text(each.encode()) for each in before) + broken
    taken = split_all(splitter, data.draw(reads(stream)))
    assert taken.texts == [each.encode() for each in before][: len(taken.texts)]
    for read in data.draw(reads(after)):
        assert splitter.split(read) == ([], read)
    assert splitter.split(text(b"x")) == ([], text(b"x"))
    assert (splitter.held, splitter.exceeded) == (b"", False)


# Examples


def test_texts_of_any_length_are_taken_and_nothing_is_passed_on() -> None:
    payloads = [size * b"x" for size in (0, 1, 125, 126, 127, 65_535, 65_536, LIMIT)]
    splitter = FrameSplitter(LIMIT)
    assert splitter.split(b"".join(map(text, payloads))) == (payloads, b"")
    assert not splitter.exceeded


@pytest.mark.parametrize(("length", "size"), [(0, 2), (125, 2), (0, 8), (125, 8), (126, 8), (65_535, 8)])
@LIBRARIES
def test_a_text_whose_length_is_written_in_too_many_bytes_is_for_the_library_to_judge(
    library: Callable[[], Library], length: int, size: int
) -> None:
    wasteful = with_length(0x81, length, size, length * b"x")
    assert FrameSplitter(LIMIT).split(text(b"one") + wasteful) == ([b"one"], wasteful)
    check_nothing_changes(library, [text(b"one") + wasteful, text(b"two")], LIMIT)


def test_a_ping_between_texts_passes_and_texts_are_still_taken_in_the_same_read() -> None:
    pings = frame(PING, b"p"), frame(PONG), frame(PING, 125 * b"p")
    splitter = FrameSplitter(LIMIT)
    stream = pings[0] + text(b"one") + pings[1] + pings[2] + text(b"two") + text("dr\u00e9i".encode())
    assert splitter.split(stream) == ([b"one", b"two", "dr\u00e9i".encode()], b"".join(pings))


@pytest.mark.parametrize("cut", range(1, 9))
def test_after_a_ping_that_is_cut_texts_are_taken_from_a_read_that_begins_behind_it(cut: int) -> None:
    stream = frame(PING, b"abcde") + text(b"x")
    splitter = FrameSplitter(LIMIT)
    texts, passed = split_all(splitter, [stream[:cut], stream[cut:]])
    if 2 <= cut < 7:  # what follows in the same read is not taken
        assert (texts, passed) == ([], stream)
    else:
        assert (texts, passed) == ([b"x"], frame(PING, b"abcde"))
    assert splitter.split(text(b"y")) == ([b"y"], b"")


def test_after_a_fragmented_message_texts_are_taken_again_from_the_next_read_on() -> None:
    splitter = FrameSplitter(LIMIT)
    beginning = frame(TEXT, b"one", fin=False)
    assert splitter.split(text(b"zero") + beginning) == ([b"zero"], beginning)
    for part in (frame(PING), frame(CONTINUATION, b"two", fin=False), frame(PONG, b"x")):
        assert splitter.split(part) == ([], part)
    end = frame(CONTINUATION, b"three")
    assert splitter.split(end + text(b"in the same read")) == ([], end + text(b"in the same read"))
    assert splitter.split(text(b"next") + text(b"last")) == ([b"next", b"last"], b"")


def test_a_text_that_is_cut_behind_a_passed_message_is_passed_and_the_next_is_taken() -> None:
    splitter = FrameSplitter(LIMIT)
    first = frame(BINARY, b"x") + text(b"cut")[:4]
    assert splitter.split(first) == ([], first)
    rest = text(b"cut")[4:]
    assert splitter.split(rest) == ([], rest)
    assert splitter.split(text(b"next")) == ([b"next"], b"")


def test_a_text_whose_header_is_cut_behind_a_passed_message_is_taken() -> None:
    splitter = FrameSplitter(LIMIT)
    assert splitter.split(frame(BINARY, b"x") + text(300 * b"y")[:3]) == ([], frame(BINARY, b"x"))
    assert splitter.split(text(300 * b"y")[3:]) == ([300 * b"y"], b"")


def test_text_that_is_no_utf8_passes_with_all_that_was_read_with_it_and_nothing_is_taken_again() -> None:
    splitter = FrameSplitter(LIMIT)
    assert splitter.split(text(b"one")) == ([b"one"], b"")
    stream = text(b"two") + frame(PING) + text(b"\xc3") + text(b"\xa9") + text(b"three")[:3]
    assert splitter.split(stream) == ([], stream)
    for later in (text(b"three")[3:], text(b"four"), text((LIMIT + 1) * b"x")):
        assert splitter.split(later) == ([], later)
    assert not splitter.exceeded


def test_all_the_bytes_after_a_close_frame_pass() -> None:
    splitter = FrameSplitter(5)
    stream = frame(0x8, b"\x03\xe8") + text(b"x") + text(b"far too large")
    assert splitter.split(text(b"last") + stream) == ([b"last"], stream)
    assert splitter.split(text(b"x") + b"\x81") == ([], text(b"x") + b"\x81")
    assert splitter.split(b"") == ([], b"")
    assert not splitter.exceeded


@pytest.mark.parametrize("size", [1, 2, 3, 7, LIMIT])
def test_the_same_is_let_through_however_the_stream_is_cut(size: int) -> None:
    stream = text(b"one") + frame(TEXT, 300 * b"x", fin=False) + frame(PING)
    over = frame(CONTINUATION, LIMIT * b"y")
    splitter = Checked(LIMIT)
    pieces = [(stream + over)[start : start + size] for start in range(0, len(stream + over), size)]
    texts: list[bytes] = []
    for data in pieces:
        texts += splitter.split(data).texts
        if splitter.exceeded:
            break
    assert splitter.exceeded
    assert (texts, splitter.consumed) == ([b"one"], len(stream))


def test_a_message_may_come_in_many_fragments_but_not_in_any_number() -> None:
    splitter = FrameSplitter(LIMIT)
    empty = frame(CONTINUATION, fin=False)
    for first in (frame(TEXT, fin=False), frame(BINARY, fin=False)):
        for part in (first, (FRAGMENTS - 2) * empty + 10 * frame(PING), frame(CONTINUATION)):
            assert splitter.split(part) == ([], part)
    almost = frame(TEXT, fin=False) + (FRAGMENTS - 1) * empty
    assert splitter.split(almost) == ([], almost)
    assert not splitter.exceeded
    assert splitter.split(frame(PING) + frame(CONTINUATION)) == ([], frame(PING))
    assert splitter.exceeded


@pytest.mark.parametrize("first", [0x81, 0x82, 0x01, 0x02])
def test_a_length_is_judged_before_its_payload_is_there(first: int) -> None:
    header = with_length(first, LARGE, 8)
    within, beyond = Checked(LARGE), Checked(LARGE - 1)
    assert not within.split(text(b"x") + header).passed.startswith(b"\x81")
    assert not within.exceeded
    for byte in (text(b"x") + header)[:-1]:
        assert beyond.split(bytes((byte,))).passed == b""
        assert not beyond.exceeded
    assert beyond.split(header[-1:]) == ([], b"")
    assert beyond.exceeded


def test_lengths_of_one_message_are_added_up_and_those_of_two_are_not() -> None:
    whole = frame(TEXT, 6 * b"x", fin=False) + frame(CONTINUATION, 4 * b"x")
    splitter = FrameSplitter(10)
    for part in (whole, whole, frame(BINARY, 10 * b"x") + whole, frame(TEXT, 6 * b"x", fin=False)):
        assert splitter.split(part) == ([], part)
    assert splitter.split(frame(PING, 50 * b"x") + frame(CONTINUATION, 5 * b"x"))[1] == frame(PING, 50 * b"x")
    assert splitter.exceeded


def test_nothing_behind_a_message_that_is_too_large_is_taken_or_passed_on() -> None:
    splitter = FrameSplitter(5)
    assert splitter.split(text(b"12345") + text(b"123456") + frame(PING)) == ([b"12345"], b"")
    assert splitter.exceeded
    assert splitter.split(text(b"1") + frame(PING)) == ([], b"")
