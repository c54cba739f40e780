"""A batch over three agents, each a process: one is killed and comes back, and only the pace tells of it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread
import pytest

from anyagent import Backoff
from anyagent.batch import BatchConfig
from anyagent.batch._files.run import FileJob, FileRun

from .batch_programs import PER_SECOND, WORKERS
from .batches import program, rows_in, write_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from anyagent.batch._config import Safety
    from anyagent.batch._metrics.series import Interval

    from .batches import Program

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]

AGENTS: Final = 3
PROMPTS: Final = 2_400
KILLED_AFTER: Final = 700
BACK_AFTER: Final = 1_300
RETRY: Final[dict[str, Safety]] = {"asyncio": "idempotent", "trio": "safe"}
"""What is tried again, on which backend: to see both, each once is enough."""

IN_FLIGHT: Final = 3 * AGENTS * WORKERS
SETTLED: Final = 0.75
"""Seconds, from when an agent dies or comes back until the pace is what it then stays."""


def pace(course: Sequence[Interval], begin: float, end: float) -> float:
    """Answers per second in that part of a run, in seconds since its start."""
    part = [interval for interval in course if begin <= interval.begin and interval.end <= end]
    assert len(part) >= 4, "the part is too short to say anything"
    return sum(interval.done for interval in part) / (part[-1].end - part[0].begin)


@pytest.mark.parametrize("anyio_backend", RETRY, indirect=True)
async def test_when_one_agent_of_three_is_killed_and_returns_the_pace_falls_and_recovers_and_no_row_is_lost(
    anyio_backend_name: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    retry = RETRY[anyio_backend_name]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    write_prompts(source, ({"id": str(number), "text": f"prompt {number}"} for number in range(PROMPTS)))
    with ExitStack() as stack:

        def start(port: int) -> tuple[Program, str]:
            started = stack.enter_context(program("serve", str(port)))
            return started, started.word()

        agents = [await anyio.to_thread.run_sync(start, 0) for _ in range(AGENTS)]
        urls = [url for _, url in agents]
        config = BatchConfig(
            urls,
            in_flight=IN_FLIGHT,
            retry=retry,
            reconnect=Backoff(initial=0.1, maximum=0.2, attempts=1_000),
        )
        run = FileRun(FileJob(input=source, output=output, config=config))

        async def until(answered: int) -> float:
            while (progress := run.progress()).done < answered:  # noqa: ASYNC110 - nothing tells of progress
                await anyio.sleep(0.005)
            return progress.elapsed

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.run)
            killed_at = await until(KILLED_AFTER)
            agents[0][0].process.kill()
            back_at = await until(BACK_AFTER)
            port = urls[0].rpartition(":")[2]
            await anyio.to_thread.run_sync(start, int(port))
        ended_at = run.progress().elapsed

        course, _ = run.course()
        summary = run.summary()
        rows = rows_in(output)
        assert sorted(int(row["id"]) for row in rows) == list(range(PROMPTS))
        label = urls[0].removeprefix("ws://") + "/"
        lost = [attempt for row in rows for attempt in row["attempts"] if "error" in attempt]
        assert {(attempt["agent"], attempt["error"]["type"]) for attempt in lost} == {(label, "Disconnected")}
        assert 0 < len(lost) <= IN_FLIGHT
        if retry == "idempotent":
            assert (summary.done, summary.failed, summary.retried) == (PROMPTS, 0, len(lost))
        else:
            assert (summary.done, summary.failed, summary.retried) == (PROMPTS - len(lost), len(lost), 0)
            again = FileRun(FileJob(input=source, output=output, config=config, retry_failed=True))
            summary = await again.run()
            assert (summary.done, summary.skipped) == (len(lost), PROMPTS - len(lost))
            assert sorted(int(row["id"]) for row in rows_in(output)) == list(range(PROMPTS))
    before = pace(course, SETTLED, killed_at)
    without = pace(course, killed_at + SETTLED, back_at)
    after = pace(course, back_at + 2 * SETTLED, ended_at - SETTLED)
    figure(
        f"{before:.0f}, {without:.0f} and {after:.0f} answers per second with 3, 2 and 3 agents that answer "
        f"{PER_SECOND} each; {len(lost)} attempts lost, {PROMPTS:,} rows"
    )
    assert without < 0.85 * before
    assert after > 0.85 * before
