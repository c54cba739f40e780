"""An agent that takes so many requests and no more: how many are in flight settles there by itself."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
from typing import TYPE_CHECKING, Final

import anyio
import pytest

from anyagent.batch import BatchConfig, open_batch
from anyagent.batch._files.run import FileJob, FileRun
from anyagent.testing import embedded_agent

from ..batch_agents import Answer, MemoryAgent, echo, memory_agents
from .batches import rows_in, write_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from anyagent import IM
    from anyagent.batch import Summary
    from anyagent.batch._metrics.series import Interval
    from anyagent.testing import AgentReply

pytestmark = pytest.mark.anyio

ROUNDS: Final = 60
"""How many prompts there are, as a multiple of what the agent takes at once."""


@dataclasses.dataclass
class Outcome:
    """What came of one batch: its pace, and its limit once that had settled."""

    per_second: float
    limit: float
    median: float
    lowest: int
    highest: int
    busy: float
    failed: int

    @classmethod
    def of(cls, course: Sequence[Interval], summary: Summary) -> Outcome:
        elapsed = summary.elapsed
        part = [each for each in course if 0.3 * elapsed <= each.begin and each.end <= 0.9 * elapsed]
        return cls(
            per_second=summary.requests_per_second,
            limit=sum(each.limit_sum for each in part) / sum(each.observed for each in part),
            median=statistics.median(each.limit_sum / each.observed for each in part),
            lowest=min(each.limit_min for each in part),
            highest=max(each.limit_max for each in part),
            busy=summary.attempt_errors.get("AgentError: busy", 0) / summary.attempts,
            failed=summary.failed,
        )

    @property
    def limits(self) -> str:
        return f"a limit of {self.limit:.1f} ({self.lowest} to {self.highest})"

    def __str__(self) -> str:
        return f"{self.per_second:.1f} a second ({self.busy:.1%} busy, {self.failed} failed)"


async def run(monkeypatch: pytest.MonkeyPatch, takes: int, config: Callable[..., BatchConfig]) -> Outcome:
    """A batch to an agent in memory that `takes` so many prompts at once."""
    draw = random.Random(takes)
    random.seed(takes)  # of the waits before a prompt is tried again

    async def answer(prompt: str, reply: Answer) -> None:
        if agent.in_flight > takes:
            await anyio.sleep(0.02)
            reply.error("busy", "too much is asked", retry_after=1)
        else:
            await anyio.sleep(0.5 * math.exp(draw.gauss(0, 0.3)))
            await echo(prompt, reply)

    agent = MemoryAgent(answer)
    prompts = ROUNDS * takes
    async with (
        memory_agents(monkeypatch, agent=agent) as urls,
        open_batch(map(str, range(prompts)), config(urls)) as batch,
    ):
        results = [result async for result in batch]
        course = batch._engine.metrics.series(anyio.current_time())
        outcome = Outcome.of(course, batch.summary())
    assert sorted(result.index for result in results) == list(range(prompts))
    return outcome


@pytest.mark.parametrize("takes", [12, 40])
async def test_the_limit_settles_near_what_the_agent_takes_and_gives_the_pace_of_the_best_fixed_one(
    takes: int, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    fixed = {
        limit: await run(monkeypatch, takes, functools.partial(BatchConfig, in_flight=limit))
        for limit in (takes * 3 // 4, takes, takes * 5 // 4)
    }
    best = max(outcome.per_second for outcome in fixed.values())
    found = await run(monkeypatch, takes, BatchConfig)
    said = (f"{outcome} with a limit of {limit}" for limit, outcome in fixed.items())
    figure(f"an agent that takes {takes}: {found} with {found.limits}; {', '.join(said)}")
    assert abs(found.limit - takes) <= 0.2 * takes
    assert found.per_second >= 0.8 * best
    assert found.failed == 0


@pytest.mark.sockets
@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_over_a_socket_the_limit_settles_near_what_the_agent_takes(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    takes = 12
    in_flight = 0

    async def answer(message: IM.UserMessage, reply: AgentReply) -> None:
        nonlocal in_flight
        if in_flight == takes:
            await reply.error("busy", "too much is asked", retry_after=0.05)
            return
        in_flight += 1
        try:
            await anyio.sleep(random.uniform(0.03, 0.07))
            await reply.text(message.text)
        finally:
            in_flight -= 1

    source = tmp_path / "prompts.jsonl"
    write_prompts(source, ({"id": str(number), "text": f"prompt {number}"} for number in range(800)))

    async def over_a_socket(name: str, config: BatchConfig) -> Outcome:
        output = tmp_path / f"{name}.jsonl"
        run = FileRun(FileJob(input=source, output=output, config=config))
        summary = await run.run()
        rows = rows_in(output)
        assert sorted(int(row["id"]) for row in rows) == list(range(800))
        return Outcome.of(run.course()[0], summary)

    with embedded_agent(answer) as agent:
        fixed = await over_a_socket("fixed", BatchConfig(agent.url, in_flight=takes))
        found = await over_a_socket("adaptive", BatchConfig(agent.url))
    figure(f"an agent that takes {takes}: {found} with {found.limits}; {fixed} with a limit of {takes}")
    # not the pace, nor the mean: a machine that is busy otherwise is slow to answer, which cuts the limit
    assert abs(found.median - takes) <= 0.2 * takes
    assert found.failed == 0
