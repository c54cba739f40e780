"""The agents of a batch: connections that are lost, replaced, given up, and what is done about them."""

from __future__ import annotations

import itertools
import logging
import random
from typing import TYPE_CHECKING

import anyio
import pytest

from anyagent import OM, Backoff, ConnectError, Disconnected
from anyagent.batch import Adaptive, AttemptTimeouts, BatchConfig, Rates, Result, Retry, open_batch

from .batch_agents import Answer, MemoryAgent, echo, memory_agents

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyagent.testing import MemoryPeer

pytestmark = pytest.mark.anyio

PROMPTS = [f"prompt {number}" for number in range(20)]


async def results_of(config: BatchConfig) -> list[Result]:
    async with open_batch(PROMPTS, config) as batch:
        return [result async for result in batch]


async def fall(prompt: str, answer: Answer) -> None:
    """Is gone at once, but takes connections again."""
    answer.agent.lose()


async def fall_for_good(prompt: str, answer: Answer) -> None:
    answer.agent.down = True
    answer.agent.lose()


async def slowly(prompt: str, answer: Answer) -> None:
    await anyio.sleep(1)
    await echo(prompt, answer)


async def test_connections_that_are_lost_again_and_again_are_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = MemoryAgent(fall)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        retry = Retry(safety="idempotent", attempts=1_000)
        config = BatchConfig(urls, in_flight=1, retry=retry, reconnect=Backoff(attempts=4))
        async with open_batch(PROMPTS, config) as batch:
            with pytest.raises(ConnectError, match="every connection was lost again") as info:
                await anext(batch)
            assert isinstance(info.value.__cause__, Disconnected)
            assert batch.summary().reconnects == 4
    assert agent.connections == 5


async def test_a_connection_that_was_healthy_ends_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fall_later(prompt: str, answer: Answer) -> None:
        await anyio.sleep(31)
        if answer.agent.connections < 10:
            answer.agent.lose()
        await echo(prompt, answer)

    agent = MemoryAgent(fall_later)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        retry = Retry(safety="idempotent", attempts=1_000)
        config = BatchConfig(urls, retry=retry, reconnect=Backoff(attempts=1))
        assert {result.error for result in await results_of(config)} == {None}
    assert agent.connections == 10


async def test_an_agent_that_is_given_up_leaves_the_work_to_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    falling, other = MemoryAgent(fall_for_good), MemoryAgent(slowly)
    async with memory_agents(monkeypatch, a=falling, b=other) as urls:
        config = BatchConfig(
            urls, in_flight=2, connections=2, retry="idempotent", reconnect=Backoff(attempts=1, maximum=0.1)
        )
        results = await results_of(config)
    assert {result.error for result in results} == {None}
    assert len(results) == len(other.seen) == 20


async def test_an_agent_that_was_given_up_is_asked_again_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late, other = MemoryAgent(slowly), MemoryAgent(slowly)
    async with memory_agents(monkeypatch, a=late, b=other) as urls:
        config = BatchConfig(urls, in_flight=2, retry="idempotent", reconnect=Backoff(attempts=1, maximum=1))
        prompts = (f"prompt {number}" for number in range(200))
        async with open_batch(prompts, config) as batch:
            results = [await anext(batch) for _ in range(20)]
            late.down = True
            late.lose()
            results += [await anext(batch) for _ in range(80)]
            late.down, seen = False, len(late.seen)
            results += [result async for result in batch]
            assert len(late.seen) > seen
            other.down = late.down = True
    assert sorted(result.index for result in results) == list(range(200))


async def test_a_busy_agent_does_not_draw_the_prompts_from_one_that_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def busy(prompt: str, answer: Answer) -> None:
        answer.error("busy", retry_after=60)

    occupied, free = MemoryAgent(busy), MemoryAgent(slowly)
    async with memory_agents(monkeypatch, a=occupied, b=free) as urls:
        for in_flight in (10, Adaptive(initial=4)):
            results = await results_of(BatchConfig(urls, in_flight=in_flight))
            assert {result.error for result in results} == {None}


