"""From those that have prompts answered to the one that takes the results: each once, in order."""

from __future__ import annotations

import anyio
import pytest

from anyagent.batch import Batch, BatchConfig, ErrorRecord, Result, Timings, TooManyErrors, open_batch
from anyagent.batch._batch import run_engine
from anyagent.batch._results import Results

from .batch_agents import Answer, MemoryAgent, echo, memory_agents

pytestmark = pytest.mark.anyio


def result(index: int) -> Result:
    return Result(str(index), index, "", 1, (), Timings(0, 0, 0, 0), None)


async def test_results_are_taken_one_by_one_or_all_that_are_there() -> None:
    results = Results(ordered=False)
    for index in (2, 0, 1):
        results.add(result(index), index)
    assert (await results.take()).index == 2
    assert [each.index for each in await results.take_all()] == [0, 1]
    assert results.take_ready() == []
    results.add(result(3), 3)
    assert [each.index for each in results.take_ready()] == [3]
    results.end()
    assert await results.take_all() == []
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await results.take()


async def test_in_order_each_waits_for_those_before_it() -> None:
    results = Results(ordered=True)
    results.add(result(1), 1)
    assert results.take_ready() == []
    results.add(result(0), 0)
    results.add(result(3), 3)
    assert [each.index for each in results.take_ready()] == [0, 1]


async def test_at_the_end_nothing_waits_any_more_and_what_comes_later_is_in_order() -> None:
    error = ValueError("the end")
    results = Results(ordered=True)
    for index in (5, 3):
        results.add(result(index), index)
    results.end(error)
    results.end(KeyError("another"))
    assert (await results.take()).index == 3
    for index in (4, 0, 8, 7, 9):
        results.add(result(index), index)
    assert [each.index for each in results.take_ready()] == [5, 8, 9]
    for _ in range(2):
        with pytest.raises(ValueError, match="the end") as info:
            await results.take()
        assert info.value is error
    results.add(result(11), 11)
    assert (await results.take()).index == 11


async def test_taking_what_is_there_passes_a_checkpoint_now_and_then() -> None:
    results = Results(ordered=False)
    for index in range(1_000):
        results.add(result(index), index)
    taken: list[int] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        while True:
            taken.append((await results.take()).index)
    assert len(taken) < 64
    taken += [each.index for each in results.take_ready()]
    assert taken == list(range(1_000)), "and none is lost"


async def test_results_that_come_after_too_many_errors_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    async def first_last(prompt: str, answer: Answer) -> None:
        if prompt == "prompt 0":
            await anyio.sleep(5)
            await echo(prompt, answer)
        else:
            answer.error("no")

    async def take_slowly(batch: Batch) -> None:
        async for each in batch:
            indices.append(each.index)
            await anyio.sleep(3)

    indices: list[int] = []
    async with memory_agents(monkeypatch, agent=MemoryAgent(first_last)) as urls:
        config = BatchConfig(urls, in_flight=10, ordered=True, max_errors=5)
        async with open_batch([f"prompt {number}" for number in range(100)], config) as batch:
            with pytest.raises(TooManyErrors):
                await take_slowly(batch)
    assert len(indices) >= 6
    assert indices == sorted(indices)


async def test_an_engine_gives_results_as_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"prompt {number}" for number in range(100)]
    indices: list[int] = []
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        async with run_engine(prompts, BatchConfig(urls, window=7, in_flight=2)) as engine:
            while results := await engine.take_all():
                assert len(results) <= 7
                indices += [each.index for each in results]
                if len(indices) < 50:
                    await anyio.wait_all_tasks_blocked()
                    indices += [each.index for each in engine.take_ready()]
            assert engine.take_ready() == []
            assert (engine.metrics.done, engine.metrics.failed, engine.reconnects) == (100, 0, 0)
            assert engine.now() == pytest.approx(engine.now(), abs=60)
            assert engine.ended is None
        assert engine.ended is not None
    assert sorted(indices) == list(range(100))


def test_too_many_errors_says_how_many_and_not_what() -> None:
    error = TooManyErrors(3, 7, ErrorRecord("AgentError", "no", "a secret"))
    assert str(error) == "3 of 7 prompts failed, the last with AgentError"
    assert (error.failed, error.finished, error.last.details) == (3, 7, "a secret")
