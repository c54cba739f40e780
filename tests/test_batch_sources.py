"""Where the prompts of a batch come from: read as needed, left out if answered before, failing alone."""

from __future__ import annotations

import gc
import itertools
from contextlib import aclosing
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from anyagent import ConnectError
from anyagent.batch import Batch, BatchConfig, Prompt, open_batch
from anyagent.batch._batch import run_engine
from anyagent.batch._files.answered import Answered
from anyagent.batch._prompt import key_of

from .batch_agents import Answer, MemoryAgent, echo, memory_agents
from .properties import settle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator

    from anyagent.batch import Result

pytestmark = pytest.mark.anyio


def numbered(count: int) -> list[str]:
    return [f"prompt {number}" for number in range(count)]


async def results_of(prompts: Iterable[Prompt | str], config: BatchConfig) -> list[Result]:
    async with open_batch(prompts, config) as batch:
        return [result async for result in batch]


async def indices_of(
    prompts: Iterable[Prompt | str], config: BatchConfig, skip: Callable[[str], bool]
) -> list[int]:
    indices: list[int] = []

    def row_of(key: str, index: int) -> int | None:
        return index if skip(key) else None

    async with run_engine(prompts, config, skip=row_of) as engine:
        while results := await engine.take_all():
            indices += [result.index for result in results]
    return indices


UNSENDABLE = [Prompt("hello \ud800"), Prompt("hello", metadata={"a": object()}), Prompt(5)]  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [0, 3, 6])
@pytest.mark.parametrize("prompt", UNSENDABLE)
async def test_a_prompt_without_id_that_cannot_be_sent_fails_alone(
    prompt: Prompt, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Prompt | str] = list(numbered(6))
    prompts.insert(at, prompt)
    agent = MemoryAgent()
    async with memory_agents(monkeypatch, agent=agent) as urls:
        results = await results_of(prompts, BatchConfig(urls, in_flight=1))
    assert [result.index for result in results] == list(range(7))
    assert [result.index for result in results if result.error is not None] == [at]
    error = results[at].error
    assert error is not None
    assert "hello" not in error.details
    assert sorted(agent.seen) == numbered(6)


def test_a_key_tells_prompts_apart_also_those_that_cannot_be_sent() -> None:
    prompts = [
        *UNSENDABLE,
        Prompt("hello"),
        Prompt("hello", conversation="a"),
        Prompt("hello", metadata={"a": 1}),
        Prompt("hello \ud801"),
    ]
    keys = [key_of(prompt, agent) for prompt in prompts for agent in ("a", "b")]
    assert len(set(keys)) == len(keys)
    assert keys == [key_of(prompt, agent) for prompt in prompts for agent in ("a", "b")]
    assert key_of(Prompt("\ud800", id="mine"), "a") == "mine"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("after", [0, 1, 50])
