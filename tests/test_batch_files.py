"""From file to file: `FileRun`, and what it says of itself."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from anyagent import IM
from anyagent.batch import BatchConfig, FileJob, FileRun, Fsync, InputError, OutputError, Progress
from anyagent.batch._files import journal
from anyagent.batch._files.job import Plan, plan
from anyagent.batch._files.parquet import rows_as_jsonl
from anyagent.testing import embedded_agent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from anyagent.testing import AgentReply, EmbeddedAgent

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]


async def moody(message: IM.UserMessage, reply: AgentReply) -> None:
    """Answers with the prompt; fails those with an x, the first time; never ends an endless one."""
    if message.text == "endless":
        await reply.hang()
    if message.text.startswith("x") and message.text not in REFUSED:
        REFUSED.append(message.text)
        await reply.error("refused", "no x")
    else:
        await reply.text(message.text.upper())


REFUSED: list[str] = []


@pytest.fixture
def agent() -> Iterator[EmbeddedAgent]:
    with embedded_agent(moody) as agent:
        yield agent


def job_of(agent: EmbeddedAgent, directory: Path, output: str = "answers.jsonl", **options: Any) -> FileJob:
    return FileJob(
        input=directory / "prompts.jsonl",
        output=directory / output,
        config=BatchConfig(agent.url, agent="agent"),
        **options,
    )


def write(directory: Path, *texts: str) -> None:
    lines = [json.dumps({"text": text, "place": place}) + "\n" for place, text in enumerate(texts)]
    (directory / "prompts.jsonl").write_text("".join(lines))


def rows(path: Path) -> list[tuple[object, ...]]:
    """Index, place and text of each row, sorted."""
    lines = rows_as_jsonl(path) if path.suffix == ".parquet" else path.read_bytes().splitlines()
    found = [json.loads(line) for line in lines]
    return sorted((row["index"], row["place"], row["text"]) for row in found)


def asked(agent: EmbeddedAgent) -> list[str]:
    texts = [message.text for message in agent.received if isinstance(message, IM.UserMessage)]
    agent.received.clear()
    return sorted(texts)


async def test_a_run_says_how_it_stands_before_while_and_after(agent: EmbeddedAgent, tmp_path: Path) -> None:
    write(tmp_path, "a", "b", "a", "a", "a")
    run = FileRun(job_of(agent, tmp_path))
    before = run.progress()
    assert before == Progress(elapsed=before.elapsed)
    assert run.summary().done == 0
    assert sum(interval.done for interval in run.course()[0]) == 0
    summary = await run.run()
    after = run.progress()
    assert (after.done, after.failed, after.skipped, after.in_flight) == (5, 0, 0, 0)
    assert after.total in (5, None), "nobody waits for the rows to be counted"
    assert (summary.done, summary.tokens) == (5, 5)
    assert sum(interval.done for interval in run.course()[0]) == 5
    expected = [(place, place, text) for place, text in enumerate("ABAAA")]
    assert rows(tmp_path / "answers.jsonl") == expected
    assert asked(agent) == ["a", "a", "a", "a", "b"]
    again = FileRun(job_of(agent, tmp_path))
    assert (await again.run()).skipped == 5
    assert asked(agent) == []
    assert plan(job_of(agent, tmp_path)) == Plan(rows=5, to_ask=0, failed=0, repeated=3)


async def test_a_run_that_was_stopped_before_it_begins_asks_nothing(
    agent: EmbeddedAgent, tmp_path: Path
) -> None:
    write(tmp_path, "a", "b")
    run = FileRun(job_of(agent, tmp_path))
    run.stop(grace=1)
    assert (await run.run()).done == 0
    assert run.stopped
    assert asked(agent) == []


async def test_what_is_in_flight_after_the_grace_is_cancelled_and_asked_by_the_next_run(
    agent: EmbeddedAgent, tmp_path: Path
) -> None:
    write(tmp_path, "a", "endless", "b")
    run = FileRun(job_of(agent, tmp_path))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.run)
        await anyio.to_thread.run_sync(
            agent.wait_for, lambda message: isinstance(message, IM.UserMessage) and message.text == "endless"
        )
        assert run.summary().failed == run.progress().failed == 0
        run.stop(grace=100)
        run.stop(grace=0.05)
    await anyio.to_thread.run_sync(agent.wait_for, lambda message: isinstance(message, IM.Cancel))
    assert (1, 1, "ENDLESS") not in rows(tmp_path / "answers.jsonl")
    assert plan(job_of(agent, tmp_path)).to_ask == 3 - len(rows(tmp_path / "answers.jsonl"))


@pytest.mark.parametrize("fsync", [Fsync(rows=1, seconds=None), Fsync(seconds=0.001), Fsync(seconds=None)])
async def test_answers_are_synced_as_often_as_asked_for(
    fsync: Fsync, agent: EmbeddedAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write(tmp_path, *map(str, range(100)))
    await FileRun(job_of(agent, tmp_path, fsync=fsync)).run()
    assert len(rows(tmp_path / "answers.jsonl")) == 100
    opening = 1  # of the directory
    assert (len(synced) > opening) == (fsync.rows is not None or fsync.seconds is not None)


async def test_answers_as_parquet_are_gone_on_with_like_any_others(
    agent: EmbeddedAgent, tmp_path: Path
) -> None:
    REFUSED.clear()
    answers = tmp_path / "answers.parquet"
    write(tmp_path, "a", "x1", "a")
    job = job_of(agent, tmp_path, answers.name)
    assert plan(job) == Plan(rows=3, to_ask=3, failed=0, repeated=1)
    assert (await FileRun(job).run()).failed == 1
    assert rows(answers) == [(0, 0, "A"), (1, 1, None), (2, 2, "A")]
    assert not journal.path_for(answers).exists()
    assert asked(agent) == ["a", "a", "x1"]

    write(tmp_path, "a", "x1", "a", "b")
    assert plan(job) == Plan(rows=4, to_ask=1, failed=1, repeated=1)
    await FileRun(job).run()
    assert asked(agent) == ["b"]
    assert rows(answers) == [(0, 0, "A"), (1, 1, None), (2, 2, "A"), (3, 3, "B")]

    again = job_of(agent, tmp_path, answers.name, retry_failed=True)
    assert plan(again) == Plan(rows=4, to_ask=1, failed=1, repeated=1)
    await FileRun(again).run()
    assert asked(agent) == ["x1"]
    assert rows(answers) == [(0, 0, "A"), (1, 1, "X1"), (2, 2, "A"), (3, 3, "B")]

    anew = job_of(agent, tmp_path, answers.name, overwrite=True)
    assert plan(anew) == Plan(rows=4, to_ask=4, failed=0, repeated=1)
    await FileRun(anew).run()
    assert asked(agent) == ["a", "a", "b", "x1"]


async def test_a_journal_that_is_there_is_gone_on_with_and_not_begun_anew(
    agent: EmbeddedAgent, tmp_path: Path
) -> None:
    answers = tmp_path / "answers.parquet"
    write(tmp_path, "a", "b")
    job = job_of(agent, tmp_path, answers.name)
    await FileRun(job).run()
    write(tmp_path, "a", "b", "endless")
    run = FileRun(job)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.run)
        await anyio.to_thread.run_sync(
            agent.wait_for, lambda message: isinstance(message, IM.UserMessage) and message.text == "endless"
        )
        run.stop(grace=0)
    assert journal.path_for(answers).exists(), "the answers are not all there"
    assert plan(job) == Plan(rows=3, to_ask=1, failed=0, repeated=0)
    write(tmp_path, "a", "b", "c")
    await FileRun(job).run()
    assert rows(answers) == [(0, 0, "A"), (1, 1, "B"), (2, 2, "C")]
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


async def test_two_runs_that_begin_a_journal_at_once_have_one(agent: EmbeddedAgent, tmp_path: Path) -> None:
    answers = tmp_path / "answers.parquet"
    write(tmp_path, "a")
    await FileRun(job_of(agent, tmp_path, answers.name)).run()

    link = os.link
    with pytest.MonkeyPatch.context() as patch:

        def too_late(source: Any, target: Any) -> None:
            journal.path_for(answers).write_bytes(b"")
            link(source, target)

        patch.setattr(os, "link", too_late)
        journal.begin(answers)
    assert journal.path_for(answers).read_bytes() == b""


async def test_what_is_no_parquet_of_answers_is_told_and_left_alone(
    agent: EmbeddedAgent, tmp_path: Path
) -> None:
    answers = tmp_path / "answers.parquet"
    answers.write_bytes(b"something else")
    write(tmp_path, "a")
    job = job_of(agent, tmp_path, answers.name)
    with pytest.raises(OutputError, match=r"answers\.parquet: "):
        await FileRun(job).run()
    with pytest.raises(OutputError, match=r"answers\.parquet: "):
        plan(job)
    assert answers.read_bytes() == b"something else"
    assert asked(agent) == []


async def test_a_parquet_that_cannot_be_written_is_told_and_the_answers_stay(
    agent: EmbeddedAgent, tmp_path: Path
) -> None:
    write(tmp_path, "a")
    (tmp_path / "answers.parquet").mkdir()
    with pytest.raises(OutputError, match="directory"):
        await FileRun(job_of(agent, tmp_path, "answers.parquet", overwrite=True)).run()
    assert rows(tmp_path / "answers.parquet.jsonl") == [(0, 0, "A")]


async def test_from_a_pipe_to_a_pipe(agent: EmbeddedAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a", "place": 0}\n')))
    reader, writer = os.pipe()
    saved = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)
    try:
        run = FileRun(FileJob(input=None, output=None, config=BatchConfig(agent.url)))
        await run.run()
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    line = os.read(reader, 10_000)
    os.close(reader)
    assert json.loads(line)["text"] == "A"
    assert run.progress().total is None
    assert run.progress().eta is None


async def test_files_that_cannot_be_meant_are_told_before_anything_is_touched(
    agent: EmbeddedAgent, tmp_path: Path
) -> None:
    write(tmp_path, "a")
    for job, error in (
        (job_of(agent, tmp_path, "prompts.jsonl", overwrite=True), OutputError),
        (FileJob(input=tmp_path / "prompts.doc", output=None, config=BatchConfig(agent.url)), InputError),
        (FileJob(input=tmp_path / "none.txt", output=None, config=BatchConfig(agent.url)), InputError),
    ):
        with pytest.raises(error):
            await FileRun(job).run()
        with pytest.raises(error):
            plan(job)
    assert (tmp_path / "prompts.jsonl").stat().st_size > 0


@pytest.mark.parametrize("ordered", [False, True])
async def test_what_is_answered_when_the_grace_ends_is_written_also_if_it_waits_for_its_turn(
    ordered: bool, agent: EmbeddedAgent, tmp_path: Path
) -> None:
    write(tmp_path, "endless", "a", "b", "c")
    config = BatchConfig(agent.url, ordered=ordered)
    job = FileJob(input=tmp_path / "prompts.jsonl", output=tmp_path / "answers.jsonl", config=config)
    run = FileRun(job)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.run)
        while run.summary().done < 3:  # noqa: ASYNC110 - in a moment
            await anyio.sleep(0.005)
        run.stop(grace=0)
    assert rows(tmp_path / "answers.jsonl") == [(1, 1, "A"), (2, 2, "B"), (3, 3, "C")]


async def test_what_was_written_is_synced_also_where_the_run_fails(
    agent: EmbeddedAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a", "b")
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write("no prompt\n")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with pytest.raises(InputError, match="line 3"):
        await FileRun(job_of(agent, tmp_path, fsync=Fsync(rows=1_000, seconds=None))).run()
    opening = 1  # of the directory
    assert len(synced) == opening + 1


async def test_a_journal_is_not_overwritten_if_it_is_the_input(agent: EmbeddedAgent, tmp_path: Path) -> None:
    (tmp_path / "answers.parquet.jsonl").write_text('{"text": "a"}\n')
    job = FileJob(
        input=tmp_path / "answers.parquet.jsonl",
        output=tmp_path / "answers.parquet",
        config=BatchConfig(agent.url),
        overwrite=True,
    )
    with pytest.raises(OutputError, match="it is the input"):
        await FileRun(job).run()
    assert (tmp_path / "answers.parquet.jsonl").stat().st_size > 0
