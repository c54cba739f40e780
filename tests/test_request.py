"""A request buffers what has not been read: in batches, without loss, and within its limits."""

from __future__ import annotations

from itertools import groupby
from typing import TypeAlias

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent import IM, OM, AgentError, AgentStats, Limits, SlowConsumerError
from anyagent._request import Request, agent_error
from anyagent._transports import waker_factory

from .properties import REPEATABLE, TEXTS, run


def text(content: str, seq: int | None = None) -> OM.EventTextChunk:
    return OM.EventTextChunk(content, id="1", seq=seq)


def reasoning(content: str, seq: int | None = None) -> OM.EventReasoningChunk:
    return OM.EventReasoningChunk(content, id="1", seq=seq)


def tool(call_id: str) -> OM.EventToolCall:
    return OM.EventToolCall(call_id, "tool", "{}", id="1")


def unknown(kind: str) -> OM.Unknown:
    return OM.Unknown(kind, f'{{"type":"{kind}"}}', id="1")


def new_request(limits: Limits) -> Request:
    return Request(IM.UserMessage(text=""), limits, AgentStats(), waker_factory()())


async def next_batch(request: Request) -> list[OM.AgentEvent]:
    await request.arrival()
    return request.take()


def push_all(request: Request, *events: OM.AgentEvent) -> None:
    """Deliver `events` as one batch of a transport."""
    for event in events:
        request.push(event, 1)


def letters(events: list[OM.AgentEvent]) -> list[object]:
    """The events, with chunks taken apart into letters, so that joining chunks makes no difference."""
    taken_apart: list[object] = []
    for event in events:
        if isinstance(event, OM.EventTextChunk | OM.EventReasoningChunk):
            taken_apart += [(type(event), letter) for letter in event.text]
        else:
            taken_apart.append(event)
    return taken_apart


def runs(events: list[OM.AgentEvent]) -> int:
    """How many events are left when adjacent chunks of one kind count as one."""
    chunks = (OM.EventTextChunk, OM.EventReasoningChunk)
    return sum(1 if kind in chunks else len(list(group)) for kind, group in groupby(events, type))


@pytest.mark.anyio
async def test_events_join_the_batch_that_was_not_taken() -> None:
    request = new_request(Limits())
    request.push(text("a"), 1)
    request.push(text("b"), 1)
    request.push(tool("c"), 1)
    assert request.take() == [text("a"), text("b"), tool("c")]
    request.push(text("d"), 1)
    assert request.take() == [text("d")]
    request.settle(None, 0)
    request.discard()


@pytest.mark.anyio
async def test_events_join_the_batch_that_was_handed_to_a_consumer_that_has_not_woken_up_yet() -> None:
    request = new_request(Limits())
    batches = []

    async def consume() -> None:
        batches.append(await next_batch(request))
        batches.append(await next_batch(request))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consume)
        await anyio.wait_all_tasks_blocked()
        push_all(request, text("a"))
        request.push(text("b"), 1)
        await anyio.wait_all_tasks_blocked()
        assert batches == [[text("a"), text("b")]]
        push_all(request, text("c"))
    assert batches == [[text("a"), text("b")], [text("c")]]
    request.settle(None, 0)
    request.discard()


@pytest.mark.anyio
@pytest.mark.parametrize("outcome", [OM.EventEnd(7), AgentError("busy", "later"), None])
async def test_what_arrived_is_taken_before_the_end(outcome: OM.EventEnd | Exception | None) -> None:
    request = new_request(Limits())
    request.push(text("a"), 1)
    request.settle(outcome, 12.5)
    assert request.settled
    assert request.stats.end == 12.5
    assert (request.end, request.error) == (
        (None, outcome) if isinstance(outcome, Exception) else (outcome, None)
    )
    assert request.take() == [text("a")]
    for _ in range(2):
        assert request.take() == []
    request.discard()


@pytest.mark.anyio
async def test_the_end_wakes_a_consumer_that_waits() -> None:
    request = new_request(Limits())

    async def settle() -> None:
        await anyio.wait_all_tasks_blocked()
        request.settle(OM.EventEnd(1), 0)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(settle)
        assert request.take() == []
    request.discard()


@pytest.mark.anyio
async def test_at_the_limit_of_events_adjacent_chunks_of_one_kind_are_joined() -> None:
    request = new_request(Limits(response_events=5))
    push_all(request, text("a", 1), text("b", 2), reasoning("c", 3), reasoning("d", 4), text("e"))
    push_all(request, text("f", 6), tool("g"))
    assert request.take() == [text("ab", 2), reasoning("cd", 4), text("ef", 6), tool("g")]
    request.settle(None, 0)
    request.discard()


@pytest.mark.anyio
async def test_below_the_limit_chunks_stay_as_they_came() -> None:
    request = new_request(Limits(response_events=3))
    push_all(request, text("a"), text("b"), text("c"))
    assert request.take() == [text("a"), text("b"), text("c")]
    request.settle(None, 0)
    request.discard()


@pytest.mark.anyio
async def test_events_that_cannot_be_joined_fail_the_request_at_the_limit() -> None:
    request = new_request(Limits(response_events=3))
    push_all(request, tool("a"), tool("b"), unknown("c"))
    for event in (tool("d"), text("e"), unknown("c")):
        with pytest.raises(SlowConsumerError) as caught:
            request.push(event, 1)
        assert (caught.value.limit, caught.value.value) == ("response_events", 3)
    assert request.take() == [tool("a"), tool("b"), unknown("c")]
    push_all(request, tool("d"), tool("e"), tool("f"))
    assert request.take() == [tool("d"), tool("e"), tool("f")]
    request.settle(None, 0)
    request.discard()


