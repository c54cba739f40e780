"""A connection that ends settles every request at once, with its own exception, after what had arrived."""

from __future__ import annotations

import contextlib

import anyio
import pytest

from anyagent import (
    IM,
    OM,
    Agent,
    AgentError,
    Disconnected,
    Heartbeat,
    ProtocolError,
    Response,
    Timeouts,
)
from anyagent.testing import MemoryPeer, memory_agent

pytestmark = pytest.mark.anyio


async def send_three(agent: Agent, peer: MemoryPeer) -> tuple[Response, Response, Response]:
    """One request that is being answered, one that was sent, and one that is still queued."""
    started = await agent.send_message("started")
    sent = await agent.send_message("sent")
    for _ in range(2):
        await peer.receive()
    peer.send(OM.EventTextChunk("arrived", id=started.id))
    await anyio.wait_all_tasks_blocked()
    peer.writable = anyio.Event()
    blocked = await agent.send_message("its write has begun, and blocks")
    await anyio.wait_all_tasks_blocked()
    queued = await agent.send_message("queued")
    await blocked.aclose()
    return started, sent, queued


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1011, "agent crashed"), (1006, "connection lost")])
async def test_every_request_fails_with_its_own_disconnected_and_phase(code: int, reason: str) -> None:
    async with memory_agent(timeouts=Timeouts(close=1)) as (agent, peer):
        started, sent, queued = await send_three(agent, peer)
        peer.close(code, reason)
        errors = []
        for response, text in ((started, "arrived"), (sent, ""), (queued, "")):
            with pytest.raises(Disconnected) as caught:
                await response.collect()
            errors.append(caught.value)
            assert caught.value.partial is not None
            assert caught.value.partial.text == text
        assert [error.phase for error in errors] == ["started", "sent", "not_sent"]
        assert {(error.code, error.reason, error.graceful) for error in errors} == {(code, reason, False)}
        assert len(set(map(id, errors))) == 3
        assert agent.in_flight == 0


async def test_those_who_wait_for_a_lane_and_those_who_come_later_fail_with_not_sent() -> None:
    async def wait_for_a_lane() -> None:
        with pytest.raises(Disconnected) as caught:
            await agent.send_message("waits")
        assert caught.value.phase == "not_sent"
        failed.append(caught.value)

    failed: list[Disconnected] = []
    async with memory_agent(wire="single") as (agent, peer):
        async with anyio.create_task_group() as tasks:
            response = await agent.send_message("first")
            for _ in range(3):
                tasks.start_soon(wait_for_a_lane)
            await anyio.wait_all_tasks_blocked()
            peer.close(1011, "crashed")
        assert len(set(map(id, failed))) == 3
        with pytest.raises(Disconnected, match="crashed"):
            await response.collect()
        with pytest.raises(Disconnected) as caught:
            await agent.ask("too late")
        assert (caught.value.code, caught.value.phase) == (1011, "not_sent")


async def test_a_broken_protocol_fails_requests_with_protocol_error_and_newcomers_with_disconnected() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        peer.send(OM.EventTextChunk("arrived", id=(await peer.receive()).id))
        peer.close(1009, "a message is too large", violation=True)
        with pytest.raises(ProtocolError) as caught:
            await response.collect()
        assert caught.value.close_code == 1009
        assert caught.value.partial is not None
        assert caught.value.partial.text == "arrived"
        with pytest.raises(Disconnected) as refused:
            await agent.ask("too late")
        assert isinstance(refused.value.__cause__, ProtocolError)
    assert peer.close_code == 1009


@pytest.mark.parametrize(
    ("garbage", "code"),
    [
        (b"not JSON", 1002),
        (b"[]", 1002),
        (b"\xff", 1007),
        (b'{"type":"AGENT_EVENT_TEXT_CHUNK","text":5}', 1002),
        (b'{"type":"AGENT_EVENT_TEXT_CHUNK","text":5,"id":"nobody"}', 1002),
        (b'{"type":"AGENT_EVENT_END","tokens_used":1}', 1002),
        (b"[" * 100_000, 1002),
    ],
)
async def test_a_message_that_nobody_can_tell_whose_it_is_fails_the_connection(
    garbage: bytes, code: int
) -> None:
    async with memory_agent() as (agent, peer):
        responses = [await agent.send_message("hello") for _ in range(3)]
        for _ in responses:
            await peer.receive()
        peer.send(
            OM.EventTextChunk("arrived", id=responses[0].id), garbage, OM.EventEnd(1, id=responses[1].id)
        )
        for response, text in zip(responses, ("arrived", "", ""), strict=True):
            with pytest.raises(ProtocolError) as caught:
                await response.collect()
            assert caught.value.close_code == code
            assert caught.value.partial is not None
            assert caught.value.partial.text == text
    assert peer.close_code == code


