"""Whatever agents and consumers do, every prompt has one result and is asked no more than is allowed."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent import OM, Backoff, ConnectError, Timeouts
from anyagent.batch import (
    BUSY_CODES,
    Adaptive,
    AttemptTimeouts,
    BatchConfig,
    Rates,
    Retry,
    TooManyErrors,
    open_batch,
)

from .batch_agents import Answer, MemoryAgent, memory_agents
from .peers import NATIVE, SINGLE
from .properties import REPEATABLE, run, settle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator

    from anyagent.batch import Attempt, Batch, Result
    from anyagent.testing import MemoryPeer

Behaviour: TypeAlias = tuple[str, int]
"""What an agent does with a prompt, and a number for it."""

CLOCK: Final = 1e-5
"""Seconds: what is lost of a moment when it is told as a Unix time."""

READ_AHEAD: Final = 65

_numbers: Final = st.integers(0, 5)
_kind: Final = ["answer"] * 4 + ["wait", "wait", "piecemeal", "busy", "busy", "later"]
_trouble: Final = [
    "refuse",
    "try_me",
    "hang",
    "halve",
    "cut off",
    "nonsense",
    "violate",
    "lose",
    "part",
    "fall",
]
_behaviours: Final[st.SearchStrategy[Behaviour]] = st.tuples(st.sampled_from(_kind + _trouble), _numbers)
_statuses: Final = st.sampled_from(
    [
        NATIVE,
        NATIVE,
        OM.Status("ready", ("ids", "cancel"), max_in_flight=2),
        OM.Status("ready", ("ids",)),
        SINGLE,
    ]
)
_retries: Final = st.builds(
    Retry,
    safety=st.sampled_from(["safe", "idempotent"]),
    codes=st.sampled_from([BUSY_CODES, {"busy", "try_me"}, ()]),
    attempts=st.integers(1, 4),
    maximum=st.sampled_from([0.5, 5]),
)
_timeouts: Final = st.builds(
    AttemptTimeouts,
    total=st.none() | st.sampled_from([1, 2.5]),
    first_event=st.none() | st.just(2),
    idle=st.sampled_from([1, 4, 600]),
)
_rates: Final = st.builds(
    Rates,
    requests_per_minute=st.none() | st.sampled_from([30, 600]),
    tokens_per_minute=st.none() | st.just(5_000),
)
_options: Final = st.fixed_dictionaries(
    {
        "connections": st.integers(1, 2),
        "in_flight": st.integers(1, 4)
        | st.builds(Adaptive, initial=st.integers(2, 3), maximum=st.integers(3, 5)),
        "retry": _retries,
        "timeouts": _timeouts,
        "rates": st.just(Rates()) | _rates,
        "ordered": st.booleans(),
        "window": st.sampled_from([1, 3, 1_000]),
        "max_errors": st.sampled_from([None, None, None, 0, 2]),
        "reconnect": st.sampled_from([Backoff(maximum=2), Backoff(attempts=2)]),
        "connection_timeouts": st.just(Timeouts(drain=5)),
    }
)
_sources: Final = st.sampled_from(["list", "generator", "asynchronous", "slow", "failing", "failing later"])
_consumers: Final = st.sampled_from(
    ["all", "all", "all", "slowly", "stop", "leave", "raise", "cancel", "cancel natively"]
)


class OfTheSource(Exception):
    pass


class OfTheBlock(Exception):
    pass


@dataclasses.dataclass
class Asked:
    """What an agent saw: a prompt, in `time`, on a connection of `peer`."""

    prompt: str
    time: float
    label: str
    peer: MemoryPeer
    finished: bool = False
    told_to_stop: bool = False


class Play:
    """Agents that do with each prompt what is drawn for it, each time, and what they saw."""

    def __init__(self, plan: list[list[Behaviour]], statuses: list[OM.Status]) -> None:
        self.asked: list[Asked] = []
        self.disturbed: set[MemoryPeer] = set()
        self.agents = {
            name: MemoryAgent(self._handle, status=status)
            for name, status in zip("abc", statuses, strict=False)
        }
        self._plan = plan
        self._names = {agent: name for name, agent in self.agents.items()}

    async def _handle(self, prompt: str, answer: Answer) -> None:
        agent, times = answer.agent, sum(asked.prompt == prompt for asked in self.asked)
        asked = Asked(prompt, anyio.current_time(), f"{self._names[agent]}:80/", answer.peer)
        self.asked.append(asked)
        behaviours = self._plan[int(prompt[7:])]
        try:
            with suppress(anyio.BrokenResourceError):  # the client has closed the connection meanwhile
                await self._behave(answer, prompt, *(behaviours[times:] or [("answer", 0)])[0])
            asked.finished = True
        finally:
            asked.told_to_stop = prompt in agent.cancelled

    async def _behave(self, answer: Answer, prompt: str, behaviour: str, number: int) -> None:
        match behaviour:
            case "answer":
                answer.text(prompt)
                answer.end()
            case "wait":
                await anyio.sleep(number / 2)
                await self._behave(answer, prompt, "answer", 0)
            case "piecemeal":
                for letter in prompt:
                    answer.text(letter)
                    await anyio.sleep(number / 10)
                answer.end()
            case "busy" | "refuse" | "try_me":
                answer.error(behaviour)
            case "later":
                answer.error("busy", retry_after=number)
            case "hang":
                await anyio.sleep_forever()
            case "halve":
                answer.text(prompt[:3])
                answer.end("incomplete")
            case "cut off":
                answer.text(prompt[:3])
                self._lose(answer.agent)
            case "nonsense":
                self._disturb_where_it_has_no_ids(answer)
                answer.send(
                    b'{"type": "AGENT_EVENT_TEXT_CHUNK", "id": "%s", "text": 5}' % (answer.id or "").encode()
                )
                await anyio.sleep_forever()
            case "violate":
                self.disturbed.add(answer.peer)
                answer.send(b"no JSON")
            case "lose":
                if number > 2:
                    await self._behave(answer, prompt, "answer", 0)
                self._lose(answer.agent)
            case "part":
                answer.send(OM.GracefulDisconnect())
                await anyio.sleep(number)
                await self._behave(answer, prompt, "answer", 0)
            case "fall":
                answer.agent.down = True
                answer.agent.tasks.start_soon(self._rise, answer.agent, number)
                self._lose(answer.agent)

    def _lose(self, agent: MemoryAgent) -> None:
        self.disturbed.update(agent.peers)
        peers, agent.peers = agent.peers, []
        for peer in peers:
            with suppress(anyio.BrokenResourceError):
                peer.close(1006)

    def _disturb_where_it_has_no_ids(self, answer: Answer) -> None:
        if answer.id is None:
            self.disturbed.add(answer.peer)

    async def _rise(self, agent: MemoryAgent, seconds: float) -> None:
        await anyio.sleep(seconds)
        agent.down = False


class Reader:
    """The source of the prompts, and how far it was read."""

    def __init__(self, source: str, count: int) -> None:
        self.read = 0
        self.taken = 0
        self.most_ahead = 0
        self.error = OfTheSource()
        self.asynchronous = source in ("asynchronous", "slow", "failing later")
        self._source = source
        self._prompts = [f"prompt {number}" for number in range(count)]

    def prompts(self) -> Iterable[str] | AsyncGenerator[str, None]:
        match self._source:
            case "list":
                return self._prompts
            case "generator" | "failing":
                return self._generate()
            case _:
                return self._generate_asynchronously()

    @property
    def fails(self) -> bool:
        return self._source.startswith("failing")

    def _generate(self) -> Iterator[str]:
        for prompt in self._prompts:
            self._note()
            yield prompt
        if self.fails:
            raise self.error

    async def _generate_asynchronously(self) -> AsyncGenerator[str, None]:
        for prompt in self._prompts:
            if self._source == "slow":
                await anyio.sleep(1)
            self._note()
            yield prompt
        if self.fails:
            raise self.error

    def _note(self) -> None:
        self.read += 1
        self.most_ahead = max(self.most_ahead, self.read - self.taken)


class Consumer:
    """Takes the results, and leaves in one of several ways; `outcome`: what came out of the block."""

    def __init__(self, way: str, number: int, reader: Reader, backend: str) -> None:
        self.results: list[Result] = []
        self.outcome: BaseException | None = None
        self.complete = False
        self.cancelled = False
        self.error = OfTheBlock()
        self._way = way
        self._number = number
        self._reader = reader
        self._natively = way == "cancel natively" and backend == "asyncio"

    async def run(self, config: BatchConfig) -> None:
        prompts = self._reader.prompts()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                if self._way.startswith("cancel"):
                    tasks.start_soon(
                        self._cancel_later, scope, asyncio.current_task() if self._natively else None
                    )
                try:
                    if isinstance(prompts, AsyncGeneratorType):
                        async with aclosing(prompts):
                            await self._consume(prompts, config)
                    else:
                        await self._consume(prompts, config)
                except anyio.get_cancelled_exc_class():
                    self.cancelled = True
                    if not self._natively:
                        raise
                    task = asyncio.current_task()
                    assert task is not None
                    task.uncancel()
                except BaseException as exc:
                    self.outcome = exc
                tasks.cancel_scope.cancel()

    async def _cancel_later(self, scope: anyio.CancelScope, task: asyncio.Task[object] | None) -> None:
        await anyio.sleep(self._number * 0.4)
        if task is None:
            scope.cancel()
        else:
            task.cancel()

    async def _consume(self, prompts: Iterable[str] | AsyncIterable[str], config: BatchConfig) -> None:
        async with open_batch(prompts, config) as batch:
            if self._way == "leave" and self._number == 0:
                return
            async for result in batch:
                self.results.append(result)
                self._reader.taken += 1
                assert batch.done + batch.failed >= len(self.results)
                assert batch.in_flight <= self._most(batch, config)
                if self._way == "slowly":
                    await anyio.sleep(self._number / 4)
                elif len(self.results) == self._number:
                    if self._way == "leave":
                        return
                    if self._way == "raise":
                        raise self.error
                    if self._way == "stop":
                        batch.stop()
            self.complete = self._way in ("all", "slowly") or len(self.results) < self._number

    def _most(self, batch: Batch, config: BatchConfig) -> int:
        if isinstance(config.in_flight, Adaptive):
            return config.in_flight.maximum * len(config.urls)
        return config.in_flight


AsyncGeneratorType: Final = type(Reader("slow", 0)._generate_asynchronously())


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(REPEATABLE, max_examples=150)
@given(
    plan=st.lists(st.lists(_behaviours, min_size=1, max_size=3), max_size=20),
    statuses=st.lists(_statuses, min_size=1, max_size=3),
    options=_options,
    source=_sources,
    way=_consumers,
    number=st.integers(0, 12),
)
def test_every_prompt_has_one_result_and_is_asked_no_more_than_is_allowed(
    backend: str,
    plan: list[list[Behaviour]],
    statuses: list[OM.Status],
    options: dict[str, object],
    source: str,
    way: str,
    number: int,
) -> None:
    play = Play(plan, statuses)
    reader = Reader(source, len(plan))
    consumer = Consumer(way, number, reader, backend)

    async def main() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            async with memory_agents(monkeypatch, **play.agents) as urls:
                config = BatchConfig(urls, **options)  # type: ignore[arg-type]  # drawn for each
                await consumer.run(config)
                await settle()
                check_left(play)
        check_results(consumer.results, config, play)
        check_pace(consumer.results, config, play)
        check_outcome(consumer, config, reader, len(plan), play)
        if source != "list":
            allowed = config.window + 1 + (READ_AHEAD if reader.asynchronous else 0)
            assert reader.most_ahead <= allowed

    run(backend, main)


def check_left(play: Play) -> None:
    """Nothing goes on in the agents, and they were told what to stop."""
    for agent in play.agents.values():
        assert agent.in_flight == 0
        for peer in agent.all_peers:
            assert peer._client_receives.statistics().open_receive_streams == 0
    for asked in play.asked:
        agent = play.agents[asked.label[0]]
        if "cancel" in agent.status.features and not asked.finished and asked.peer not in play.disturbed:
            assert asked.told_to_stop


def check_results(results: list[Result], config: BatchConfig, play: Play) -> None:
    indices = [result.index for result in results]
    assert len(indices) == len(set(indices))
    if config.ordered:
        assert indices == sorted(indices)
    for result in results:
        prompt, timings = f"prompt {result.index}", result.timings
        last = result.attempts[-1]
        assert result.error == last.error
        assert (result.text is None) == (result.tokens_used is None) == (result.error is not None)
        assert result.text in (None, prompt)
        assert (timings.sent, timings.first_event, timings.end) == (last.sent, last.first_event, last.end)
        check_attempts(result, config)
        check_seen(result, [asked for asked in play.asked if asked.prompt == prompt])


def check_attempts(result: Result, config: BatchConfig) -> None:
    """Count anew what the rules allow."""
    retry, counted, before = config.retries, 0, result.timings.queued
    for attempt in result.attempts:
        moments = [attempt.sent, attempt.first_event, attempt.end]
        known = [before, *(moment for moment in moments if moment is not None)]
        assert known == sorted(known)
        before = attempt.end
        assert prompt_of(result).startswith(attempt.partial)
        unseen = attempt.sent is None and (attempt.error is None or attempt.error.type != "TimeoutError")
        counted += not unseen
        if attempt is not result.attempts[-1]:
            assert unseen or may_retry(attempt, retry)
        elif attempt.error is not None and (unseen or may_retry(attempt, retry)):
            assert counted == retry.attempts
    assert counted <= retry.attempts


def prompt_of(result: Result) -> str:
    return f"prompt {result.index}"


def may_retry(attempt: Attempt, retry: Retry) -> bool:
    error = attempt.error
    assert error is not None
    if error.type == "AgentError":
        return error.code in retry.codes
    return retry.safety == "idempotent" and error.type in ("Disconnected", "ProtocolError", "TimeoutError")


def check_seen(result: Result, asked: list[Asked]) -> None:
    """Each time that an agent saw it is an attempt of its own, there and then."""
    assert [each.time for each in asked] == sorted(each.time for each in asked)
    sent = iter([attempt for attempt in result.attempts if attempt.sent is not None])
    for each, following in itertools.zip_longest(asked, asked[1:]):
        attempt = next(attempt for attempt in sent if attempt.agent == each.label)
        assert attempt.sent is not None
        if following is not None:
            rest = following.time - each.time
            assert attempt.end - attempt.sent <= rest + CLOCK, "one was over before the next"


def check_pace(results: list[Result], config: BatchConfig, play: Play) -> None:
    attempts = [attempt for result in results for attempt in result.attempts if attempt.sent is not None]
    if isinstance(config.in_flight, Adaptive):
        for name in play.agents:
            mine = [attempt for attempt in attempts if attempt.agent == f"{name}:80/"]
            assert most_at_once(mine) <= config.in_flight.maximum
    else:
        assert most_at_once(attempts) <= config.in_flight
    behaviours = {behaviour for behaviours in play._plan for behaviour, _ in behaviours}
    for name, agent in play.agents.items():
        lanes = 1 if agent.status is SINGLE else agent.status.max_in_flight
        if lanes is not None and "part" not in behaviours:
            mine = [attempt for attempt in attempts if attempt.agent == f"{name}:80/"]
            assert most_at_once(mine) <= lanes * config.connections
    per_minute = config.rates.requests_per_minute
    if per_minute is not None and attempts:
        moments = sorted(attempt.sent or 0 for attempt in attempts)
        assert (
            len(attempts)
            <= 1 + max(1, per_minute / 60) + (moments[-1] - moments[0] + CLOCK) * per_minute / 60
        )


def most_at_once(attempts: list[Attempt]) -> int:
    changes = [(attempt.sent or 0, 1) for attempt in attempts if (attempt.sent or 0) < attempt.end]
    changes += [(attempt.end, -1) for attempt in attempts if (attempt.sent or 0) < attempt.end]
    return max(itertools.accumulate(change for _, change in sorted(changes)), default=0)


def check_outcome(consumer: Consumer, config: BatchConfig, reader: Reader, count: int, play: Play) -> None:
    """What came out is what happened, as itself."""
    failed = sum(result.error is not None for result in consumer.results)
    match consumer.outcome:
        case None if consumer.complete and not consumer.cancelled:
            assert not reader.fails
            assert sorted(result.index for result in consumer.results) == list(range(count))
        case None:
            pass
        case TooManyErrors() as exc:
            assert config.max_errors is not None
            assert exc.failed == config.max_errors + 1
            assert exc.failed <= failed
        case ConnectError():
            assert config.reconnect.attempts is not None
            assert play.disturbed or any(agent.connections > 1 for agent in play.agents.values())
        case OfTheSource():
            assert reader.fails
            assert consumer.outcome is reader.error
            if consumer._way != "stop":
                assert sorted(result.index for result in consumer.results) == list(range(count))
        case exc:
            assert exc is consumer.error
    assert len(consumer.results) <= count