@pytest.mark.parametrize("in_flight", [50, Adaptive(initial=50)])
async def test_what_an_agent_takes_may_change_and_what_it_does_not_say_stays(
    in_flight: int | Adaptive, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def changing(prompt: str, answer: Answer) -> None:
        number = len(answer.agent.seen)
        if number == 10:
            answer.send(OM.Status("working", ("ids", "cancel")))
        if number == 60:
            answer.send(OM.Status("ready", ("ids", "cancel"), max_in_flight=12))
        peaks.append(answer.agent.in_flight)
        await anyio.sleep(1)
        answer.text(prompt)
        answer.end()

    peaks: list[int] = []
    agent = MemoryAgent(changing, status=OM.Status("ready", ("ids", "cancel"), max_in_flight=4))
    async with memory_agents(monkeypatch, agent=agent) as urls:
        prompts = (f"prompt {number}" for number in range(300))
        async with open_batch(prompts, BatchConfig(urls, in_flight=in_flight)) as batch:
            assert len([result async for result in batch]) == 300
    assert max(peaks[:60]) == 4
    assert max(peaks) == 12


async def test_an_agent_that_is_not_there_yet_is_waited_for_if_another_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late, other = MemoryAgent(slowly, down=True), MemoryAgent(slowly)
    async with (
        memory_agents(monkeypatch, a=late, b=other) as urls,
        open_batch(PROMPTS, BatchConfig(urls, in_flight=4, reconnect=Backoff(maximum=0.5))) as batch,
    ):
        assert batch.limit == 4
        await anext(batch)
        late.down = False
        assert len([result async for result in batch]) == 19
    assert late.seen


async def test_a_batch_with_a_result_for_each_prompt_has_ended_whether_or_not_there_are_agents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fall_together(prompt: str, answer: Answer) -> None:
        if answer.agent.in_flight == 2:
            await fall_for_good(prompt, answer)
        else:
            await anyio.sleep_forever()

    agent = MemoryAgent(fall_together)
    async with (
        memory_agents(monkeypatch, agent=agent) as urls,
        open_batch(PROMPTS[:2], BatchConfig(urls, in_flight=2)) as batch,
    ):
        started = anyio.current_time()
        errors = [result.error async for result in batch]
        assert anyio.current_time() == started
    assert [error and error.type for error in errors] == ["Disconnected"] * 2


async def test_new_headers_may_come_from_an_iterator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    async def renew(cause: Exception | None) -> Iterator[tuple[str, str]] | None:
        nonlocal calls
        calls += 1
        return iter([("A", "b")]) if calls == 1 else None

    async def fall_once(prompt: str, answer: Answer) -> None:
        if answer.agent.seen.count(prompt) == 1:
            answer.agent.lose()
        await echo(prompt, answer)

    agent = MemoryAgent(fall_once)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = BatchConfig(
            urls, on_reconnect=renew, in_flight=1, retry="idempotent", reconnect=Backoff(maximum=1)
        )
        assert len(await results_of(config)) == 20
    assert agent.headers == [None, *[(("A", "b"),)] * 20]


@pytest.mark.parametrize("error", [ConnectError("no token"), TimeoutError()])
async def test_renewing_that_fails_is_a_failed_attempt(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    causes: list[str] = []

    async def renew(cause: Exception | None) -> None:
        causes.append(type(cause).__name__)
        if len(causes) < 3:
            raise error

    async def fall_once(prompt: str, answer: Answer) -> None:
        if len(answer.agent.seen) == 1:
            answer.agent.lose()
        await echo(prompt, answer)

    agent = MemoryAgent(fall_once)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = BatchConfig(urls, on_reconnect=renew, in_flight=1, retry="idempotent")
        assert {result.error for result in await results_of(config)} == {None}
    assert causes == ["Disconnected", "ConnectError", "ConnectError"]
    assert agent.connections == 2


async def test_the_limit_is_that_of_the_agents_that_are_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = MemoryAgent(slowly), MemoryAgent(slowly, down=True)
    async with memory_agents(monkeypatch, a=a, b=b) as urls:
        config = BatchConfig(urls, in_flight=Adaptive(initial=3, maximum=3), connections=2)
        async with open_batch(PROMPTS, config) as batch:
            assert batch.limit == 0
            await anyio.sleep(0.1)
            assert (batch.limit, batch.in_flight) == (3, 3)
            b.down = False
            while batch.limit < 6:
                await anext(batch)
    assert a.peak == b.peak == 3


async def test_a_lost_connection_is_a_warning_that_names_the_host_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    agent = MemoryAgent(fall)
    caplog.set_level(logging.DEBUG, logger="anyagent")
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = BatchConfig(urls, in_flight=1, retry="idempotent", reconnect=Backoff(attempts=1))
        async with open_batch(PROMPTS, config) as batch:
            with pytest.raises(ConnectError):
                async for _ in batch:
                    pass
    records = [record for record in caplog.records if record.getMessage().startswith("batch")]
    assert [(record.levelname, record.getMessage()) for record in records] == [
        ("WARNING", "batch: agent:80: Disconnected, connecting again"),
        ("ERROR", "batch: agent:80: 2 failures in a row, the last: Disconnected"),
    ]


async def test_a_timeout_does_not_begin_before_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second prompt waits for its rate, and then to be written, at a time when it is looked at."""

    def block(peers: list[MemoryPeer]) -> None:
        (peer,) = peers
        peer.writable = anyio.Event()

    agent = MemoryAgent()
    async with memory_agents(monkeypatch, agent=agent) as urls:
        rates, timeouts = Rates(requests_per_minute=1), AttemptTimeouts(total=7)
        async with open_batch(PROMPTS[:2], BatchConfig(urls, rates=rates, timeouts=timeouts)) as batch:
            await anext(batch)
            await anyio.sleep(55)
            block(agent.peers)
            await anyio.sleep(9.5)
            agent.peers[0].writable.set()
            assert (await anext(batch)).error is None


async def test_an_attempt_that_cannot_be_written_has_its_timeouts_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    agent = MemoryAgent()
    async with memory_agents(monkeypatch, agent=agent) as urls:
        retry, timeouts = (
            Retry(safety="idempotent", attempts=3, initial=5, maximum=5),
            AttemptTimeouts(total=7),
        )
        async with open_batch(
            PROMPTS, BatchConfig(urls, in_flight=1, window=1, retry=retry, timeouts=timeouts)
        ) as batch:
            await anext(batch)
            agent.peers[0].writable = anyio.Event()
            await anyio.wait_all_tasks_blocked()
            result = await anext(batch)
    assert [attempt.sent is None for attempt in result.attempts] == [False, True, True], "one blocks the rest"
    errors = [attempt.error for attempt in result.attempts]
    assert [(error and error.type, error and error.code) for error in errors] == [
        ("TimeoutError", "total")
    ] * 3
    ends = [result.timings.queued, *(attempt.end for attempt in result.attempts)]
    waits = [end - before for before, end in itertools.pairwise(ends)]
    assert all(wait >= 7 - 1e-5 + 5 * (number > 0) for number, wait in enumerate(waits))
    assert agent.seen == ["prompt 0"]