async def test_garbage_for_a_request_that_was_left_is_dropped() -> None:
    garbage = b'{"type":"AGENT_EVENT_TEXT_CHUNK","text":5,"id":"%s"}'
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("left early")
        await peer.receive()
        await response.aclose()
        peer.send(garbage % response.id.encode())
        await anyio.wait_all_tasks_blocked()
        assert agent.stats.late_events == 1
    async with memory_agent(status=OM.Status("ready", ("ids",))) as (agent, peer):
        response = await agent.send_message("left early, and draining")
        await peer.receive()
        await response.aclose()
        peer.send(garbage % response.id.encode(), OM.EventEnd(1, id=response.id))
        await anyio.wait_all_tasks_blocked()
        assert (agent.stats.late_events, agent.in_flight) == (1, 0)


@pytest.mark.parametrize("wire", ["native", "single"])
async def test_an_agents_error_ends_its_request_after_what_had_arrived(wire: str) -> None:
    async with memory_agent(wire=wire) as (agent, peer):
        response = await agent.send_message("hello")
        request_id = (await peer.receive()).id
        peer.send(
            OM.EventTextChunk("arrived", id=request_id),
            OM.Error("busy", "come back later", retry_after=2.5, id=request_id),
        )
        with pytest.raises(AgentError) as caught:
            await response.collect()
        assert (caught.value.code, caught.value.details, caught.value.retry_after) == (
            "busy",
            "come back later",
            2.5,
        )
        assert caught.value.partial is not None
        assert caught.value.partial.text == "arrived"
        with pytest.raises(AgentError):
            await anext(response)
        assert (agent.stats.failed, agent.in_flight) == (1, 0)
        later = await agent.send_message("the connection lives on")
        peer.send(OM.EventEnd(1, id=(await peer.receive()).id))
        await later.collect()


async def test_an_error_without_id_is_a_notice_and_the_cause_if_the_connection_then_closes() -> None:
    notices: list[OM.ServerMessage] = []
    async with memory_agent(on_notice=notices.append) as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        error = OM.Error("overloaded", "shutting down")
        peer.send(error)
        peer.close(1013, "try again later")
        with pytest.raises(Disconnected) as caught:
            await response.collect()
        assert isinstance(caught.value.__cause__, AgentError)
        assert caught.value.__cause__.code == "overloaded"
        assert notices == [error]


@pytest.mark.parametrize("wire", ["native", "single"])
async def test_what_belongs_to_no_request_is_a_notice_in_order(wire: str) -> None:
    notices: list[OM.ServerMessage] = []
    async with memory_agent(wire=wire, on_notice=notices.append) as (agent, peer):
        messages: list[OM.ServerMessage] = [
            OM.Status("thinking"),
            OM.Error("odd", "but nobody's"),
            OM.Unknown("NEW", '{"type":"NEW","x":1}'),
            OM.Status("about a request", id="17"),
        ]
        peer.send(*messages)
        await anyio.wait_all_tasks_blocked()
        assert notices == messages
        assert agent.status == messages[0]


async def test_on_the_single_wire_events_outside_a_generation_are_notices() -> None:
    notices: list[OM.ServerMessage] = []
    async with memory_agent(wire="single", on_notice=notices.append) as (_, peer):
        peer.send(OM.EventTextChunk("by the way"))
        await anyio.wait_all_tasks_blocked()
        assert notices == [OM.EventTextChunk("by the way")]


async def test_an_unknown_type_with_the_id_of_a_live_request_is_an_event_of_it() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        raw = f'{{"type":"AGENT_EVENT_IMAGE","id":"{response.id}","url":"x"}}'
        peer.send(raw.encode(), OM.EventEnd(1, id=response.id))
        assert [event async for event in response] == [OM.Unknown("AGENT_EVENT_IMAGE", raw, id=response.id)]


