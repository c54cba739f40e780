"""A response: iteration, fairness, buffers, and what becomes of one that nobody closes."""

from __future__ import annotations

import gc
import threading
import warnings

import anyio
import anyio.lowlevel
import pytest

from anyagent import IM, OM, AgentError, Limits, Reply, Response, SlowConsumerError
from anyagent.testing import memory_agent

pytestmark = pytest.mark.anyio


async def test_iteration_yields_every_event_but_the_terminal() -> None:
    async with memory_agent() as (agent, peer):
        async with await agent.send_message("hello") as response:
            request_id = (await peer.receive()).id
            assert (response.id, response.end, response.tokens_used) == (request_id, None, None)
            events: list[OM.ServerMessage] = [
                OM.EventReasoningChunk("hmm", id=request_id),
                OM.EventTextChunk("Hello", id=request_id, seq=1),
                OM.EventToolCall("c1", "add", "[]", id=request_id),
                OM.EventTextChunk("!", id=request_id, seq=2),
            ]
            end = OM.EventEnd(42, id=request_id)
            peer.send(*events, end)
            assert [event async for event in response] == events
            assert (response.end, response.tokens_used) == (end, 42)
            with pytest.raises(StopAsyncIteration):
                await anext(response)
        with pytest.raises(StopAsyncIteration):
            await anext(response)


async def test_collecting_returns_the_text_of_the_text_chunks() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        request_id = (await peer.receive()).id
        peer.send(
            OM.EventReasoningChunk("hmm", id=request_id),
            OM.EventTextChunk("Hello, ", id=request_id),
            OM.EventTextChunk("you!", id=request_id),
            OM.EventEnd(5, id=request_id),
        )
        assert await response.collect() == Reply("Hello, you!", 5)
        assert await response.collect() == Reply("", 5)


async def test_the_request_carries_conversation_and_metadata() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello", conversation="c-1", metadata={"user": ["a", 1]})
        assert await peer.receive() == IM.UserMessage(
            text="hello", id=response.id, conversation="c-1", metadata={"user": ["a", 1]}
        )
        await response.aclose()


async def test_bad_arguments_are_refused_and_cost_no_lane() -> None:
    async with memory_agent(wire="single") as (agent, peer):
        with pytest.raises(ValueError, match="surrogate") as caught:
            await agent.send_message("a secret \ud800")
        assert "secret" not in repr(caught.value)
        with pytest.raises(TypeError):
            await agent.send_message("hello", metadata={"what": object()})
        with pytest.raises(TypeError, match="metadata must be a mapping, not list"):
            await agent.send_message("hello", metadata=["a"])  # type: ignore[arg-type]  # the same
        with pytest.raises(TypeError, match="bytes"):
            await agent.send_message(b"hello")  # type: ignore[arg-type]  # what the test is about
        assert agent.in_flight == 0
        response = await agent.send_message("the lane is free")
        assert await peer.receive() == IM.UserMessage(text="the lane is free")
        await response.aclose()


async def test_neither_repr_shows_what_was_asked() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("a secret")
        assert repr(response) == "<Response id='1' not sent>"
        await peer.receive()
        assert repr(response) == "<Response id='1' sent>"
        assert repr(agent) == "<Agent 'ready', 1 in flight>"
        await response.aclose()
        assert repr(response) == "<Response id='1' settled>"


async def test_a_second_consumer_gets_busy_resource_error() -> None:
    async def consume() -> None:
        assert [event async for event in response] == []

    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await anext(response)
            peer.send(OM.EventEnd(1, id=(await peer.receive()).id))


async def test_closing_wakes_the_consumer_in_another_task() -> None:
    async def consume() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await anext(response)

    async with memory_agent() as (agent, _):
        response = await agent.send_message("hello")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            await anyio.wait_all_tasks_blocked()
            await response.aclose()


async def test_a_consumer_that_always_finds_data_lets_others_run_every_64_events() -> None:
    turns = longest = since = 0

    async def count_turns() -> None:
        nonlocal turns, since
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1
            since = 0

    async with memory_agent() as (agent, peer), anyio.create_task_group() as tasks:
        response = await agent.send_message("hello")
        await peer.receive()
        peer.send(*[OM.EventTextChunk("x", id=response.id)] * 1_000, OM.EventEnd(1, id=response.id))
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(count_turns)
        async for _ in response:
            since += 1
            longest = max(longest, since)
        tasks.cancel_scope.cancel()
    assert turns >= 1_000 // 64
    assert 1 < longest <= 2 * 64  # Trio runs tasks in random order, so two turns may follow each other