@pytest.mark.anyio
async def test_bytes_count_as_received_and_fail_the_request_at_the_limit() -> None:
    request = new_request(Limits(response_bytes=100, response_events=2))
    request.push(text("a"), 60)
    request.push(text("b"), 30)
    request.push(text("c"), 10)
    with pytest.raises(SlowConsumerError) as caught:
        request.push(text("d"), 1)
    assert (caught.value.limit, caught.value.value) == ("response_bytes", 100)
    assert request.take() == [text("a"), text("bc")]
    request.push(text("d"), 100)
    request.settle(None, 0)
    request.discard()


@pytest.mark.anyio
async def test_a_consumer_that_collects_is_given_all_texts_and_wakes_at_the_end_only() -> None:
    request = new_request(Limits(response_events=3))
    push_all(request, text("a"), reasoning("b"), text("c"), text("d"), text("e"))
    collected: list[str] = []

    async def collect() -> None:
        texts = request.start_collecting([])
        await request.arrival()
        collected.extend(texts)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect)
        await anyio.wait_all_tasks_blocked()
        push_all(request, tool("f"), text("g"), reasoning("h"), text("i"))
        await anyio.wait_all_tasks_blocked()
        assert collected == []
        request.settle(OM.EventEnd(1), 0)
    assert "".join(collected) == "acdegi"


@pytest.mark.anyio
async def test_what_is_not_kept_does_not_count_however_large_it_is() -> None:
    request = new_request(Limits(response_bytes=100))
    texts = request.start_collecting([text("read before")])
    request.push(reasoning("a"), 1_000)
    request.push(text("b"), 89)
    request.push(tool("c"), 1_000)
    with pytest.raises(SlowConsumerError):
        request.push(text("d"), 1)
    assert texts == ["read before", "b"]


@pytest.mark.anyio
async def test_what_is_collected_is_bounded_in_bytes_and_not_in_events() -> None:
    request = new_request(Limits(response_bytes=100, response_events=2))

    async def push() -> None:
        await anyio.wait_all_tasks_blocked()
        for _ in range(100):
            request.push(text("a"), 1)
        with pytest.raises(SlowConsumerError) as caught:
            request.push(text("b"), 1)
        assert (caught.value.limit, caught.value.value) == ("response_bytes", 100)
        request.settle(caught.value, 0)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(push)
        texts = request.start_collecting([])
        await request.arrival()
        assert "".join(texts) == 100 * "a"


def test_the_error_of_an_agent_keeps_its_fields() -> None:
    error = agent_error(OM.Error(503, "try later", 1.5, id="1"))
    assert (error.code, error.details, error.retry_after) == (503, "try later", 1.5)


Step: TypeAlias = tuple[OM.AgentEvent, int] | None
"""An event and its size; ``None``: the consumer takes a batch, if there is one."""

EVENTS: st.SearchStrategy[OM.AgentEvent] = st.one_of(
    st.builds(text, TEXTS, st.none() | st.integers(0, 9)),
    st.builds(reasoning, TEXTS),
    st.builds(text, TEXTS),
    st.builds(tool, TEXTS),
    st.builds(unknown, TEXTS),
)
STEPS: st.SearchStrategy[list[Step]] = st.lists(
    st.tuples(EVENTS, st.integers(1, 40)) | st.tuples(EVENTS, st.just(1)) | st.none(), max_size=60
)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(REPEATABLE, max_examples=200)
@given(steps=STEPS, limit_of_events=st.integers(1, 6), limit_of_bytes=st.integers(40, 120))
def test_no_sequence_of_events_loses_or_reorders_anything_up_to_the_limit(
    backend: str, steps: list[Step], limit_of_events: int, limit_of_bytes: int
) -> None:
    async def main() -> None:
        request = new_request(Limits(response_events=limit_of_events, response_bytes=limit_of_bytes))
        pushed: list[OM.AgentEvent] = []
        taken: list[OM.AgentEvent] = []
        waiting: list[OM.AgentEvent] = []
        waiting_bytes = 0
        for step in steps:
            if step is None:
                if waiting:
                    batch = request.take()
                    assert 1 <= len(batch) <= limit_of_events
                    taken += batch
                    waiting, waiting_bytes = [], 0
                continue
            event, size = step
            try:
                request.push(event, size)
            except SlowConsumerError as exc:
                if exc.limit == "response_bytes":
                    assert waiting_bytes + size > limit_of_bytes
                else:
                    assert runs(waiting) >= limit_of_events
                request.settle(exc, 0)
                break
            pushed.append(event)
            waiting.append(event)
            waiting_bytes += size
            assert waiting_bytes <= limit_of_bytes
        if not request.settled:
            request.settle(OM.EventEnd(1), 0)
        if waiting:
            taken += request.take()
        assert request.take() == []
        request.discard()
        assert letters(taken) == letters(pushed)
        assert [event for event in taken if isinstance(event, OM.EventToolCall | OM.Unknown)] == [
            event for event in pushed if isinstance(event, OM.EventToolCall | OM.Unknown)
        ]

    run(backend, main)