async def test_messages_behind_the_first_status_are_not_lost() -> None:
    notices: list[OM.ServerMessage] = []
    status = OM.Status("ready", ("ids",))
    async with memory_agent(status=status, on_notice=notices.append) as (_, peer):
        peer.send(OM.Status("busy"), OM.Status("idle"))
        await anyio.wait_all_tasks_blocked()
        assert notices == [OM.Status("busy"), OM.Status("idle")]


async def test_a_graceful_disconnect_lets_requests_in_flight_run_to_their_end_and_refuses_new_ones() -> None:
    async with memory_agent() as (agent, peer):
        started, sent, queued = await send_three(agent, peer)
        peer.send(OM.GracefulDisconnect("deploying"))
        with pytest.raises(Disconnected) as caught:
            await queued.collect()
        assert (caught.value.graceful, caught.value.phase) == (True, "not_sent")
        with pytest.raises(Disconnected) as caught:
            await agent.ask("too late")
        assert (caught.value.graceful, caught.value.reason) == (True, "deploying")
        assert peer.close_code is None
        peer.writable.set()
        peer.send(OM.EventEnd(1, id=started.id), OM.EventEnd(2, id=sent.id))
        assert (await started.collect()).text == "arrived"
        await sent.collect()
        assert sent.tokens_used == 2
        await anyio.wait_all_tasks_blocked()
        assert peer.close_code == 1000
        with pytest.raises(Disconnected) as caught:
            await agent.ask("too late")
        assert caught.value.graceful


async def test_a_graceful_disconnect_ends_at_the_agents_deadline() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("takes for ever")
        await peer.receive()
        peer.send(OM.GracefulDisconnect("deploying", deadline=7), OM.GracefulDisconnect("said twice"))
        began = anyio.current_time()
        with pytest.raises(Disconnected) as caught:
            await response.collect()
        assert 7 <= anyio.current_time() - began < 8
        assert (caught.value.graceful, caught.value.phase, caught.value.reason) == (True, "sent", "deploying")


async def test_a_graceful_disconnect_of_an_idle_connection_closes_it() -> None:
    async with memory_agent() as (agent, peer):
        peer.send(OM.GracefulDisconnect())
        await anyio.wait_all_tasks_blocked()
        assert peer.close_code == 1000
        with pytest.raises(Disconnected) as caught:
            await agent.send_message("too late")
        assert caught.value.graceful


async def test_the_agents_own_close_after_a_graceful_disconnect_is_graceful() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        peer.send(OM.GracefulDisconnect("deploying"))
        peer.close(1001, "gone")
        with pytest.raises(Disconnected) as caught:
            await response.collect()
        assert (caught.value.graceful, caught.value.code, caught.value.reason) == (True, 1001, "gone")


async def test_an_answer_that_does_not_drain_in_time_closes_the_single_wire() -> None:
    async with memory_agent(wire="single", timeouts=Timeouts(drain=9)) as (agent, peer):
        response = await agent.send_message("left early")
        await peer.receive()
        await response.aclose()
        began = anyio.current_time()
        with pytest.raises(Disconnected, match=r"did not end within 9 s") as caught:
            await agent.ask("waits for the lane")
        assert 9 <= anyio.current_time() - began < 10
        assert caught.value.phase == "not_sent"
        await anyio.wait_all_tasks_blocked()
        assert peer.close_code == 1000
        with pytest.raises(anyio.EndOfStream):
            peer.receive_nowait()


async def test_silence_is_noticed_by_a_ping_that_nothing_answers() -> None:
    async with memory_agent(heartbeat=Heartbeat(interval=20, timeout=10)) as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        began = anyio.current_time()
        with pytest.raises(Disconnected, match="nothing heard for 30 s") as caught:
            await response.collect()
        assert 30 <= anyio.current_time() - began < 31
        assert (caught.value.code, caught.value.phase, peer.pings) == (1006, "sent", 1)