async def test_a_consumer_that_always_finds_data_can_be_cancelled() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        peer.send(*[OM.EventTextChunk("x", id=response.id)] * 1_000)
        await anyio.wait_all_tasks_blocked()
        seen = 0
        with anyio.CancelScope() as scope:
            async for _ in response:
                seen += 1
                scope.cancel()
        assert seen <= 64
        assert await peer.receive() == IM.Cancel(response.id)


async def test_timestamps_are_taken_once_each_and_per_batch() -> None:
    async with memory_agent() as (agent, peer):
        opened = anyio.current_time()
        response = await agent.send_message("hello")
        stats = response.stats
        assert (stats.sent, stats.first_event, stats.end) == (None, None, None)
        await peer.receive()
        await anyio.sleep(2)
        peer.send(OM.EventTextChunk("a", id=response.id))
        await anext(response)
        await anyio.sleep(3)
        peer.send(OM.EventTextChunk("b", id=response.id), OM.EventEnd(1, id=response.id))
        await response.collect()
        times = (stats.sent, stats.first_event, stats.last_event, stats.end)
        assert [round((each or 0) - opened) for each in times] == [0, 2, 5, 5]


@pytest.mark.parametrize("collected", [True, False])
async def test_events_are_counted_and_the_newest_is_known_while_they_come(collected: bool) -> None:
    async with memory_agent() as (agent, peer), anyio.create_task_group() as tasks:
        response = await agent.send_message("hello")
        await peer.receive()

        async def consume() -> None:
            if collected:
                await response.collect()
            else:
                async for _ in response:
                    pass

        tasks.start_soon(consume)
        for number in range(1, 6):
            await anyio.sleep(1)
            arrived = anyio.current_time()
            peer.send(
                OM.EventTextChunk("a", id=response.id),
                OM.EventReasoningChunk("b", id=response.id),
                OM.EventTextChunk("c", id=response.id),
            )
            await anyio.wait_all_tasks_blocked()
            assert response.stats.events == 3 * number
            assert response.stats.last_event == pytest.approx(arrived, abs=0.1)
        peer.send(OM.EventEnd(1, id=response.id))


async def test_text_that_was_not_taken_in_time_is_merged_without_loss() -> None:
    async with memory_agent(limits=Limits(response_events=4)) as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        for number in range(100):
            peer.send(OM.EventTextChunk(f"{number} ", id=response.id, seq=number))
        peer.send(OM.EventToolCall("c1", "add", "[]", id=response.id))
        for _ in range(10):
            peer.send(OM.EventReasoningChunk("hm", id=response.id))
        peer.send(OM.EventEnd(1, id=response.id))
        await anyio.wait_all_tasks_blocked()
        events = [event async for event in response]
        texts = [event.text for event in events if isinstance(event, OM.EventTextChunk)]
        assert "".join(texts) == "".join(f"{number} " for number in range(100))
        thoughts = [event.text for event in events if isinstance(event, OM.EventReasoningChunk)]
        assert "".join(thoughts) == "hm" * 10
        kinds = [type(event) for event in events]
        assert kinds == sorted(kinds, key=[OM.EventTextChunk, OM.EventToolCall, OM.EventReasoningChunk].index)
        assert len(events) <= 4


@pytest.mark.parametrize("limit", ["response_events", "response_bytes"])
async def test_a_consumer_that_never_reads_fails_alone(limit: str) -> None:
    limits = Limits(response_events=10) if limit == "response_events" else Limits(response_bytes=1_000)
    async with memory_agent(limits=limits) as (agent, peer):
        slow = await agent.send_message("slow")
        quick = await agent.send_message("quick")
        for _ in range(2):
            await peer.receive()
        for number in range(20):
            peer.send(OM.EventToolCall(str(number), "add", "[]", id=slow.id))
            peer.send(OM.EventToolCall(str(number), "add", "[]", id=quick.id))
            assert await anext(quick) == OM.EventToolCall(str(number), "add", "[]", id=quick.id)
        assert await peer.receive() == IM.Cancel(slow.id)
        received: list[OM.AgentEvent] = []

        async def read() -> None:
            async for event in slow:
                received.append(event)

        with pytest.raises(SlowConsumerError) as caught:
            await read()
        assert 10 <= len(received) < 20
        assert (caught.value.limit, caught.value.value) == (limit, getattr(limits, limit))
        peer.send(OM.EventEnd(1, id=quick.id))
        assert [event async for event in quick] == []
        assert agent.stats.failed == 1


