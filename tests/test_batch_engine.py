"""A batch: one result for each prompt."""

# ruff: noqa: SIM117 - two blocks show that the agents outlive the batch

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import anyio
import pytest

from anyagent import OM, Backoff, ConnectError
from anyagent.batch import (
    Adaptive,
    AttemptTimeouts,
    BatchConfig,
    Prompt,
    Rates,
    Result,
    Retry,
    TooManyErrors,
    open_batch,
)

from .batch_agents import Answer, MemoryAgent, echo, memory_agents
from .peers import SINGLE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

pytestmark = pytest.mark.anyio


async def results_of(prompts: Iterable[Prompt | str], config: BatchConfig) -> list[Result]:
    async with open_batch(prompts, config) as batch:
        return [result async for result in batch]


def numbered(count: int) -> list[str]:
    return [f"prompt {number}" for number in range(count)]


async def test_every_prompt_has_one_result_with_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = MemoryAgent()
    async with memory_agents(monkeypatch, agent=agent) as urls:
        results = await results_of(numbered(500), BatchConfig(urls))
    assert sorted(result.index for result in results) == list(range(500))
    assert all(result.text == f"prompt {result.index}" for result in results)
    assert sorted(agent.seen) == sorted(numbered(500))


async def test_a_result_carries_all_there_is_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slowly(prompt: str, answer: Answer) -> None:
        await anyio.sleep(1)
        answer.text("one ")
        await anyio.sleep(2)
        answer.text("two")
        await anyio.sleep(4)
        answer.end()

    async with memory_agents(monkeypatch, agent=MemoryAgent(slowly)) as urls:
        prompt = Prompt("hello", id="row 1", columns={"topic": [1]})
        (result,) = await results_of([prompt], BatchConfig(urls))
    assert (result.id, result.index, result.text, result.tokens_used) == ("row 1", 0, "one two", 2)
    assert result.error is None
    assert result.columns == {"topic": [1]}
    timings, (attempt,) = result.timings, result.attempts
    assert timings.sent is not None
    assert timings.first_event is not None
    assert timings.first_event - timings.sent == pytest.approx(1)
    assert timings.end - timings.first_event == pytest.approx(6)
    assert timings.queued <= timings.sent
    assert attempt.agent == "agent:80/"
    assert (attempt.sent, attempt.first_event, attempt.end) == (
        timings.sent,
        timings.first_event,
        timings.end,
    )


async def test_prompts_are_read_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for read in itertools.count(1):
            yield f"prompt {read}"

    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        async with open_batch(endless(), BatchConfig(urls, in_flight=8, window=20)) as batch:
            await anyio.wait_all_tasks_blocked()
            assert read == 20, "nobody takes the results"
            for _ in range(100):
                await anext(batch)
            await anyio.wait_all_tasks_blocked()
            assert read == 120


async def test_an_asynchronous_source_is_read_as_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    send, receive = anyio.create_memory_object_stream[str](1_000)
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        async with receive, open_batch(receive, BatchConfig(urls)) as batch:
            async with send:
                for number in range(200):
                    send.send_nowait(f"prompt {number}")
                    if number % 50 == 0:
                        assert (await anext(batch)).text is not None
            rest = [result async for result in batch]
    assert len(rest) == 196
    assert {result.error for result in rest} == {None}


async def test_results_come_in_the_order_of_the_prompts_if_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async def first_last(prompt: str, answer: Answer) -> None:
        await anyio.sleep(100 if prompt == "prompt 0" else int(prompt[7:]) % 7)
        await echo(prompt, answer)

    agent = MemoryAgent(first_last)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = BatchConfig(urls, in_flight=8, ordered=True, window=30)
        async with open_batch(numbered(200), config) as batch:
            await anyio.sleep(50)
            assert len(agent.seen) == 30, "no more than the window waits for the first"
            assert [result.index async for result in batch] == list(range(200))


