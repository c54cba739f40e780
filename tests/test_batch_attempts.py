"""One attempt: what its end means, how long it may take, and what a batch does about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from anyagent import OM, Limits, Response
from anyagent.batch import AttemptTimeouts, BatchConfig, Rates, Retry, open_batch
from anyagent.batch._batch import run_engine

from .batch_agents import Answer, MemoryAgent, echo, memory_agents

if TYPE_CHECKING:
    from anyagent import Reply
    from anyagent.batch import Result

pytestmark = pytest.mark.anyio

PROMPTS = [f"prompt {number}" for number in range(10)]


async def silent(prompt: str, answer: Answer) -> None:
    await anyio.sleep_forever()


async def result_of(config: BatchConfig) -> Result:
    async with open_batch(["hello"], config) as batch:
        return await anext(batch)


async def test_an_answer_that_is_too_long_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_length(prompt: str, answer: Answer) -> None:
        for _ in range(100):
            answer.text("very ")
        answer.end()

    agent = MemoryAgent(at_length)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = BatchConfig(urls, limits=Limits(response_bytes=1_000), retry="idempotent")
        result = await result_of(config)
    assert result.error is not None
    assert (result.error.type, result.error.code) == ("SlowConsumerError", None)
    assert result.attempts[0].partial.startswith("very very ")
    assert len(agent.seen) == 1


async def test_the_first_of_the_timeouts_that_there_are_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    async with memory_agents(monkeypatch, agent=MemoryAgent(silent)) as urls:
        timeouts = AttemptTimeouts(total=5, first_event=3, idle=None)
        result = await result_of(BatchConfig(urls, timeouts=timeouts))
    assert result.error is not None
    assert result.error.code == "first_event"


async def test_an_answer_that_came_in_time_counts_also_if_nobody_has_looked_at_it_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collect = Response.collect

    async def collect_late(response: Response) -> Reply:
        await anyio.sleep(20)
        return await collect(response)

    monkeypatch.setattr(Response, "collect", collect_late)
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        result = await result_of(BatchConfig(urls, timeouts=AttemptTimeouts(total=7)))
    assert (result.text, result.error) == ("hello", None)
    assert result.timings.end == result.timings.sent


class Door:
    """A gate that opens when it is told to, whether or not who waits there has been cancelled."""

    def __init__(self) -> None:
        self.opened = anyio.Event()
        self.waiting = self.entered = 0
        self.left: list[int | None] = []

    async def enter(self) -> None:
        self.waiting += 1
        with anyio.CancelScope(shield=True):
            await self.opened.wait()
        self.entered += 1

    def leave(self, tokens_used: int | None) -> None:
        self.left.append(tokens_used)


@pytest.mark.parametrize("stops", [False, True])
async def test_whoever_was_let_through_the_gate_leaves_it_also_in_a_batch_that_was_stopped(
    stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    door, agent = Door(), MemoryAgent()
    async with (
        memory_agents(monkeypatch, agent=agent) as urls,
        run_engine(PROMPTS[:3], BatchConfig(urls), gate=door) as engine,
    ):
        await anyio.wait_all_tasks_blocked()
        before = door.waiting, engine.in_flight
        if stops:
            engine.stop()
        door.opened.set()
        results = [await engine.take() for _ in range(0 if stops else 3)]
        with pytest.raises(StopAsyncIteration):
            await engine.take()
    assert before == (3, 0), "those at the gate are not in flight yet"
    assert len(agent.seen) == len(results)
    assert door.entered == 3
    assert door.left == [None if stops else 1] * 3


async def test_the_first_exception_of_a_task_comes_out_unless_another_is_urgent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, urgent = RuntimeError("first"), RuntimeError("second"), KeyboardInterrupt()

    async def fail(error: BaseException) -> None:
        await anyio.sleep(1)
        raise error

    async def fail_at_the_end(error: BaseException) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise error

    async def run_tasks(urls: tuple[str, ...], others: list[BaseException]) -> None:
        async with run_engine(PROMPTS, BatchConfig(urls)) as engine:
            for other in others:
                engine.start_soon(fail_at_the_end, other)
            engine.start_soon(fail, first)
            await anyio.sleep_forever()

    cases: list[tuple[list[BaseException], BaseException]] = [([second], first), ([second, urgent], urgent)]
    for others, expected in cases:
        async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
            with pytest.raises(type(expected)) as info:
                await run_tasks(urls, others)
        assert info.value is expected


@pytest.mark.parametrize("tokens", [-(10**6), 0, 10**5, 10**18, 10**400])
async def test_no_number_of_tokens_that_an_agent_names_breaks_a_batch(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def boast(prompt: str, answer: Answer) -> None:
        if prompt == "prompt 3":
            answer.text(prompt)
            answer.send(OM.EventEnd(tokens, id=answer.id))
        else:
            await echo(prompt, answer)

    for rates in (Rates(), Rates(tokens_per_minute=1e9)):
        async with (
            memory_agents(monkeypatch, agent=MemoryAgent(boast)) as urls,
            open_batch(PROMPTS, BatchConfig(urls, in_flight=1, rates=rates)) as batch,
        ):
            results = [result async for result in batch]
            summary = batch.summary()
        assert len(results) == 10
        assert [result.tokens_used for result in results[2:5]] == [1, min(max(tokens, 0), 10**9), 1]
        assert summary.tokens == 9 + (results[3].tokens_used or 0)


@pytest.mark.parametrize("retry_after", [-5, 0, 1e300])
async def test_no_time_that_an_agent_asks_for_breaks_a_batch(
    retry_after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def postpone(prompt: str, answer: Answer) -> None:
        if len(answer.agent.seen) < 3:
            answer.error("busy", retry_after=retry_after)
        await echo(prompt, answer)

    async with memory_agents(monkeypatch, agent=MemoryAgent(postpone)) as urls:
        started = anyio.current_time()
        result = await result_of(BatchConfig(urls, retry=Retry(maximum=1)))
        elapsed = anyio.current_time() - started
    assert result.text == "hello"
    assert elapsed <= 2 if retry_after <= 0 else 1_200 <= elapsed <= 1_202
