"""What may be wrong with the files of a batch run: it is said, nothing is lost, and the next run goes on."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest

from anyagent import IM
from anyagent.batch import BatchConfig
from anyagent.batch._files.inputs import InputError
from anyagent.batch._files.output import OutputError
from anyagent.batch._files.run import FileJob, FileRun
from anyagent.testing import embedded_agent

from ..test_batch_output import skip_without_mounts
from .batches import program, rows_in, rows_in_parquet, write_prompts
from .processes import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anyagent.testing import AgentReply, EmbeddedAgent

PROMPTS = 200


async def answer_at_length(message: IM.UserMessage, reply: AgentReply) -> None:
    await reply.text(f"answer to {message.text} ".ljust(1_000, "."))


@pytest.fixture
def agent() -> Iterator[EmbeddedAgent]:
    with embedded_agent(answer_at_length) as agent:
        yield agent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, prompts())
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def prompts() -> list[dict[str, object]]:
    return [{"id": str(number), "text": f"prompt {number}"} for number in range(PROMPTS)]


def asked(agent: EmbeddedAgent) -> list[str]:
    """The prompts that the agent has seen since this was last called."""
    texts = [message.text for message in agent.received if isinstance(message, IM.UserMessage)]
    agent.received.clear()
    return texts


def assert_complete(output: Path) -> None:
    rows = rows_in(output)
    assert sorted(int(row["id"]) for row in rows) == list(range(PROMPTS))
    assert {row["error"] for row in rows} == {None}


def order(agent: EmbeddedAgent, source: Path, output: Path, **options: object) -> dict[str, Any]:
    return {"url": agent.url, "input": str(source), "output": str(output), "options": options}


def run(agent: EmbeddedAgent, source: Path, output: Path, **options: Any) -> None:
    job = FileJob(input=source, output=output, config=BatchConfig(agent.url), **options)

    async def run() -> None:
        await FileRun(job).run()

    anyio.run(run)


# The output


def test_a_full_disk_is_told_and_once_there_is_room_the_next_run_goes_on(
    agent: EmbeddedAgent, source: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    unshare = skip_without_mounts()
    disk = tmp_path / "disk"
    disk.mkdir()
    output, other = disk / "answers.jsonl", disk / "other"
    fill = 'mount -t tmpfs -o size=400k none "$0" && head -c 300000 /dev/zero > "$0/other" && exec "$@"'
    with program("run_all", before=[*unshare, "sh", "-c", fill, str(disk)]) as runs:
        seen_there = Path(f"/proc/{runs.process.pid}/root")
        full = runs.ask(order(agent, source, output))
        assert full["error"] == f"OutputError: {output}: no space left on device"
        rows = rows_in(Path(f"{seen_there}{output}"))
        assert 50 <= len(rows) < PROMPTS
        again = runs.ask(order(agent, source, output))
        assert again["error"] == full["error"]
        assert rows_in(Path(f"{seen_there}{output}"))[: len(rows)] == rows
        Path(f"{seen_there}{other}").unlink()
        asked(agent)
        whole = runs.ask(order(agent, source, output))
        assert (whole["error"], whole["skipped"] + whole["done"]) == (None, PROMPTS)
        assert whole["skipped"] >= len(rows)
        assert len(asked(agent)) == whole["done"]
        assert_complete(Path(f"{seen_there}{output}"))
        assert rows_in(Path(f"{seen_there}{output}"))[: len(rows)] == rows
    figure(f"{len(rows)} rows before the disk was full, {whole['done']} after")


@pytest.mark.parametrize(
    ("file_mode", "directory_mode"), [(0o444, 0o777), (None, 0o555)], ids=["the file", "its directory"]
)
def test_an_output_that_must_not_be_written_is_told_before_anything_is_asked(
    agent: EmbeddedAgent, file_mode: int | None, directory_mode: int
) -> None:
    with tempfile.TemporaryDirectory() as name:  # a directory that everyone can enter, unlike pytest's
        Path(name).chmod(0o755)
        source = Path(name, "prompts.jsonl")
        write_prompts(source, prompts())
        directory = Path(name, "answers")
        directory.mkdir()
        output = directory / "answers.jsonl"
        with program("as_nobody") as runs:
            assert runs.ask(order(agent, source, Path(name, "first.jsonl")))["error"] is None
            asked(agent)
            if file_mode is not None:
                output.touch()
                output.chmod(file_mode)
            directory.chmod(directory_mode)
            outcome = runs.ask(order(agent, source, output))
            assert outcome["error"] == f"OutputError: {output}: permission denied"
            assert not asked(agent)
            directory.chmod(0o777)
            if file_mode is not None:
                output.chmod(0o666)
            assert runs.ask(order(agent, source, output))["error"] is None
        assert_complete(output)


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.parquet"])
def test_a_second_run_on_one_output_is_refused_and_does_not_disturb_the_first(
    name: str, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / name
    goes_on = threading.Event()

    async def answer_later(message: IM.UserMessage, reply: AgentReply) -> None:
        await anyio.to_thread.run_sync(goes_on.wait, DEADLINE)
        await reply.text(message.text)

    with embedded_agent(answer_later) as agent, program("run_all") as first, program("run_all") as second:
        try:
            first.send(order(agent, source, output))
            agent.wait_for(lambda message: True, DEADLINE)
            for options in ({}, {"retry_failed": True}, {"overwrite": True}):
                refused = second.ask(order(agent, source, output, **options))
                said = f"OutputError: {locked(output)}: another run is writing to it"
                assert (refused["error"], refused["attempts"]) == (said, 0)
        finally:
            goes_on.set()
        assert (first.line()["done"], len(asked(agent))) == (PROMPTS, PROMPTS)
        rest = second.ask(order(agent, source, output))
        assert (rest["error"], rest["skipped"]) == (None, PROMPTS)
    rows = rows_in_parquet(output) if name.endswith("parquet") else rows_in(output)
    assert sorted(int(row["id"]) for row in rows) == list(range(PROMPTS))


def locked(output: Path) -> Path:
    return output.with_name(f"{output.name}.jsonl") if output.suffix == ".parquet" else output


# The input


def test_an_input_that_ends_within_a_line_is_told_once_all_before_is_answered_and_goes_on_when_whole(
    agent: EmbeddedAgent, source: Path, output: Path
) -> None:
    content = source.read_bytes()
    lines = content.splitlines(keepends=True)
    source.write_bytes(b"".join(lines[:150]) + lines[150][:20])
    with pytest.raises(InputError) as caught:
        run(agent, source, output)
    assert str(caught.value) == f"{source}, line 151: the last line is not complete"
    assert sorted(int(row["id"]) for row in rows_in(output)) == list(range(150))
    assert len(asked(agent)) == 150
    source.write_bytes(content)
    run(agent, source, output)
    assert sorted(asked(agent)) == sorted(f"prompt {number}" for number in range(150, PROMPTS))
    assert_complete(output)


@pytest.mark.parametrize("column", ["id_column", "text_column"])
def test_an_unknown_column_is_told_with_those_there_are_and_what_was_answered_stays(
    column: str, agent: EmbeddedAgent, source: Path, output: Path
) -> None:
    content = source.read_bytes()
    source.write_bytes(b"".join(content.splitlines(keepends=True)[:50]))
    run(agent, source, output)
    source.write_bytes(content)
    before = output.read_bytes()
    asked(agent)
    with pytest.raises(InputError) as caught:
        run(agent, source, output, **{column: "question"})
    assert str(caught.value) == f"{source}, line 1: unknown column 'question'; there are: id, text"
    assert output.read_bytes() == before
    assert not asked(agent)
    run(agent, source, output)
    assert len(asked(agent)) == PROMPTS - 50
    assert_complete(output)


def test_files_that_cannot_be_meant_are_told_and_left_alone(
    agent: EmbeddedAgent, source: Path, output: Path, tmp_path: Path
) -> None:
    content = source.read_bytes()
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(content)
    missing = tmp_path / "no" / "answers.jsonl"
    wrong = [
        (source, source, f"{source}: it is the input"),
        (source, copy, f"{copy}, line 1: not a row of answers; choose another file, or --overwrite"),
        (source, missing, f"{missing}: its directory does not exist"),
        (source, tmp_path, f"{tmp_path}: is a directory"),
        (tmp_path / "no.jsonl", output, f"{tmp_path}/no.jsonl: no such file or directory"),
        (tmp_path / "a.xyz", output, f"{tmp_path}/a.xyz: no format is known for its name; known are"),
    ]
    for read, written, said in wrong:
        with pytest.raises((InputError, OutputError)) as caught:
            run(agent, read, written)
        assert str(caught.value).startswith(said)
    assert not asked(agent)
    assert (source.read_bytes(), copy.read_bytes()) == (content, content)
    run(agent, source, output)
    assert_complete(output)