async def test_a_prompt_that_fails_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    async def moody(prompt: str, answer: Answer) -> None:
        if prompt == "prompt 3":
            answer.text("half an")
            answer.error("no_answer", "I do not know")
        else:
            await echo(prompt, answer)

    async with memory_agents(monkeypatch, agent=MemoryAgent(moody)) as urls:
        results = await results_of(numbered(10), BatchConfig(urls))
    (failed,) = [result for result in results if result.error is not None]
    assert failed.index == 3
    assert (failed.text, failed.tokens_used) == (None, None)
    assert failed.error is not None
    assert (failed.error.type, failed.error.code, failed.error.details) == (
        "AgentError",
        "no_answer",
        "I do not know",
    )
    assert [attempt.partial for attempt in failed.attempts] == ["half an"]
    assert len(results) == 10


async def test_an_answer_that_the_agent_calls_incomplete_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def cut_off(prompt: str, answer: Answer) -> None:
        answer.text("half an")
        answer.end("incomplete")

    async with memory_agents(monkeypatch, agent=MemoryAgent(cut_off)) as urls:
        (result,) = await results_of(["hello"], BatchConfig(urls, retry="idempotent"))
    assert result.error is not None
    assert (result.error.type, result.error.code) == ("NotCompleted", "incomplete")
    assert [attempt.partial for attempt in result.attempts] == ["half an"]