async def test_a_source_that_fails_does_so_behind_the_results(
    asynchronous: bool, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ValueError("the disk is gone")

    def prompts() -> Iterator[str]:
        yield from numbered(after)
        raise error

    async def asynchronous_prompts() -> AsyncIterator[str]:
        for prompt in prompts():
            await anyio.lowlevel.checkpoint()
            yield prompt

    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        source = asynchronous_prompts() if asynchronous else prompts()
        async with open_batch(source, BatchConfig(urls, window=10)) as batch:
            results = [await anext(batch) for _ in range(after)]
            for _ in range(2):
                with pytest.raises(ValueError, match="disk") as info:
                    await anext(batch)
                assert info.value is error
    assert sorted(result.text or "" for result in results) == sorted(numbered(after))


async def test_a_source_that_cannot_be_begun_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError("no such file")

    class Source:
        def __iter__(self) -> Iterator[str]:
            raise error

    agent = MemoryAgent()
    async with memory_agents(monkeypatch, agent=agent) as urls:
        with pytest.raises(OSError, match="no such file") as info:
            async with open_batch(Source(), BatchConfig(urls)):
                pytest.fail("there is no source")
    assert info.value is error
    assert agent.connections == 0


async def test_what_finds_out_which_are_answered_may_fail_as_the_source_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = itertools.count()

    def skip(key: str, index: int) -> None:
        if next(keys) == 3:
            raise TypeError("a bug")

    async with (
        memory_agents(monkeypatch, agent=MemoryAgent()) as urls,
        run_engine(numbered(10), BatchConfig(urls, in_flight=1), skip=skip) as engine,
    ):
        assert [(await engine.take()).index for _ in range(3)] == [0, 1, 2]
        with pytest.raises(TypeError, match="a bug"):
            await engine.take()
        assert engine.take_ready() == []


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_prompts_that_are_left_out_keep_their_places(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [Prompt(f"prompt {number}", id=str(number)) for number in range(5_000)]

    async def source() -> AsyncIterator[Prompt]:
        for prompt in prompts:
            yield prompt

    agent = MemoryAgent()
    async with memory_agents(monkeypatch, agent=agent) as urls:
        for ordered in (False, True):
            indices = await indices_of(
                source() if asynchronous else prompts,  # type: ignore[arg-type]
                BatchConfig(urls, in_flight=1, ordered=ordered),
                lambda key: int(key) % 1_999 != 5,
            )
            assert indices == [5, 2_004, 4_003]


async def test_of_equal_prompts_each_has_a_row_of_its_own_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Answered()
    key = key_of(Prompt("same"), "agent")
    for index in (2, 5):
        rows.add(key, index)
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        config = BatchConfig(urls, agent="agent", in_flight=1)
        async with run_engine(["same"] * 8, config, skip=rows.take) as engine:
            indices = []
            while results := await engine.take_all():
                indices += [result.index for result in results]
    assert sorted(indices) == [0, 1, 3, 4, 6, 7]


async def test_where_nothing_is_to_be_asked_no_agent_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with memory_agents(monkeypatch, agent=MemoryAgent(down=True)) as urls:
        assert await results_of([], BatchConfig(urls)) == []
        assert await indices_of(numbered(5_000), BatchConfig(urls), lambda _: True) == []
        last = key_of(Prompt("prompt 4999"), BatchConfig(urls).agent_name)
        with pytest.raises(ConnectError):
            await indices_of(numbered(5_000), BatchConfig(urls), lambda key: key != last)


async def test_others_have_a_turn_while_many_prompts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = 0

    def skip(key: str, index: int) -> int:
        nonlocal left_out
        left_out += 1
        return index

    async with (
        memory_agents(monkeypatch, agent=MemoryAgent()) as urls,
        run_engine(map(str, itertools.count()), BatchConfig(urls), skip=skip),
    ):
        for _ in range(100):
            before = left_out
            await anyio.lowlevel.checkpoint()
            assert left_out <= before + 10_000
    assert left_out > 10_000


@pytest.mark.parametrize("after", [0, 1, 7])
async def test_the_prompts_own_iterator_may_stop_the_batch(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Batch] = []

    def prompts() -> Iterator[str]:
        for number, prompt in enumerate(numbered(100)):
            if number == after:
                opened[0].stop()
            yield prompt

    agent = MemoryAgent()
    async with (
        memory_agents(monkeypatch, agent=agent) as urls,
        open_batch(prompts(), BatchConfig(urls, in_flight=2)) as batch,
    ):
        opened.append(batch)
        assert sorted([result.index async for result in batch]) == list(range(after))
    assert sorted(agent.seen) == numbered(after)


class Endless:
    """A source that is no generator."""

    def __init__(self) -> None:
        self.read = 0

    def __aiter__(self) -> Endless:
        return self

    async def __anext__(self) -> str:
        self.read += 1
        return f"prompt {self.read}"


async def test_an_asynchronous_source_is_not_read_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Endless()
    async with (
        memory_agents(monkeypatch, agent=MemoryAgent()) as urls,
        open_batch(source, BatchConfig(urls, window=10)) as batch,
    ):
        for _ in range(1_000):
            await anext(batch)
        await anyio.wait_all_tasks_blocked()
        assert 1_010 <= source.read <= 1_010 + 64
        batch.stop()
        assert len([result async for result in batch]) == 10


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 30])
async def test_a_generator_that_is_not_read_to_its_end_is_left_for_its_owner_to_close(
    waits: bool, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = 0

    async def prompts() -> AsyncGenerator[str, None]:
        nonlocal closed
        try:
            for number in itertools.count():
                if waits and number >= taken:
                    await anyio.sleep_forever()
                yield f"prompt {number}"
        finally:
            closed += 1

    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        async with aclosing(prompts()) as source:
            async with open_batch(source, BatchConfig(urls, window=5)) as batch:
                for _ in range(taken):
                    await anext(batch)
                await anyio.wait_all_tasks_blocked()
            assert closed == waits, "it was cancelled where it waited"
        assert closed == 1
    del source, batch
    gc.collect()
    await settle()


async def test_a_source_is_read_while_all_agents_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slowly(prompt: str, answer: Answer) -> None:
        await anyio.sleep(10)
        await echo(prompt, answer)

    async def prompts() -> AsyncIterator[str]:
        for prompt in numbered(3):
            await anyio.sleep(1)
            yield prompt

    async with (
        memory_agents(monkeypatch, agent=MemoryAgent(slowly)) as urls,
        open_batch(prompts(), BatchConfig(urls, in_flight=1)) as batch,
    ):
        started = anyio.current_time()
        assert [result.index async for result in batch] == [0, 1, 2]
        assert anyio.current_time() - started == pytest.approx(31)
