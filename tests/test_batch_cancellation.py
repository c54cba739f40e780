"""A batch can be cancelled, or fail, at any moment: it ends, tells the agents, and raises it as itself."""

from __future__ import annotations

import asyncio
import gc
from contextlib import aclosing
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from anyagent import OM, Backoff, Timeouts
from anyagent.batch import Adaptive, BatchConfig, Rates, Retry, open_batch

from .batch_agents import Answer, MemoryAgent, echo, memory_agents
from .properties import run, settle

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterable,
        AsyncIterator,
        Awaitable,
        Callable,
        Iterable,
        Iterator,
    )

PROMPTS = [f"prompt {number}" for number in range(8)]
BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


async def moody(prompt: str, answer: Answer) -> None:
    """Has something else for each prompt, the first time."""
    if answer.agent.seen.count(prompt) == 1:
        match int(prompt[7:]):
            case 1:
                answer.error("busy", retry_after=1)
                return
            case 2:
                answer.agent.lose()
                return
            case 3:
                answer.send(OM.GracefulDisconnect())
            case 4:
                await anyio.sleep(2)
            case 5:
                answer.text("half an")
                await anyio.sleep_forever()
    await echo(prompt, answer)


async def silent(prompt: str, answer: Answer) -> None:
    await anyio.sleep_forever()


async def ask_all(prompts: Iterable[str] | AsyncIterable[str], config: BatchConfig) -> None:
    async with open_batch(prompts, config) as batch:
        async for _ in batch:
            await anyio.sleep(1)


class Use:
    """Goes through a whole batch, with an asynchronous source and everything that can happen."""

    def __init__(self) -> None:
        self.agent = MemoryAgent(moody)
        self.source_closed = False
        self.done = False

    async def run(self, urls: tuple[str, ...]) -> None:
        config = BatchConfig(
            urls,
            in_flight=3,
            retry=Retry(safety="idempotent"),
            rates=Rates(requests_per_minute=600),
            reconnect=Backoff(),
            on_reconnect=self._renew,
        )
        async with aclosing(self._prompts()) as prompts, open_batch(prompts, config) as batch:
            for _ in range(7):
                await anext(batch)
        self.done = True

    async def _renew(self, cause: Exception | None) -> None:
        await anyio.lowlevel.checkpoint()

    async def _prompts(self) -> AsyncGenerator[str, None]:
        try:
            for prompt in PROMPTS:
                await anyio.lowlevel.checkpoint()
                yield prompt
            await anyio.sleep_forever()
        finally:
            self.source_closed = True

    def check_end(self) -> None:
        assert self.agent.in_flight == 0
        for peer in self.agent.all_peers:
            assert peer._client_receives.statistics().open_receive_streams == 0


async def pass_ticks(count: int) -> None:
    """Let `count` turns of the event loop pass, and time as well."""
    for tick in range(count):
        if tick % 10 == 9:
            await anyio.sleep(0.5)
        else:
            await anyio.lowlevel.checkpoint()


def cancelled_at_each_tick(backend: str, play: Callable[[Use, tuple[str, ...], int], Awaitable[None]]) -> int:
    """Have a batch cancelled one tick later each time, until it ends before; how often it was."""
    for tick in range(1_000):
        use = Use()

        async def main(use: Use = use, tick: int = tick) -> None:
            with pytest.MonkeyPatch.context() as monkeypatch:
                async with memory_agents(monkeypatch, agent=use.agent) as urls:
                    await play(use, urls, tick)
                    await settle()
                    use.check_end()

        run(backend, main, gc.collect)
        if use.done:
            return tick
    return 1_000


@BACKENDS
def test_cancelled_at_any_tick_the_batch_ends_and_leaves_nothing(backend: str) -> None:
    async def cancel(use: Use, urls: tuple[str, ...], tick: int) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(use.run, urls)
            await pass_ticks(tick)
            tasks.cancel_scope.cancel()

    assert 40 < cancelled_at_each_tick(backend, cancel) < 1_000


@pytest.mark.parametrize("again_after", [None, 0, 1, 3])
def test_cancelled_natively_at_any_tick_the_batch_ends_and_leaves_nothing(again_after: int | None) -> None:
    async def cancel(use: Use, urls: tuple[str, ...], tick: int) -> None:
        task = asyncio.create_task(use.run(urls))
        await pass_ticks(tick)
        early = task.cancel()
        if again_after is not None:
            await pass_ticks(again_after)
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or not early or use.done

    assert 40 < cancelled_at_each_tick("asyncio", cancel) < 1_000