@pytest.mark.parametrize("prompt", [Prompt("hello \ud800"), Prompt("hello", metadata={"a": object()})])
async def test_a_prompt_that_cannot_be_sent_fails_alone(
    prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        prompt = Prompt(prompt.text, "row 1", None, prompt.metadata)
        results = await results_of([prompt, "another"], BatchConfig(urls))
    first, second = sorted(results, key=lambda result: result.index)
    assert first.error is not None
    assert first.error.code is None
    assert "hello" not in first.error.details
    assert second.text == "another"


async def test_what_is_no_prompt_ends_the_batch_once_all_before_it_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        async with open_batch(["one", 2, "three"], BatchConfig(urls)) as batch:  # type: ignore[list-item]
            assert (await anext(batch)).text == "one"
            with pytest.raises(TypeError, match="not int"):
                await anext(batch)
        with pytest.raises(TypeError, match="iterable of prompts"):
            async with open_batch("hello", BatchConfig(urls)):
                pytest.fail("a string is not a list of prompts")


async def test_an_agent_that_is_busy_is_asked_again_after_what_it_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    async def busy(prompt: str, answer: Answer) -> None:
        asked.append(anyio.current_time())
        if len(asked) < 3:
            answer.error("busy", retry_after=10)
        else:
            await echo(prompt, answer)

    async with memory_agents(monkeypatch, agent=MemoryAgent(busy)) as urls:
        retry = Retry(initial=2, maximum=3)
        async with open_batch(["hello"], BatchConfig(urls, retry=retry)) as batch:
            (result,) = [result async for result in batch]
            assert batch.retried == 2
    assert result.text == "hello"
    assert [attempt.error and attempt.error.code for attempt in result.attempts] == ["busy", "busy", None]
    first, second, third = asked
    assert 10 <= second - first <= 12 + 1e-3
    assert 10 <= third - second <= 13 + 1e-3


async def test_attempts_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(prompt: str, answer: Answer) -> None:
        answer.error("busy")

    agent = MemoryAgent(busy)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        (result,) = await results_of(["hello"], BatchConfig(urls, retry=Retry(attempts=3)))
    assert agent.seen == ["hello"] * 3
    assert len(result.attempts) == 3
    assert result.error is not None
    assert result.error.code == "busy"


async def lost(prompt: str, answer: Answer) -> None:
    """Begins with an answer, and is gone, the first time."""
    if answer.agent.seen.count(prompt) == 1:
        answer.text("half an")
        answer.agent.lose()
    else:
        await echo(prompt, answer)


async def never(prompt: str, answer: Answer) -> None:
    """Does not answer the first time."""
    if answer.agent.seen.count(prompt) == 1:
        await anyio.sleep_forever()
    await echo(prompt, answer)


async def refusing(prompt: str, answer: Answer) -> None:
    """Answers with an error the first time."""
    if answer.agent.seen.count(prompt) == 1:
        answer.error("try_me", "again")
    await echo(prompt, answer)


@pytest.mark.parametrize(
    ("handler", "retry", "times"),
    [
        (lost, Retry(), 1),
        (lost, Retry(safety="idempotent"), 2),
        (never, Retry(), 1),
        (never, Retry(safety="idempotent"), 2),
        (refusing, Retry(), 1),
        (refusing, Retry(safety="idempotent"), 1),
        (refusing, Retry(codes=["try_me"]), 2),
    ],
)
async def test_a_prompt_that_may_have_been_begun_is_asked_again_only_where_that_was_allowed(
    handler: object, retry: Retry, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = MemoryAgent(handler)  # type: ignore[arg-type]
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = BatchConfig(urls, retry=retry, timeouts=AttemptTimeouts(idle=100))
        (result,) = await results_of(["hello"], config)
    assert agent.seen == ["hello"] * times
    assert len(result.attempts) == times
    assert (result.text == "hello") == (times == 2)


async def test_a_prompt_that_was_not_begun_is_always_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = MemoryAgent()
    async with memory_agents(monkeypatch, agent=agent) as urls:
        send, receive = anyio.create_memory_object_stream[str](10)
        config = BatchConfig(urls, retry=Retry(attempts=1), reconnect=Backoff())
        async with send, receive, open_batch(receive, config) as batch:
            await anyio.wait_all_tasks_blocked()
            for number in range(10):
                agent.lose()
                await anyio.wait_all_tasks_blocked()
                send.send_nowait(f"prompt {number}")
                assert (await anext(batch)).text == f"prompt {number}"
            assert batch.retried == 0
    assert agent.seen == numbered(10)
    assert agent.connections == 11


@pytest.mark.parametrize(
    ("timeouts", "kind", "seconds"),
    [
        (AttemptTimeouts(total=5), "total", 5),
        (AttemptTimeouts(first_event=2), "first_event", 2),
        (AttemptTimeouts(idle=3), "idle", 3),
        (AttemptTimeouts(total=5, first_event=2, idle=3), "first_event", 2),
    ],
)
async def test_an_attempt_that_takes_too_long_is_ended_and_the_agent_is_told(
    timeouts: AttemptTimeouts, kind: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(prompt: str, answer: Answer) -> None:
        await anyio.sleep_forever()

    agent = MemoryAgent(silent)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        (result,) = await results_of(["hello"], BatchConfig(urls, timeouts=timeouts))
        assert agent.cancelled == ["hello"]
    assert result.error is not None
    assert (result.error.type, result.error.code) == ("TimeoutError", kind)
    assert result.timings.sent is not None
    assert result.timings.end - result.timings.sent == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("timeouts", "kind", "seconds"),
    [
        (AttemptTimeouts(total=50, first_event=2, idle=3), "total", 50),
        (AttemptTimeouts(first_event=2, idle=3), None, 100),
        (AttemptTimeouts(total=None, first_event=None, idle=None), None, 100),
        (AttemptTimeouts(idle=0.5), "idle", 0.5),
    ],
)
async def test_timeouts_are_measured_from_where_they_say(
    timeouts: AttemptTimeouts, kind: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steady(prompt: str, answer: Answer) -> None:
        for _ in range(100):
            await anyio.sleep(1)
            answer.text("x")
        answer.end()

    async with memory_agents(monkeypatch, agent=MemoryAgent(steady)) as urls:
        (result,) = await results_of(["hello"], BatchConfig(urls, timeouts=timeouts))
    assert (result.error and result.error.code) == kind
    assert result.timings.sent is not None
    assert result.timings.end - result.timings.sent == pytest.approx(seconds)


@pytest.mark.parametrize("limits", [{"max_errors": 2}, {"max_error_rate": 0.1}])
async def test_too_many_errors_end_the_batch(
    limits: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(prompt: str, answer: Answer) -> None:
        if int(prompt[7:]) % 4 == 0:
            answer.error("no_answer")
        else:
            await echo(prompt, answer)

    config_of = BatchConfig
    agent = MemoryAgent(failing)
    results: list[Result] = []
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = config_of(urls, in_flight=1, **limits)  # type: ignore[arg-type]
        async with open_batch(numbered(1_000), config) as batch:
            with pytest.raises(TooManyErrors) as info:  # noqa: PT012 - the loop is what raises
                async for result in batch:
                    results.append(result)
    failed = sum(result.error is not None for result in results)
    assert (info.value.failed, info.value.finished) == (failed, len(results))
    assert failed == (3 if "max_errors" in limits else 25)
    assert len(agent.seen) == (9 if "max_errors" in limits else 100)


async def test_leaving_early_cancels_what_is_in_flight_and_tells_the_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def slowly(prompt: str, answer: Answer) -> None:
        if int(prompt[7:]) > 2:
            await anyio.sleep_forever()
        await echo(prompt, answer)

    agent = MemoryAgent(slowly)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        async with open_batch(numbered(100), BatchConfig(urls, in_flight=10)) as batch:
            for _ in range(3):
                await anext(batch)
            await anyio.wait_all_tasks_blocked()
            assert agent.in_flight == 10
        await anyio.wait_all_tasks_blocked()
    assert sorted(agent.cancelled) == sorted(f"prompt {number}" for number in range(3, 13))
    assert len(agent.seen) == 13


async def test_a_batch_that_is_stopped_begins_nothing_and_answers_what_is_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def slowly(prompt: str, answer: Answer) -> None:
        await anyio.sleep(10)
        if prompt == "prompt 1":
            answer.error("busy")
        await echo(prompt, answer)

    agent = MemoryAgent(slowly)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = BatchConfig(urls, in_flight=5, ordered=True)
        async with open_batch(numbered(100), config) as batch:
            await anyio.sleep(5)
            batch.stop()
            indices = [result.index async for result in batch]
    assert indices == [0, 2, 3, 4], "that which would be tried again has no result"
    assert len(agent.seen) == 5


async def test_a_batch_that_is_stopped_sends_nothing_that_waits_for_its_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = MemoryAgent()
    async with memory_agents(monkeypatch, agent=agent) as urls:
        rates = Rates(requests_per_minute=60)
        async with open_batch(numbered(100), BatchConfig(urls, in_flight=5, rates=rates)) as batch:
            results = [await anext(batch) for _ in range(3)]
            batch.stop()
            results += [result async for result in batch]
    assert len(results) == len(agent.seen) <= 4


async def test_several_agents_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slowly(prompt: str, answer: Answer) -> None:
        await anyio.sleep(1)
        await echo(prompt, answer)

    agents = [MemoryAgent(slowly) for _ in range(3)]
    async with memory_agents(monkeypatch, a=agents[0], b=agents[1], c=agents[2]) as urls:
        results = await results_of(numbered(300), BatchConfig(urls, in_flight=30))
    assert len(results) == 300
    assert all(80 <= len(agent.seen) <= 120 for agent in agents)
    assert {attempt.agent for result in results for attempt in result.attempts} == {
        "a:80/",
        "b:80/",
        "c:80/",
    }


async def test_a_connection_that_takes_one_request_at_a_time_is_given_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def slowly(prompt: str, answer: Answer) -> None:
        await anyio.sleep(1)
        await echo(prompt, answer)

    agent = MemoryAgent(slowly, status=SINGLE)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        started = anyio.current_time()
        results = await results_of(numbered(40), BatchConfig(urls, connections=4))
        assert anyio.current_time() - started == pytest.approx(10, abs=0.1)
    assert len(results) == 40
    assert (agent.peak, agent.connections) == (4, 4)


async def test_an_agent_is_not_asked_more_than_it_says_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slowly(prompt: str, answer: Answer) -> None:
        await anyio.sleep(1)
        await echo(prompt, answer)

    agent = MemoryAgent(slowly, status=OM.Status("ready", ("ids", "cancel"), max_in_flight=3))
    async with memory_agents(monkeypatch, agent=agent) as urls:
        await results_of(numbered(40), BatchConfig(urls, connections=2))
    assert agent.peak == 6


async def test_one_agent_of_three_dies_and_returns_and_no_row_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def slowly(prompt: str, answer: Answer) -> None:
        await anyio.sleep(1)
        await echo(prompt, answer)

    a, b, c = (MemoryAgent(slowly) for _ in range(3))
    async with memory_agents(monkeypatch, a=a, b=b, c=c) as urls:
        config = BatchConfig(urls, in_flight=30, retry="idempotent", reconnect=Backoff(maximum=1))
        results: list[Result] = []
        async with open_batch(numbered(600), config) as batch:
            async for result in batch:
                results.append(result)
                if len(results) == 100:
                    a.down = True
                    a.lose()
                elif len(results) == 300:
                    assert a.in_flight == 0
                    seen_when_it_returned = len(a.seen)
                    a.down = False
    assert sorted(result.index for result in results) == list(range(600))
    assert {result.error for result in results} == {None}
    assert len(a.seen) > seen_when_it_returned


async def test_no_agent_at_all_is_a_connect_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = MemoryAgent(down=True), MemoryAgent(down=True)
    async with memory_agents(monkeypatch, a=a, b=b) as urls:
        async with open_batch(["hello"], BatchConfig(urls, connections=2)) as batch:
            started = anyio.current_time()
            with pytest.raises(ConnectError, match="nobody is there"):
                await anext(batch)
            assert anyio.current_time() - started < 3


async def test_agents_that_are_gone_are_waited_for_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = MemoryAgent()
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = BatchConfig(urls, reconnect=Backoff(attempts=3), in_flight=1)
        async with open_batch(numbered(10), config) as batch:
            assert (await anext(batch)).text == "prompt 0"
            agent.down = True
            agent.lose()
            with pytest.raises(ConnectError, match="nobody is there"):
                async for _ in batch:
                    pass


async def test_an_agent_that_announces_its_end_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slowly(prompt: str, answer: Answer) -> None:
        if prompt == "prompt 20":
            answer.send(OM.GracefulDisconnect())
        await anyio.sleep(100 if prompt == "prompt 19" else 1)
        await echo(prompt, answer)

    agent = MemoryAgent(slowly)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        results = await results_of(numbered(60), BatchConfig(urls, in_flight=5))
    assert {result.error for result in results} == {None}
    assert len(agent.seen) == len(results) == 60
    assert agent.connections == 2


async def test_headers_are_renewed_before_another_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    causes: list[str] = []

    async def renew(cause: Exception | None) -> dict[str, str] | None:
        causes.append(type(cause).__name__)
        return {"Authorization": f"Bearer {len(causes)}"} if len(causes) < 3 else None

    agent = MemoryAgent(lost)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = BatchConfig(
            urls, headers={"Authorization": "Bearer 0"}, on_reconnect=renew, in_flight=1, retry="idempotent"
        )
        results = await results_of(numbered(3), config)
    assert sorted(result.text or "" for result in results) == numbered(3)
    assert causes == ["Disconnected"] * 3
    assert agent.headers == [{"Authorization": f"Bearer {number}"} for number in (0, 1, 2, 2)]


async def test_renewing_that_takes_too_long_is_a_failed_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    async def renew(cause: Exception | None) -> None:
        await anyio.sleep_forever()

    agent = MemoryAgent(lost)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = BatchConfig(urls, on_reconnect=renew, retry="idempotent", reconnect=Backoff(attempts=2))
        async with open_batch(["hello"], config) as batch:
            with pytest.raises(ConnectError, match="no new headers"):
                await anext(batch)


async def test_what_a_callback_raises_comes_out_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("a bug of the caller")

    async def renew(cause: Exception | None) -> None:
        raise error

    agent = MemoryAgent(lost)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        with pytest.raises(RuntimeError) as info:
            async with open_batch(
                ["hello"], BatchConfig(urls, on_reconnect=renew, retry="idempotent")
            ) as batch:
                await anext(batch)
    assert info.value is error


async def test_the_blocks_own_exception_comes_out_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ExceptionGroup("mine", [ValueError()])
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        with pytest.raises(ExceptionGroup) as info:
            async with open_batch(numbered(10), BatchConfig(urls)):
                raise error
    assert info.value is error
    assert error.__context__ is None


async def test_an_exception_of_the_prompts_own_iterator_comes_out_behind_the_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = OSError("the disk is gone")

    async def prompts() -> AsyncIterator[str]:
        for prompt in numbered(100):
            yield prompt
        raise error

    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        async with open_batch(prompts(), BatchConfig(urls)) as batch:
            for _ in range(100):
                await anext(batch)
            with pytest.raises(OSError, match="disk") as info:
                await anext(batch)
    assert info.value is error


async def test_there_is_one_consumer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(prompt: str, answer: Answer) -> None:
        await anyio.sleep_forever()

    async with memory_agents(monkeypatch, agent=MemoryAgent(silent)) as urls:
        async with open_batch(["hello"], BatchConfig(urls)) as batch, anyio.create_task_group() as tasks:
            tasks.start_soon(anext, batch)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await anext(batch)
            tasks.cancel_scope.cancel()


async def test_a_wait_for_a_result_that_is_cancelled_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slowly(prompt: str, answer: Answer) -> None:
        await anyio.sleep(1)
        await echo(prompt, answer)

    indices: list[int] = []
    async with memory_agents(monkeypatch, agent=MemoryAgent(slowly)) as urls:
        async with open_batch(numbered(20), BatchConfig(urls, in_flight=3)) as batch:
            while len(indices) < 20:
                with anyio.move_on_after(0.3):
                    indices.append((await anext(batch)).index)
            with pytest.raises(StopAsyncIteration):
                await anext(batch)
    assert sorted(indices) == list(range(20))


async def test_no_prompts_are_no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        assert await results_of([], BatchConfig(urls)) == []


async def test_a_summary_has_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(prompt: str, answer: Answer) -> None:
        await anyio.sleep(1)
        if prompt == "prompt 3":
            answer.error("no_answer")
        else:
            await echo(prompt, answer)

    async with memory_agents(monkeypatch, agent=MemoryAgent(failing)) as urls:
        async with open_batch(numbered(10), BatchConfig(urls, in_flight=2)) as batch:
            async for _ in batch:
                assert batch.limit == 2
                assert batch.in_flight <= 2
            summary = batch.summary()
            assert (batch.done, batch.failed) == (summary.done, summary.failed) == (9, 1)
    assert summary.elapsed == pytest.approx(5, abs=0.1)
    assert summary.tokens == 9


async def test_what_waits_for_its_rate_is_not_in_flight_and_lets_no_limit_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = MemoryAgent()
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = BatchConfig(urls, rates=Rates(requests_per_minute=60))
        async with open_batch(numbered(200), config) as batch:
            async for _ in batch:
                assert batch.in_flight <= 2
            assert batch.limit == Adaptive().initial


@pytest.mark.parametrize("in_flight", [13, 16, Adaptive(initial=13, minimum=13)])
async def test_an_agent_that_is_busy_is_not_asked_over_and_over_until_no_attempt_is_left(
    in_flight: int | Adaptive, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def takes_twelve(prompt: str, answer: Answer) -> None:
        if answer.agent.in_flight > 12:
            answer.error("busy")
        else:
            await anyio.sleep(0.1)
            await echo(prompt, answer)

    async with memory_agents(monkeypatch, agent=MemoryAgent(takes_twelve)) as urls:
        results = await results_of(numbered(1_000), BatchConfig(urls, in_flight=in_flight))
    failed = sum(result.error is not None for result in results)
    assert failed <= 20


async def test_failures_other_than_a_busy_agent_do_not_change_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def failing(prompt: str, answer: Answer) -> None:
        answer.error("no_answer")

    async with memory_agents(monkeypatch, agent=MemoryAgent(failing)) as urls:
        async with open_batch(numbered(200), BatchConfig(urls)) as batch:
            async for _ in batch:
                assert batch.limit == Adaptive().initial
