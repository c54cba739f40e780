"""Whatever bytes an agent sends: a message or a `ProtocolError`, and no harm to anybody else's request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anyagent import (
    IM,
    OM,
    Agent,
    AgentError,
    AnyAgentError,
    ConnectError,
    Disconnected,
    Limits,
    ProtocolError,
    Reply,
    Timeouts,
)
from anyagent._open import run_agent
from anyagent.dialects import NATIVE, SINGLE, Dialect
from anyagent.testing import MemoryPeer, memory_agent

from .properties import CLIENT_MESSAGES, REPEATABLE, SERVER_MESSAGES, run, settle

if TYPE_CHECKING:
    from collections.abc import Callable

DEEP: Final = 100_000
CHUNK: Final = b'{"type":"AGENT_EVENT_TEXT_CHUNK","id":"1","text":'
END: Final = b'{"type":"AGENT_EVENT_END","id":"1","tokens_used":'
FAREWELL: Final = b'{"type":"GRACEFUL_DISCONNECT","deadline":'

EXAMPLES: Final = {
    "nothing": b"",
    "a NUL": b"\0",
    "a message and a NUL": END + b"1}\0",
    "a byte order mark": b"\xef\xbb\xbf" + END + b"1}",
    "UTF-16": (END + b"1}").decode().encode("utf-16"),
    "two messages": 2 * (END + b"1}"),
    "a list": b"[]",
    "a number": b"1",
    "a string": b'"STATUS"',
    "null": b"null",
    "an empty object": b"{}",
    "no type": b'{"id":"1"}',
    "a number for a type": b'{"type":1,"id":"1"}',
    "a number for an id": b'{"type":"NEWER","id":1}',
    "a huge number for an id": b'{"type":"NEWER","id":' + b"1" * 10_000 + b"}",
    "a huge number of tokens": END + b"1" * 10_000 + b"}",
    "a number with a huge exponent": END + b"1e999999999999}",
    "a huge number where it is skipped": END + b'1,"newer":' + b"1" * 10_000 + b"}",
    "a huge deadline": FAREWELL + b"1e308}",
    "too huge a deadline": FAREWELL + b"1e309}",
    "a deadline that is no number": FAREWELL + b"NaN}",
    "a negative deadline": FAREWELL + b"-1}",
    "a deadline of minus zero": FAREWELL + b"-0.0}",
    "a huge limit": b'{"type":"STATUS","state":"","max_in_flight":' + b"9" * 1_000 + b"}",
    "no room for requests": b'{"type":"STATUS","state":"","max_in_flight":0}',
    "lists nested deeply": b"[" * DEEP + b"]" * DEEP,
    "objects nested deeply": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "lists opened and not closed": b"[" * DEEP,
    "objects opened and not closed": b'{"type":' * DEEP,
    "a text nested deeply": CHUNK + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep nesting where it is skipped": CHUNK + b'"","newer":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep nesting in an unknown type": b'{"type":"NEWER","id":"1","a":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "a lone surrogate for a text": CHUNK + rb'"\ud800"}',
    "the wrong half of a surrogate": CHUNK + rb'"\udc00"}',
    "a lone surrogate for a type": rb'{"type":"\ud800","id":"1"}',
    "a lone surrogate for an id": rb'{"type":"NEWER","id":"\ud800"}',
    "an escaped NUL": CHUNK + rb'"\u0000"}',
    "a raw control character": CHUNK + b'"\n"}',
    "a bad escape": CHUNK + rb'"\x00"}',
    "bad UTF-8 in a text": CHUNK + b'"\xff"}',
    "bad UTF-8 in a type": b'{"type":"\xff","id":"1"}',
    "bad UTF-8 in an id": b'{"type":"NEWER","id":"\xff"}',
    "bad UTF-8 in a key": b'{"type":"NEWER","\xff":"1"}',
    "bad UTF-8 where it is skipped": CHUNK + b'5,"newer":"\xff"}',
    "bad UTF-8 before everything": b"\xff" + END + b"1}",
    "bad UTF-8 behind everything": END + b"1}\xff",
    "a surrogate in UTF-8": CHUNK + b'"\xed\xa0\x80"}',
    "an overlong NUL": CHUNK + b'"\xc0\x80"}',
    "UTF-8 that is cut off": CHUNK + b'"\xe2\x82"}',
    "two types": b'{"type":"NEWER","id":"1","type":"AGENT_EVENT_END","tokens_used":1}',
    "two types the other way round": b'{"type":"AGENT_EVENT_END","id":"1","type":"NEWER","tokens_used":"x"}',
    "two ids": CHUNK + b'5,"id":"2"}',
    "two ids, the other one first": b'{"id":"2",' + CHUNK[1:] + b"5}",
    "two texts": CHUNK + b'5,"text":"a"}',
}

FRAGMENTS: Final = (
    *(b'"id":"1"', b'"id":"2"', b'"id":3', b'"id":null', b'"type":"STATUS"', b'"type":"ERROR"', b'"text":'),
    *(b'"type":"AGENT_EVENT_TEXT_CHUNK"', b'"type":"AGENT_EVENT_END"', b'"type":"GRACEFUL_DISCONNECT"'),
    *(b'"type":"NEWER"', b'"tokens_used":', b'"state":', b'"code":', b'"details":', b'"deadline":', b'"x":'),
    *(b'""', b'"a"', b"1", b"-1", b"1e400", b"1e5", b"null", b"true", b"NaN", b"[", b"]", b"[[1],{}]", b"{}"),
    *(b"{", b"{", b"{", b"}", b"}", b"}", b",", b",", b",", b",", b" ", b"\n", b"\0", b"\xff", b"\xc3\xa9"),
    *(
        b'"\xff"',
        b'"\xc3"',
        rb'"\ud800"',
        rb'"\ud83d\ude00"',
        rb'"\u0000"',
        b'"',
        b"\\",
        b"9" * 400,
        b"[" * 2_000,
    ),
)

MESSAGES: Final = SERVER_MESSAGES | st.builds(
    lambda message, number: msgspec.structs.replace(message, id=number),
    SERVER_MESSAGES.filter(lambda message: hasattr(message, "id")),
    st.sampled_from(["1", "2"]),
)


@st.composite
def mutated(draw: st.DrawFn, message: st.SearchStrategy[bytes]) -> bytes:
    """A message that was cut, or in which bytes were lost, added, doubled or changed."""
    data = bytearray(draw(message))
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted(draw(st.tuples(*2 * [st.integers(0, len(data))])))
        data[start : min(end, start + 4)] = draw(
            st.one_of(
                st.just(b""),
                st.binary(max_size=3),
                st.sampled_from(FRAGMENTS),
                st.just(bytes(data[start:end])),
            )
        )
    return bytes(data[: draw(st.just(len(data)) | st.integers(0, len(data)))])


def hostile(message: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    fields = st.lists(st.sampled_from(FRAGMENTS[:-17]), max_size=5).map(b",".join)
    return st.one_of(
        st.binary(),
        st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(b"".join),
        fields.map(lambda inner: b"{" + inner.replace(b":,", b":") + b"}"),
        mutated(message),
        message,
        st.sampled_from(sorted(EXAMPLES.values())),
    )


HOSTILE: Final = hostile(MESSAGES.map(OM.encode))


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def readable_id(data: bytes) -> str | None:
    """The id in `data`, if that is JSON without anything that could be held against it."""
    try:
        message = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    request_id = message.get("id") if isinstance(message, dict) else None
    return request_id if isinstance(request_id, str) else None


def decode(dialect: Dialect, data: bytes | memoryview) -> OM.ServerMessage | ProtocolError:
    """What becomes of `data`; any other exception than `ProtocolError` comes through."""
    try:
        return dialect.decode(data)
    except ProtocolError as exc:
        return exc


def check_decoding(data: bytes) -> None:
    for dialect in (NATIVE, SINGLE):
        result = decode(dialect, data)
        if isinstance(result, ProtocolError):
            assert result.close_code == (1002 if is_utf8(data) else 1007)
            expected = readable_id(data) if dialect is NATIVE else None
            assert result.request_id == expected or (expected is None and dialect is NATIVE)
            assert len(str(result)) < 1_000
        else:
            assert isinstance(result, OM.ServerMessage)
            assert decode(dialect, memoryview(data)) == result


@pytest.mark.parametrize("data", EXAMPLES.values(), ids=EXAMPLES)
def test_no_message_out_of_an_agent_is_more_than_a_protocol_error(data: bytes) -> None:
    check_decoding(data)
    for cut in range(min(len(data), 80)):
        check_decoding(data[:cut])


@settings(REPEATABLE, max_examples=1_000)
@given(HOSTILE)
def test_any_bytes_out_of_an_agent_are_a_message_or_a_protocol_error(data: bytes) -> None:
    check_decoding(data)


@pytest.mark.parametrize("data", EXAMPLES.values(), ids=EXAMPLES)
def test_no_message_of_a_client_is_more_than_a_protocol_error(data: bytes) -> None:
    check_client(data.replace(b"AGENT_EVENT_TEXT_CHUNK", b"USER_MESSAGE"))
    check_client(data.replace(b"AGENT_EVENT_END", b"CANCEL"))


@settings(REPEATABLE, max_examples=500)
@given(hostile(CLIENT_MESSAGES.map(IM.encode)) | st.text(st.characters(codec=None)))
@example("\ud800")
def test_any_bytes_or_text_of_a_client_are_a_message_or_a_protocol_error(data: bytes | str) -> None:
    check_client(data)


def check_client(data: bytes | str) -> None:
    try:
        message = IM.decode(data)
    except ProtocolError:
        pass
    else:
        assert isinstance(message, IM.ClientMessage)


class Scene:
    """Two requests, and what became of them; the first is being answered when the hostile message comes."""

    def __init__(self, agent: Agent, peer: MemoryPeer) -> None:
        self.outcomes: dict[str, Reply | AnyAgentError] = {}
        self.cancels: list[str | None] = []
        self.agent = agent
        self.peer = peer

    async def ask(self, prompt: str) -> None:
        try:
            self.outcomes[prompt] = await self.agent.ask(prompt)
        except AnyAgentError as exc:
            self.outcomes[prompt] = exc

    def hear(self) -> None:
        while self.peer._from_client.statistics().current_buffer_used:
            message = self.peer.receive_nowait()
            if isinstance(message, IM.Cancel):
                self.cancels.append(message.id)


async def play(data: bytes, wire: str, check: Callable[[Scene], None]) -> None:
    """Play the scene with `data` as the hostile message."""
    ids = ("1", "2") if wire == "native" else (None, None)
    async with memory_agent(wire=wire) as (agent, peer), anyio.create_task_group() as tasks:
        scene = Scene(agent, peer)
        for prompt in ("target", "neighbour"):
            tasks.start_soon(scene.ask, prompt)
            await settle()
        peer.send(OM.EventTextChunk("before", id=ids[0]), data)
        if ids[1] is not None:
            peer.send(OM.EventTextChunk("untouched", id=ids[1]))
        await settle()
        scene.hear()
        for request_id in ids:
            if agent.in_flight:
                peer.send(OM.EventEnd(1, id=request_id))
                await settle()
        await anyio.sleep(100)  # beyond all timeouts
        check(scene)
        tasks.cancel_scope.cancel()


def check_native(data: bytes, scene: Scene) -> None:
    target, neighbour = scene.outcomes["target"], scene.outcomes["neighbour"]
    result = decode(NATIVE, data)
    nobodys = isinstance(result, OM.AgentEvent) and result.id is None
    if isinstance(result, ProtocolError) and result.request_id == "1":
        assert isinstance(target, ProtocolError)
        assert target.request_id == "1"
        assert target.partial == Reply("before")
        assert neighbour == Reply("untouched", 1)
        assert scene.cancels == ["1"]
        assert scene.peer.close_code is None
    elif isinstance(result, ProtocolError) and result.request_id == "2":
        assert isinstance(neighbour, ProtocolError)
        assert target == Reply("before", 1)
        assert scene.cancels == ["2"]
        assert scene.peer.close_code is None
    elif isinstance(result, ProtocolError) or (nobodys and not isinstance(result, OM.Error | OM.Unknown)):
        assert scene.peer.close_code == (1002 if nobodys or is_utf8(data) else 1007)
        assert scene.cancels == []
        for error, partial in ((target, "before"), (neighbour, "")):
            assert isinstance(error, ProtocolError)
            assert error.close_code == scene.peer.close_code
            assert error.partial == Reply(partial)
        assert target is not neighbour
    elif isinstance(result, OM.GracefulDisconnect):
        assert scene.peer.close_code == 1000
    else:
        assert scene.peer.close_code is None
        assert isinstance(target, Reply | AgentError)
        assert isinstance(neighbour, Reply | AgentError)
        if not isinstance(result, OM.AgentEvent) or result.id not in ("1", "2"):
            assert (target, neighbour) == (Reply("before", 1), Reply("untouched", 1))


def check_single(data: bytes, scene: Scene) -> None:
    target, neighbour = scene.outcomes["target"], scene.outcomes["neighbour"]
    result = decode(SINGLE, data)
    assert scene.cancels == []
    if isinstance(result, ProtocolError):
        assert scene.peer.close_code == (1002 if is_utf8(data) else 1007)
        assert isinstance(target, ProtocolError)
        assert target.close_code == scene.peer.close_code
        assert target.partial == Reply("before")
        assert isinstance(neighbour, Disconnected)
        assert isinstance(neighbour.__cause__, ProtocolError)
        assert neighbour.phase == "not_sent"
    elif isinstance(result, OM.GracefulDisconnect):
        assert scene.peer.close_code == 1000
        assert isinstance(neighbour, Disconnected)
    else:
        assert scene.peer.close_code is None
        assert isinstance(target, Reply | AgentError)
        assert neighbour == Reply("", 1)


CHECKS: Final = {"native": check_native, "single": check_single}

each_wire = pytest.mark.parametrize("wire", CHECKS)
each_backend = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@each_backend
@each_wire
@pytest.mark.parametrize("data", EXAMPLES.values(), ids=EXAMPLES)
def test_no_message_harms_more_than_the_request_that_it_names(wire: str, backend: str, data: bytes) -> None:
    run(backend, lambda: play(data, wire, lambda scene: CHECKS[wire](data, scene)))


@each_backend
@each_wire
@settings(REPEATABLE, max_examples=200)
@given(data=HOSTILE)
def test_any_bytes_fail_the_request_that_they_name_or_the_connection_or_nobody(
    wire: str, backend: str, data: bytes
) -> None:
    run(backend, lambda: play(data, wire, lambda scene: CHECKS[wire](data, scene)))


@each_backend
@settings(REPEATABLE, max_examples=200)
@given(data=HOSTILE)
def test_any_bytes_in_the_place_of_the_first_status_are_a_status_or_a_connect_error(
    backend: str, data: bytes
) -> None:
    async def main() -> None:
        peer = MemoryPeer()
        peer.send(data)
        try:
            async with run_agent(
                peer.connect,
                dialect=None,
                limits=Limits(),
                timeouts=Timeouts(),
                heartbeat=None,
                on_notice=None,
            ) as agent:
                assert agent.status == decode(NATIVE, data)
        except ConnectError:
            assert not isinstance(decode(NATIVE, data), OM.Status)
        finally:
            peer.end()

    run(backend, main)
