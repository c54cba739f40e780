"""How messages are spelled on each wire, who decides it, and that another wire is one more file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent import IM, OM, Agent, ConnectError, Disconnected, Limits, ProtocolError, Timeouts, open_agent
from anyagent._open import run_agent
from anyagent.dialects import NATIVE, SINGLE, Dialect, by_name, for_agent
from anyagent.testing import MemoryPeer, memory_agent

from .properties import CLIENT_MESSAGES, REPEATABLE, SERVER_MESSAGES, TEXTS
from .three_lanes import ThreeLanes

if TYPE_CHECKING:
    from collections.abc import Iterator


def written(peer: MemoryPeer) -> list[dict[str, Any]]:
    """What the client has written since the last time, as it stands on the wire."""

    def messages() -> Iterator[bytes]:
        while peer._from_client.statistics().current_buffer_used:
            yield peer._from_client.receive_nowait()

    return [msgspec.json.decode(message) for message in messages()]


async def exchange(agent: Agent, peer: MemoryPeer) -> list[dict[str, Any]]:
    """What the client writes when a tool is called and then the response is left early."""
    response = await agent.send_message("hello")
    await anyio.wait_all_tasks_blocked()
    await response.send_tool_result("call", "output")
    await response.aclose()
    await anyio.wait_all_tasks_blocked()
    return written(peer)


PLAIN = [
    {"type": "USER_MESSAGE", "text": "hello"},
    {"type": "TOOL_RESULT", "call_id": "call", "output": "output"},
]
WITH_IDS = [{**message, "id": "1"} for message in PLAIN]
WITH_CANCEL = [*WITH_IDS, {"type": "CANCEL", "id": "1"}]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ((), PLAIN),
        (("cancel",), PLAIN),
        (("tools", "ID", "Ids"), PLAIN),
        (("ids",), WITH_IDS),
        (("ids", "cancel"), WITH_CANCEL),
        (("cancel", "something newer", "ids", "ids"), WITH_CANCEL),
    ],
)
async def test_the_first_status_decides_what_is_written(
    features: tuple[str, ...], expected: list[dict[str, Any]]
) -> None:
    async with memory_agent(status=OM.Status("ready", features)) as (agent, peer):
        assert await exchange(agent, peer) == expected


@pytest.mark.anyio
async def test_a_later_status_does_not_change_the_dialect() -> None:
    async with memory_agent(wire="single") as (agent, peer):
        peer.send(OM.Status("upgraded", ("ids", "cancel")))
        await anyio.wait_all_tasks_blocked()
        assert agent.status.features == ("ids", "cancel")
        assert await exchange(agent, peer) == PLAIN


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("dialect", "features", "expected"),
    [
        ("single", ("ids", "cancel"), PLAIN),
        ("native", (), WITH_IDS),
        ("native", ("cancel",), WITH_CANCEL),
        (SINGLE, ("ids", "cancel"), PLAIN),
        (NATIVE, (), WITH_IDS),
    ],
)
async def test_a_dialect_that_is_asked_for_is_spoken_whatever_the_status_says(
    dialect: Dialect | str, features: tuple[str, ...], expected: list[dict[str, Any]]
) -> None:
    async with memory_agent(status=OM.Status("ready", features), dialect=dialect) as (agent, peer):
        assert await exchange(agent, peer) == expected


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["", "Native", "singles", "three lanes"])
async def test_an_unknown_dialect_is_refused_before_anything_is_sent(name: str) -> None:
    with pytest.raises(ValueError, match=f"not '{name}'"):
        async with open_agent("ws://127.0.0.1:1", dialect=name):
            raise AssertionError("there is no such dialect")


class Backwards(ThreeLanes):
    def decode(self, data: bytes | memoryview) -> OM.ServerMessage:
        return super().decode(bytes(data)[::-1])


@pytest.mark.anyio
@pytest.mark.parametrize("backwards", [True, False])
async def test_the_first_message_is_read_in_the_dialect_that_is_asked_for(backwards: bool) -> None:
    peer = MemoryPeer()
    peer.send(OM.encode(OM.Status("ready"))[:: -1 if backwards else 1])
    try:
        async with run_agent(
            peer.connect,
            dialect=Backwards(),
            limits=Limits(),
            timeouts=Timeouts(),
            heartbeat=None,
            on_notice=None,
        ) as agent:
            assert agent.status == OM.Status("ready")
            assert backwards
    except ConnectError:
        assert not backwards
    finally:
        peer.end()


@settings(REPEATABLE, max_examples=30)
@given(st.lists(TEXTS | st.sampled_from(["ids", "cancel"])).map(tuple))
def test_the_feature_ids_alone_settles_the_dialect(features: tuple[str, ...]) -> None:
    status = OM.Status("ready", features)
    assert for_agent(status) is (NATIVE if "ids" in features else SINGLE)
    assert NATIVE.can_cancel(status) is ("cancel" in features)
    assert not SINGLE.can_cancel(status)


def test_built_in_dialects_are_found_by_name() -> None:
    assert by_name("native") is NATIVE
    assert by_name("single") is SINGLE
    assert (NATIVE.lanes, SINGLE.lanes) == (None, ("",))


@settings(REPEATABLE)
@given(CLIENT_MESSAGES)
def test_the_single_wire_carries_no_id(message: IM.ClientMessage) -> None:
    on_the_wire = msgspec.json.decode(SINGLE.encode(message))
    assert "id" not in on_the_wire
    expected = msgspec.json.decode(NATIVE.encode(message))
    expected.pop("id", None)
    assert on_the_wire == expected


@settings(REPEATABLE)
@given(SERVER_MESSAGES)
def test_every_event_of_the_single_wire_has_its_one_lane_and_of_the_native_wire_its_id(
    message: OM.ServerMessage,
) -> None:
    data = OM.encode(message)
    assert SINGLE.decode(data) == NATIVE.decode(data) == message
    if isinstance(message, OM.AgentEvent):
        assert SINGLE.lane_of(message) == ""
        assert NATIVE.lane_of(message) == message.id
    unknown = OM.Unknown("NEWER", "{}", id="7")
    assert SINGLE.lane_of(unknown) is None
    assert NATIVE.lane_of(unknown) == "7"


@pytest.mark.anyio
async def test_an_id_means_nothing_on_the_single_wire() -> None:
    notices: list[OM.ServerMessage] = []
    async with memory_agent(wire="single", on_notice=notices.append) as (agent, peer):
        response = await agent.send_message("hello")
        await anyio.wait_all_tasks_blocked()
        newer = OM.Unknown("NEWER", '{"type":"NEWER","id":""}', id="")
        peer.send(OM.EventTextChunk("a", id="another"), newer, OM.EventTextChunk("b"), OM.EventEnd(1, id=""))
        assert (await response.collect()).text == "ab"
        assert notices == [newer]
        other = await agent.send_message("hello again")
        await anyio.wait_all_tasks_blocked()
        peer.send(b'{"type":"AGENT_EVENT_TEXT_CHUNK","text":5,"id":""}')
        with pytest.raises(ProtocolError) as caught:
            await other.collect()
        assert caught.value.request_id is None
    assert peer.close_code == 1002


@pytest.mark.anyio
async def test_three_requests_at_once_on_three_named_lanes_and_the_fourth_waits() -> None:
    answers: dict[str, str] = {}

    async def ask(agent: Agent, prompt: str) -> None:
        answers[prompt] = (await agent.ask(prompt)).text

    async with memory_agent(wire="single", dialect=ThreeLanes()) as (agent, peer):
        async with anyio.create_task_group() as tasks:
            for prompt in ("one", "two", "three", "four"):
                tasks.start_soon(ask, agent, prompt)
                await anyio.wait_all_tasks_blocked()
            assert written(peer) == [
                {"type": "USER_MESSAGE", "text": "one", "lane": "A"},
                {"type": "USER_MESSAGE", "text": "two", "lane": "B"},
                {"type": "USER_MESSAGE", "text": "three", "lane": "C"},
            ]
            peer.send(chunk("A", "1"), chunk("C", "3"), chunk("B", "2"), chunk("A", "1"), end("B"))
            await anyio.wait_all_tasks_blocked()
            assert written(peer) == [{"type": "USER_MESSAGE", "text": "four", "lane": "B"}]
            peer.send(chunk("B", "4"), end("A"), end("C"), end("B"))
        assert answers == {"one": "11", "two": "2", "three": "3", "four": "4"}
        assert agent.in_flight == 0


@pytest.mark.anyio
async def test_a_named_lane_that_was_left_early_is_drained_before_it_is_used_again() -> None:
    async with memory_agent(wire="single", dialect=ThreeLanes()) as (agent, peer):
        left, *others = [await agent.send_message("hello") for _ in range(3)]
        await anyio.wait_all_tasks_blocked()
        assert [message["lane"] for message in written(peer)] == ["A", "B", "C"]
        await left.aclose()
        answers: list[str] = []

        async def ask() -> None:
            answers.append((await agent.ask("next")).text)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            for late in (chunk("A", "late"), chunk("A", "later"), b'{"type":"NEWER","lane":"A"}'):
                peer.send(late, chunk("C", "c"))
                await anyio.wait_all_tasks_blocked()
                assert written(peer) == []
                assert agent.in_flight == 3
            peer.send(end("A"))
            await anyio.wait_all_tasks_blocked()
            assert written(peer) == [{"type": "USER_MESSAGE", "text": "next", "lane": "A"}]
            peer.send(chunk("A", "on time"), end("A"), end("B"), end("C"))
        assert answers == ["on time"]
        assert [(await other.collect()).text for other in others] == ["", "ccc"]
        assert agent.stats.late_events == 3


@pytest.mark.anyio
async def test_a_named_lane_that_does_not_drain_in_time_is_never_used_again() -> None:
    async with memory_agent(wire="single", dialect=ThreeLanes(), timeouts=Timeouts(drain=7)) as (agent, peer):
        left, other = [await agent.send_message("hello") for _ in range(2)]
        await anyio.wait_all_tasks_blocked()
        await left.aclose()
        await anyio.sleep(6)
        assert peer.close_code is None
        with pytest.raises(Disconnected, match="did not end within 7 s"):
            await other.collect()
        with pytest.raises(Disconnected):
            await agent.send_message("next")
    assert peer.close_code == 1000


@pytest.mark.anyio
async def test_an_invalid_message_fails_the_request_on_the_named_lane_alone() -> None:
    async with memory_agent(wire="single", dialect=ThreeLanes()) as (agent, peer):
        spoiled, other = [await agent.send_message("hello") for _ in range(2)]
        await anyio.wait_all_tasks_blocked()
        peer.send(chunk("A", "1"), b'{"type":"AGENT_EVENT_END","lane":"A"}', chunk("B", "2"), end("B"))
        with pytest.raises(ProtocolError) as caught:
            await spoiled.collect()
        assert caught.value.request_id == "A"
        assert (await other.collect()).text == "2"
        assert agent.in_flight == 1
        peer.send(end("A"))
        await anyio.wait_all_tasks_blocked()
        assert agent.in_flight == 0


@pytest.mark.anyio
async def test_a_named_lane_is_drained_even_where_the_agent_is_told_to_stop() -> None:
    class Cancellable(ThreeLanes):
        lanes = ("A",)

        def can_cancel(self, status: OM.Status) -> bool:
            return True

    async with memory_agent(wire="single", dialect=Cancellable()) as (agent, peer):
        left = await agent.send_message("hello")
        await anyio.wait_all_tasks_blocked()
        await left.aclose()
        answers: list[str] = []

        async def ask() -> None:
            answers.append((await agent.ask("next")).text)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            assert written(peer) == [
                {"type": "USER_MESSAGE", "text": "hello", "lane": "A"},
                {"type": "CANCEL", "lane": "A"},
            ]
            peer.send(chunk("A", "late"), end("A"))
            await anyio.wait_all_tasks_blocked()
            assert written(peer) == [{"type": "USER_MESSAGE", "text": "next", "lane": "A"}]
            peer.send(chunk("A", "on time"), end("A"))
        assert answers == ["on time"]


def chunk(lane: str, text: str) -> bytes:
    return msgspec.json.encode({"type": "AGENT_EVENT_TEXT_CHUNK", "text": text, "lane": lane})


def end(lane: str) -> bytes:
    return msgspec.json.encode({"type": "AGENT_EVENT_END", "tokens_used": 1, "lane": lane})