async def test_anything_that_arrives_counts_as_life_and_saves_the_ping() -> None:
    async with memory_agent(heartbeat=Heartbeat(interval=4, timeout=2)) as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        for _ in range(5):
            await anyio.sleep(3)
            peer.send(OM.EventTextChunk("still here", id=response.id))
        assert peer.pings == 0
        await anyio.sleep(5)
        peer.send()  # nothing but a pong
        await anyio.sleep(1)
        assert peer.pings == 1
        peer.send(OM.EventEnd(1, id=response.id))
        assert (await response.collect()).tokens_used == 1


async def test_a_write_that_fails_ends_the_connection_even_if_the_agent_says_nothing() -> None:
    async with memory_agent(timeouts=Timeouts(close=2)) as (agent, peer):
        response = await agent.send_message("sent")
        await peer.receive()
        peer.broken = True
        peer.answers_close = False
        lost = await agent.send_message("cannot be written")
        for each, phase in ((response, "sent"), (lost, "sent")):
            with pytest.raises(Disconnected, match="could not be written") as caught:
                await each.collect()
            assert (caught.value.code, caught.value.phase) == (1006, phase)


async def test_a_tool_result_for_a_request_that_is_over_raises_its_error() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        peer.send(OM.EventToolCall("c1", "add", "[1, 2]", id=(await peer.receive()).id))
        call = await anext(response)
        assert isinstance(call, OM.EventToolCall)
        await response.send_tool_result(call.call_id, "3")
        assert await peer.receive() == IM.ToolResult(response.id, call_id="c1", output="3")
        peer.send(OM.Error("failed", "no", id=response.id))
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(AgentError):
            await response.send_tool_result(call.call_id, "3")
        await response.aclose()


async def test_a_tool_result_that_waits_for_the_writer_when_the_connection_is_lost_raises() -> None:
    async def send_result() -> None:
        with pytest.raises(Disconnected):
            await response.send_tool_result("call", "output")

    async with memory_agent(timeouts=Timeouts(close=1)) as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        peer.writable = anyio.Event()
        blocker = await agent.send_message("blocks the writer")
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_result)
            await anyio.wait_all_tasks_blocked()
            peer.close(1011)
        await response.aclose()
        await blocker.aclose()


async def test_a_deadline_that_lies_in_the_past_is_over() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        peer.send(OM.GracefulDisconnect("now", deadline=-1.5))
        with pytest.raises(Disconnected) as caught:
            await response.collect()
        assert caught.value.graceful


async def test_an_error_from_before_an_answer_that_was_completed_is_not_the_cause() -> None:
    async with memory_agent() as (agent, peer):
        peer.send(OM.Error("old", "hours ago"))
        first = await agent.send_message("first")
        peer.send(OM.EventEnd(1, id=(await peer.receive()).id))
        await first.collect()
        second = await agent.send_message("second")
        await peer.receive()
        peer.close(1011)
        with pytest.raises(Disconnected) as caught:
            await second.collect()
        assert caught.value.__cause__ is None


async def test_a_tool_result_that_waits_for_the_writer_when_its_request_ends_raises() -> None:
    async def send_result() -> None:
        with pytest.raises(AgentError):
            await response.send_tool_result("call", "output")

    async with memory_agent(timeouts=Timeouts(close=1)) as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        peer.writable = anyio.Event()
        blocker = await agent.send_message("blocks the writer")
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_result)
            await anyio.wait_all_tasks_blocked()
            peer.send(OM.Error("failed", "no", id=response.id))
        await response.aclose()
        peer.writable.set()
        assert (await peer.receive()).id == blocker.id
        await blocker.aclose()
        assert await peer.receive() == IM.Cancel(blocker.id)


@pytest.mark.parametrize("wire", ["native", "single"])
async def test_an_end_that_arrives_when_the_drain_timeout_fires_is_harmless(wire: str) -> None:
    status = OM.Status("ready", ("ids",) if wire == "native" else ())
    for seconds in (8.0, 9.0, 10.0):
        async with memory_agent(status=status, timeouts=Timeouts(drain=9)) as (agent, peer):
            response = await agent.send_message("left early")
            request_id = (await peer.receive()).id
            await response.aclose()
            await anyio.sleep(seconds)
            with contextlib.suppress(anyio.BrokenResourceError):  # closed, on the wire with one lane
                peer.send(OM.EventTextChunk("late", id=request_id), OM.EventEnd(1, id=request_id))
            await anyio.wait_all_tasks_blocked()
            assert agent.in_flight == 0