async def test_a_response_that_is_dropped_warns_and_is_cancelled() -> None:
    gc.disable()
    try:
        async with memory_agent() as (agent, peer):
            response: Response | None = await agent.send_message("hello")
            message = await peer.receive()
            with pytest.warns(ResourceWarning, match="never closed"):
                del response
            assert await peer.receive() == IM.Cancel(message.id)
            assert agent.in_flight == 0
    finally:
        gc.enable()


async def test_a_response_that_is_dropped_after_break_warns_and_is_cancelled() -> None:
    async def use() -> None:
        async for _ in await agent.send_message("hello"):
            break

    async def answer() -> None:
        peer.send(OM.EventTextChunk("a", id=(await peer.receive()).id))

    async with memory_agent() as (agent, peer):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(answer)
            with pytest.warns(ResourceWarning, match="never closed"):
                await use()
        assert await peer.receive() == IM.Cancel("1")


@pytest.mark.sockets
async def test_a_response_that_is_dropped_in_another_thread_warns_and_is_cancelled() -> None:
    async with memory_agent() as (agent, peer):
        kept = [await agent.send_message("hello")]
        message = await peer.receive()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            thread = threading.Thread(target=kept.clear)
            thread.start()
            thread.join()
        assert [warning.category for warning in caught] == [ResourceWarning]
        assert await peer.receive() == IM.Cancel(message.id)


async def test_a_response_that_is_dropped_right_before_the_block_is_left_leaves_no_stream_open() -> None:
    async with memory_agent() as (agent, peer):
        response: Response | None = await agent.send_message("hello")
        await peer.receive()
        with pytest.warns(ResourceWarning, match="never closed"):
            del response
    gc.collect()  # an unclosed stream would warn, and fail this test


async def test_a_response_that_is_dropped_after_its_end_warns_and_sends_nothing() -> None:
    async with memory_agent() as (agent, peer):
        response: Response | None = await agent.send_message("hello")
        message = await peer.receive()
        peer.send(OM.EventEnd(1, id=message.id))
        await anyio.wait_all_tasks_blocked()
        with pytest.warns(ResourceWarning, match="never closed"):
            del response
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.WouldBlock):
            peer.receive_nowait()


async def test_responses_that_were_read_to_the_end_or_left_do_not_warn() -> None:
    async with memory_agent() as (agent, peer):
        read = await agent.send_message("read")
        failed = await agent.send_message("failed")
        left = await agent.send_message("left")
        for _ in range(2):
            await peer.receive()
        peer.send(OM.EventEnd(1, id=read.id), OM.Error("no", "never", id=failed.id))
        assert [event async for event in read] == []
        with pytest.raises(AgentError):
            await anext(failed)
        await left.aclose()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del read, failed, left
            gc.collect()
        assert [warning for warning in caught if "Response" in str(warning.message)] == []


async def test_collecting_where_somebody_else_iterates_leaves_their_request_alone() -> None:
    async def iterate() -> None:
        assert [event async for event in response] == [OM.EventTextChunk("theirs", id=response.id)]

    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(iterate)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await response.collect()
            await peer.receive()
            peer.send(OM.EventTextChunk("theirs", id=response.id), OM.EventEnd(1, id=response.id))


async def test_a_response_that_was_closed_after_its_end_arrived_is_not_mistaken_for_an_empty_one() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        peer.send(OM.EventTextChunk("unread", id=response.id), OM.EventEnd(3, id=response.id))
        await anyio.wait_all_tasks_blocked()
        await response.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await response.collect()
        assert response.tokens_used == 3


async def test_a_very_long_answer_that_nobody_reads_is_joined_piece_by_piece() -> None:
    async with memory_agent(limits=Limits(response_events=8)) as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        calls = [OM.EventToolCall(str(number), "add", "[]", id=response.id) for number in range(7)]
        chunks = [OM.EventTextChunk(f"{number} ", id=response.id, seq=number) for number in range(100)]
        peer.send(*calls, *chunks, OM.EventEnd(1, id=response.id))
        await anyio.wait_all_tasks_blocked()
        whole = "".join(chunk.text for chunk in chunks)
        assert [event async for event in response] == [
            *calls,
            OM.EventTextChunk(whole, id=response.id, seq=99),
        ]