@BACKENDS
@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("window", [1, 100])
def test_an_urgent_exception_in_the_prompts_iterator_comes_out_as_itself(
    backend: str, at: int, error: type[BaseException], asynchronous: bool, window: int
) -> None:
    urgent = error("now")

    def prompts() -> Iterator[str]:
        for number, prompt in enumerate(PROMPTS):
            if number == at:
                raise urgent
            yield prompt

    async def asynchronous_prompts() -> AsyncIterator[str]:
        await anyio.lowlevel.checkpoint()
        for prompt in prompts():
            yield prompt

    async def main() -> None:
        agent = MemoryAgent()
        with pytest.MonkeyPatch.context() as monkeypatch:
            async with memory_agents(monkeypatch, agent=agent) as urls:
                source = asynchronous_prompts() if asynchronous else prompts()
                with pytest.raises(error) as info:
                    await ask_all(source, BatchConfig(urls, window=window))
                assert info.value is urgent
                await settle()
                assert agent.in_flight == 0

    run(backend, main, gc.collect)


@BACKENDS
@pytest.mark.parametrize("error", [KeyboardInterrupt("now"), SystemExit(3), RuntimeError("a bug")])
def test_an_exception_in_on_reconnect_comes_out_as_itself_and_the_agents_are_told(
    backend: str, error: BaseException
) -> None:
    async def renew(cause: Exception | None) -> None:
        raise error

    async def fall(prompt: str, answer: Answer) -> None:
        answer.agent.lose()

    async def main() -> None:
        falling, other = MemoryAgent(fall), MemoryAgent(silent)
        with pytest.MonkeyPatch.context() as monkeypatch:
            async with memory_agents(monkeypatch, a=falling, b=other) as urls:
                config = BatchConfig(urls, in_flight=Adaptive(initial=4), on_reconnect=renew)
                with pytest.raises(type(error)) as info:
                    await ask_all(PROMPTS, config)
                assert info.value is error
                await settle()
                assert other.cancelled
                assert sorted(other.cancelled) == sorted(other.seen)

    run(backend, main, gc.collect)


@BACKENDS
def test_an_urgent_exception_goes_before_that_of_the_block(backend: str) -> None:
    urgent = KeyboardInterrupt()

    async def prompts() -> AsyncIterator[str]:
        await anyio.sleep(1)
        raise urgent
        yield ""

    async def fail_when_cancelled(urls: tuple[str, ...]) -> None:
        async with open_batch(prompts(), BatchConfig(urls)):
            try:
                await anyio.sleep_forever()
            finally:
                raise ValueError

    async def main() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
                with pytest.raises(KeyboardInterrupt) as info:
                    await fail_when_cancelled(urls)
                assert info.value is urgent

    run(backend, main, gc.collect)


def test_a_source_that_has_awaited_a_cancelled_task_does_not_hang_the_batch() -> None:
    async def prompts() -> AsyncIterator[str]:
        yield "hello"
        task = asyncio.create_task(asyncio.sleep(1))
        task.cancel()
        await task

    async def main() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
                with pytest.raises(asyncio.CancelledError):
                    await ask_all(prompts(), BatchConfig(urls))

    run("asyncio", main, gc.collect)


@BACKENDS
def test_what_waits_for_a_result_when_the_block_is_left_is_told_so(backend: str) -> None:
    async def main() -> None:
        closed = 0

        async def consume() -> None:
            nonlocal closed
            with pytest.raises(anyio.ClosedResourceError):
                await anext(batch)
            closed += 1

        with pytest.MonkeyPatch.context() as monkeypatch:
            async with memory_agents(monkeypatch, agent=MemoryAgent(silent)) as urls:
                async with (
                    anyio.create_task_group() as tasks,
                    open_batch(PROMPTS, BatchConfig(urls)) as batch,
                ):
                    tasks.start_soon(consume)
                    await anyio.sleep(1)
                await consume()
        assert closed == 2

    run(backend, main)


@BACKENDS
def test_what_had_been_answered_can_be_taken_once_the_block_is_left(backend: str) -> None:
    async def main() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
                async with open_batch(iter(PROMPTS), BatchConfig(urls, window=3)) as batch:
                    await anyio.sleep(1)
                assert sorted([(await anext(batch)).index for _ in range(3)]) == [0, 1, 2]
                with pytest.raises(anyio.ClosedResourceError):
                    await anext(batch)

    run(backend, main)


@BACKENDS
def test_leaving_takes_no_longer_than_closing_may(backend: str) -> None:
    async def main() -> None:
        agent = MemoryAgent(silent)
        with pytest.MonkeyPatch.context() as monkeypatch:
            async with memory_agents(monkeypatch, agent=agent) as urls:
                config = BatchConfig(urls, connections=3, connection_timeouts=Timeouts(close=7))
                async with open_batch(PROMPTS, config):
                    await anyio.sleep(1)
                    for peer in agent.peers:
                        peer.writable = anyio.Event()
                        peer.answers_close = False
                    started = anyio.current_time()
                assert anyio.current_time() - started == pytest.approx(7)

    run(backend, main)
