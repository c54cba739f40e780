"""``anyagent batch``, run in this process as far as possible."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import pytest

from anyagent import im
from anyagent.batch._files.output import OutputError
from anyagent.batch._files.run import FileRun
from anyagent.cli import main
from anyagent.cli._signals import Signals
from anyagent.errors import ConnectError
from anyagent.testing import AgentReply, EmbeddedAgent, echo, embedded_agent

from .cli_runner import (
    BACKENDS,
    DEADLINE,
    Gate,
    Outcome,
    Terminal,
    exit_code,
    run,
    run_with,
    send_signal,
    someone,
    started,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyagent.testing import Handler

NO_AGENT = "anyagent: no --url is given, so the embedded agent answers, which echoes"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(name="agent")
def echo_that_can_fail() -> Iterator[EmbeddedAgent]:
    """An agent that answers with an error if that is what it is asked for, and else echoes."""
    with embedded_agent(echo_or_fail) as agent:
        yield agent


async def echo_or_fail(message: im.UserMessage, reply: AgentReply) -> None:
    if message.text.startswith("fail"):
        await reply.error("refused\x1b[2J", "as asked")
    else:
        await echo(message, reply)


def prompts(*texts: str) -> str:
    """The name of a file of prompts, with numbers for ids."""
    rows = [json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts)]
    Path("prompts.jsonl").write_text("".join(rows))
    return "prompts.jsonl"


def many(count: int) -> str:
    return prompts(*(f"prompt {number}" for number in range(count)))


def rows(name: str = "answers.jsonl") -> list[dict[str, Any]]:
    """The rows of an output, each of them whole."""
    data = Path(name).read_text()
    assert data == "" or data.endswith("\n")
    return [json.loads(line) for line in data.splitlines()]


def answers(name: str = "answers.jsonl") -> dict[str, str | None]:
    """What is answered, by id; each once."""
    answered = {row["id"]: row["text"] for row in rows(name)}
    assert len(answered) == len(rows(name))
    return answered


def asked(agent: EmbeddedAgent) -> list[str]:
    return [message.text for message in agent.received if isinstance(message, im.UserMessage)]


def batch(*arguments: str, output: str | None = "answers.jsonl", **options: Any) -> Outcome:
    to = () if output is None else ("-o", output)
    return run("batch", *arguments, *to, **options)


def unused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"ws://127.0.0.1:{listener.getsockname()[1]}"


# Answers.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wire", ["native", "single"])
def test_every_prompt_gets_a_row(backend: str, wire: Any) -> None:
    with embedded_agent(wire=wire) as agent:
        outcome = batch(prompts("Hello!", "Bye!"), "--url", agent.url, "--backend", backend)
    assert (outcome.code, outcome.out) == (0, "")
    assert answers() == {"0": "Hello!", "1": "Bye!"}
    assert outcome.err.startswith("anyagent: 2 of 2 (100 %), 0 failed, ")
    assert "\n2 prompts in " in outcome.err
    assert outcome.err.endswith("\nanyagent: the answers are in answers.jsonl\n")


def test_the_same_command_again_asks_nothing(agent: EmbeddedAgent) -> None:
    for _ in range(2):
        outcome = batch(many(10), "--url", agent.url)
        assert outcome.code == 0
    assert len(asked(agent)) == len(answers()) == 10
    assert outcome.err.startswith("anyagent: 10 of 10 (100 %), 0 failed, 0 retried, 10 skipped, ")


def test_without_a_url_the_embedded_agent_answers_and_is_the_same_agent_the_next_time() -> None:
    Path("prompts.txt").write_text("Hello!\n")
    first = batch("prompts.txt")
    assert first.err.startswith(NO_AGENT + "\nanyagent: 1 of 1 ")
    second = batch("prompts.txt")
    assert (first.code, second.code) == (0, 0)
    assert "1 skipped" in second.err
    assert [row["text"] for row in rows()] == ["Hello!"]


@pytest.mark.parametrize("by", ["option", "environment"])
def test_several_agents_share_the_work(by: str) -> None:
    gates = Gate(), Gate()

    def after_the_other(number: int) -> Handler:
        async def handler(message: im.UserMessage, reply: AgentReply) -> None:
            gates[number].open()
            await gates[1 - number].passed()
            await echo(message, reply)

        return handler

    with embedded_agent(after_the_other(0)) as one, embedded_agent(after_the_other(1)) as other:
        if by == "option":
            outcome = batch(many(50), "--url", one.url, "--url", other.url)
        else:
            outcome = batch(many(50), env={"ANYAGENT_URL": f"{one.url} {other.url}"})
        assert outcome.code == 0
        assert len(answers()) == len(asked(one)) + len(asked(other)) == 50


def test_connections_and_requests_are_as_many_as_asked_for() -> None:
    gate = Gate()
    most = 0
    now = 0

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 3:
            gate.open()
        await gate.passed()
        await echo(message, reply)
        now -= 1

    with embedded_agent(handler) as agent:
        assert batch(many(20), "--url", agent.url, "--connections", "2", "--in-flight", "3").code == 0
        assert (agent.connections_total, most) == (2, 3)


def test_adaptive_stays_below_its_maximum() -> None:
    outcome = batch(many(50), "--max-in-flight", "2")
    assert outcome.code == 0
    assert "in flight of at most 2," in outcome.err


def test_a_csv_file_with_columns_of_other_names_in_order() -> None:
    Path("prompts.csv").write_text("name,question,tag\n" + "".join(f"n{n},q {n},t\n" for n in range(50)))
    options = ["--id-column", "name", "--text-column", "question", "--ordered", "--agent-name", "x"]
    assert batch("prompts.csv", *options, "--fsync", "always").code == 0
    assert [(row["id"], row["text"], row["tag"]) for row in rows()] == [
        (f"n{n}", f"q {n}", "t") for n in range(50)
    ]


def test_the_format_can_be_given() -> None:
    Path("prompts").write_text("Hello!\n")
    assert batch("prompts", "--format", "text").code == 0
    assert [row["text"] for row in rows()] == ["Hello!"]


def test_the_output_may_be_begun_anew(agent: EmbeddedAgent) -> None:
    for _ in range(2):
        assert batch(many(3), "--url", agent.url, "--overwrite").code == 0
    assert (len(asked(agent)), len(answers())) == (6, 3)


def test_answers_go_to_standard_output_and_the_rest_to_standard_error(agent: EmbeddedAgent) -> None:
    many(3)
    with started("batch", "prompts.jsonl", "--url", agent.url) as process:
        out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert sorted(json.loads(line)["id"] for line in out.splitlines()) == ["0", "1", "2"]
    assert err.startswith(b"anyagent: 3 of 3 (100 %)")
    assert b"answers are in" not in err


@contextlib.contextmanager
def standard_output_to(descriptor: int) -> Iterator[None]:
    """Have this process's standard output be a copy of `descriptor`, which is closed."""
    before = os.dup(1)
    os.dup2(descriptor, 1)
    os.close(descriptor)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def test_from_standard_input_to_standard_output(agent: EmbeddedAgent) -> None:
    with standard_output_to(os.open("answers.jsonl", os.O_WRONLY | os.O_CREAT)):
        outcome = batch("-", "--url", agent.url, output=None, stdin=b'{"id": "a", "text": "Hello!"}\n')
    assert outcome.code == 0
    assert answers() == {"a": "Hello!"}
    assert outcome.err.startswith("anyagent: 1 of 1 (100 %), 0 failed, ")


def test_a_pipe_that_nobody_reads(agent: EmbeddedAgent) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with standard_output_to(writer):
        assert batch(many(3), "--url", agent.url, output=None).code == 141


def test_prompts_come_from_standard_input(agent: EmbeddedAgent) -> None:
    with started("batch", "-", "--url", agent.url, "-o", "answers.jsonl", "--quiet") as process:
        out, err = process.communicate(b'{"id": "a", "text": "Hello!"}\n', DEADLINE)
    assert (process.returncode, out, err) == (0, b"", b"")
    assert answers() == {"a": "Hello!"}


# Failures.


def test_prompts_that_failed_are_rows_and_exit_code_1_and_asked_again_if_wanted(
    agent: EmbeddedAgent,
) -> None:
    prompts("fail", "Hello!")
    outcome = batch("prompts.jsonl", "--url", agent.url)
    assert outcome.code == 1
    assert outcome.err.endswith("anyagent: 1 of the prompts failed; --retry-failed asks for them again\n")
    assert "\x1b" not in outcome.err
    assert answers() == {"0": None, "1": "Hello!"}
    Path("prompts.jsonl").write_text(Path("prompts.jsonl").read_text().replace("fail", "do not fail"))
    assert batch("prompts.jsonl", "--url", agent.url, "--retry-failed").code == 0
    assert answers() == {"0": "do not fail", "1": "Hello!"}
    assert sorted(asked(agent)) == ["Hello!", "do not fail", "fail"]


def test_prompts_that_failed_before_count_until_they_are_answered(agent: EmbeddedAgent) -> None:
    prompts("fail", "Hello!")
    for _ in range(2):
        outcome = batch("prompts.jsonl", "--url", agent.url)
        assert outcome.code == 1
        assert outcome.err.endswith("anyagent: 1 of the prompts failed; --retry-failed asks for them again\n")
    assert len(asked(agent)) == 2


def test_an_error_that_is_named_is_tried_again() -> None:
    codes: list[str | int] = [418, "418", -32000]

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        if codes:
            await reply.error(codes.pop(), "later", retry_after=0.001)
        await echo(message, reply)

    with embedded_agent(handler) as agent:
        outcome = batch(
            prompts("Hello!"), "--url", agent.url, "--retry-code", "418", "--retry-code", "-32000"
        )
    assert outcome.code == 0
    assert len(rows()[0]["attempts"]) == 4


@pytest.mark.parametrize("option", ["--timeout", "--first-event-timeout", "--idle-timeout"])
def test_a_prompt_that_takes_too_long_has_failed(option: str) -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.hang()

    with embedded_agent(handler) as agent:
        assert batch(prompts("Hello!"), "--url", agent.url, option, "0.01").code == 1
    assert rows()[0]["error"]["type"] == "TimeoutError"


def test_too_many_failures_end_the_batch(agent: EmbeddedAgent) -> None:
    outcome = batch(prompts(*["fail"] * 50), "--url", agent.url, "--max-errors", "3", "--in-flight", "1")
    assert outcome.code == 7
    assert 4 <= len(rows()) < 50
    assert outcome.err.endswith(
        "anyagent: the same command goes on where this one stopped\n"
        "anyagent: 4 of 4 prompts failed, the last with AgentError\n"
    )


def test_a_larger_share_of_failures_ends_the_batch(agent: EmbeddedAgent) -> None:
    texts = ["fail"] * 10 + ["Hello!"] * 200
    assert (
        batch(prompts(*texts), "--url", agent.url, "--max-error-rate", "0.05", "--in-flight", "1").code == 7
    )
    assert len(rows()) == 100


def test_no_connection() -> None:
    outcome = batch(many(3), "--url", unused_url(), "--report", "report.html")
    assert outcome.code == 3
    assert outcome.err.startswith("anyagent: could not connect to 127.0.0.1:")
    assert len(outcome.err.splitlines()) == 1
    assert rows() == []


def test_a_line_that_is_no_prompt_ends_the_batch_after_the_prompts_before(agent: EmbeddedAgent) -> None:
    many(3)
    with open("prompts.jsonl", "a") as file:
        file.write('{"text": 5}\n')
    outcome = batch("prompts.jsonl", "--url", agent.url)
    assert outcome.code == 2
    assert len(answers()) == 3
    assert outcome.err.splitlines()[-1].startswith("anyagent: prompts.jsonl, line 4: ")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("/dev/full", "no space left on device"),
        ("missing/answers.jsonl", "its directory does not exist"),
        (".", "is a directory"),
    ],
)
def test_an_output_that_cannot_be_written(output: str, reason: str) -> None:
    outcome = batch(many(3), output=output)
    assert outcome.code == 6
    assert outcome.err.splitlines()[-1].endswith(reason)


def test_two_runs_on_one_output_exclude_each_other() -> None:
    many(3)
    with (
        embedded_agent(answer_one_and_hang) as agent,
        started("batch", "prompts.jsonl", "--url", agent.url, "-o", "answers.jsonl") as first,
    ):
        hanging(agent, 3)
        second = batch("prompts.jsonl", "--url", agent.url)
        assert second.code == 6
        assert second.err == "anyagent: answers.jsonl: another run is writing to it\n"
        assert len(asked(agent)) == 3
        first.kill()


def test_the_end_of_a_pipe_ends_the_batch() -> None:
    gate = Gate()

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        if message.text != "prompt 0":
            await gate.passed()
            if message.text != "prompt 1":
                await reply.hang()
        await echo(message, reply)

    many(5)
    with (
        embedded_agent(handler) as agent,
        started("batch", "prompts.jsonl", "--url", agent.url, "--quiet") as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b'{"id":"0"')
        process.stdout.close()
        gate.open()
        assert exit_code(process) == 141
        agent.wait_for(is_cancel)
        agent.wait_for_connections(0)
        assert process.stderr is not None
        assert process.stderr.read() == b""


def is_cancel(message: im.ClientMessage) -> bool:
    return isinstance(message, im.Cancel)


# Wrong usage.


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["missing.jsonl"], "missing.jsonl: no such file or directory"),
        (["prompts.xyz"], "prompts.xyz: "),
        (["prompts.jsonl", "--url", "http://x"], "the URL"),
        (["prompts.jsonl", "--url", "ws://x", "--url", "ws:///"], "the URL"),
        (["prompts.jsonl", "--header", "x"], "--header must be NAME:VALUE"),
        (["prompts.jsonl", "--connections", "0"], "--connections must be a positive integer, not 0"),
        (["prompts.jsonl", "--in-flight", "0"], "--in-flight must be a positive integer, not 0"),
        (["prompts.jsonl", "--in-flight", "few"], "--in-flight must be a positive integer, or adaptive"),
        (["prompts.jsonl", "--in-flight", "-1"], "--in-flight must be a positive integer, or adaptive"),
        (["prompts.jsonl", "--max-in-flight", "0"], "--max-in-flight must be a positive integer, not 0"),
        (
            ["prompts.jsonl", "--in-flight", "5", "--max-in-flight", "9"],
            "--max-in-flight is for --in-flight adaptive",
        ),
        (
            ["prompts.jsonl", "--requests-per-minute", "0"],
            "--requests-per-minute must be a positive, finite number",
        ),
        (
            ["prompts.jsonl", "--tokens-per-minute", "nan"],
            "--tokens-per-minute must be a positive, finite number",
        ),
        (["prompts.jsonl", "--attempts", "0"], "--attempts must be a positive integer, not 0"),
        (["prompts.jsonl", "--timeout", "0"], "--timeout must be a positive, finite number of seconds"),
        (
            ["prompts.jsonl", "--first-event-timeout", "-1"],
            "--first-event-timeout must be a positive, finite",
        ),
        (["prompts.jsonl", "--idle-timeout", "inf"], "--idle-timeout must be a positive, finite number"),
        (["prompts.jsonl", "--max-errors", "-1"], "--max-errors must be an integer of at least 0, not -1"),
        (["prompts.jsonl", "--max-error-rate", "1"], "--max-error-rate must be at least 0 and less than 1"),
        (["prompts.jsonl", "--fsync", "often"], "--fsync must be 'always', 'never', "),
        (["prompts.jsonl", "--grace", "-1"], "--grace must be a number of seconds"),
        (["prompts.jsonl", "--grace", "nan"], "--grace must be a number of seconds"),
        (["prompts.jsonl", "--quiet", "--json-progress"], "--quiet and --json-progress exclude each other"),
        (
            ["prompts.jsonl", "--overwrite", "--retry-failed"],
            "--overwrite and --retry-failed exclude each other",
        ),
        (
            ["prompts.jsonl", "--metrics", "missing/m.json"],
            "--metrics missing/m.json: no such file or directory",
        ),
        (["prompts.jsonl", "--report", "."], "--report .: is a directory"),
        (
            ["prompts.jsonl", "--report", "answers.jsonl"],
            "--output and --report are the same file, answers.jsonl",
        ),
        (
            ["prompts.jsonl", "--metrics", "m", "--report", "./m"],
            "--metrics and --report are the same file, m",
        ),
        (
            ["prompts.jsonl", "--metrics", "linked.jsonl"],
            "INPUT and --metrics are the same file, linked.jsonl",
        ),
    ],
)
def test_a_wrong_value_is_one_line_and_nothing_is_begun(arguments: list[str], error: str) -> None:
    many(3)
    Path("linked.jsonl").symlink_to("prompts.jsonl")
    Path("prompts.xyz").touch()
    content = Path("prompts.jsonl").read_bytes()
    outcome = batch(*arguments)
    assert outcome.code == 2
    assert outcome.err.startswith(f"anyagent: {error}")
    assert len(outcome.err.splitlines()) == 1
    assert not Path("answers.jsonl").exists()
    assert Path("prompts.jsonl").read_bytes() == content


def test_the_output_must_not_be_the_input() -> None:
    outcome = batch(many(3), output="prompts.jsonl")
    assert (outcome.code, outcome.err) == (
        2,
        "anyagent: INPUT and --output are the same file, prompts.jsonl\n",
    )


def test_what_is_kept_until_a_parquet_file_is_written_must_not_be_the_input() -> None:
    Path(many(3)).rename("a.parquet.jsonl")
    outcome = batch("a.parquet.jsonl", "--overwrite", output="a.parquet")
    assert outcome.code == 2
    assert outcome.err == "anyagent: INPUT and the journal of --output are the same file, a.parquet.jsonl\n"


def test_answers_as_parquet() -> None:
    assert batch(many(3), output="answers.parquet").code == 0
    assert Path("answers.parquet").read_bytes().startswith(b"PAR1")


def test_before_the_end_answers_as_parquet_are_in_a_journal(agent: EmbeddedAgent) -> None:
    outcome = batch(prompts("fail"), "--url", agent.url, "--max-errors", "0", output="answers.parquet")
    assert outcome.code == 7
    assert "anyagent: the answers are in answers.parquet.jsonl\n" in outcome.err
    assert answers("answers.parquet.jsonl") == {"0": None}


def test_answers_are_not_shown_on_a_terminal() -> None:
    many(3)
    with Terminal() as terminal:
        assert terminal.run("batch", "prompts.jsonl") == 2
        assert (
            terminal.shown()
            == "anyagent: the answers would fill the terminal: give --output FILE, or a pipe\r\n"
        )


def test_without_a_standard_output_there_is_nowhere_to_write_to() -> None:
    many(3)
    assert run_with("batch", "prompts.jsonl", stdin=None, stdout=None, stderr=None) == 141


def test_a_token_is_sent_to_all_agents_or_none() -> None:
    many(3)
    urls = ["--url", "ws://one.invalid", "--url", "ws://a:s3cr3t@two.invalid"]
    outcome = batch("prompts.jsonl", *urls, env={"ANYAGENT_TOKEN": "t0k3n"})
    assert outcome.code == 2
    assert outcome.err == (
        "anyagent: ANYAGENT_TOKEN is set, and some of the URLs have credentials of their own, but not all\n"
    )


# Figures.


def test_figures_and_a_report_are_written(agent: EmbeddedAgent) -> None:
    Path("metrics.json").write_text("what was there before, and is longer" * 1_000)
    prompts("fail", "Hello!")
    files = ["--metrics", "metrics.json", "--report", "report.html"]
    assert batch("prompts.jsonl", "--url", agent.url, *files).code == 1
    figures = json.loads(Path("metrics.json").read_text())
    assert (figures["done"], figures["failed"], figures["skipped"]) == (1, 1, 0)
    assert figures["settings"]["input"] == "prompts.jsonl"
    assert figures["settings"]["in flight"] == "adaptive"
    page = Path("report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "prompts.jsonl" in page


def test_figures_are_written_also_when_the_batch_is_given_up(agent: EmbeddedAgent) -> None:
    options = ["--url", agent.url, "--max-errors", "0", "--metrics", "metrics.json"]
    assert batch(prompts("fail"), *options).code == 7
    assert json.loads(Path("metrics.json").read_text())["failed"] == 1


def test_figures_may_go_to_a_device() -> None:
    outcome = batch(many(3), "--metrics", "/dev/null")
    assert outcome.code == 0


def test_figures_that_cannot_be_written_in_the_end() -> None:
    outcome = batch(many(3), "--metrics", "/dev/full", "--report", "report.html")
    assert outcome.code == 6
    assert outcome.err.endswith("\nanyagent: --metrics /dev/full: no space left on device\n")
    assert Path("report.html").read_text().endswith("</html>\n")


def test_figures_that_cannot_be_written_do_not_hide_what_happened(agent: EmbeddedAgent) -> None:
    options = ["--url", agent.url, "--max-errors", "0", "--metrics", "/dev/full"]
    outcome = batch(prompts("fail"), *options)
    assert outcome.code == 7
    assert outcome.err.splitlines()[-2:] == [
        "anyagent: --metrics /dev/full: no space left on device",
        "anyagent: 1 of 1 prompts failed, the last with AgentError",
    ]


def test_quiet_says_only_what_is_wrong(agent: EmbeddedAgent) -> None:
    prompts("fail", "Hello!")
    outcome = batch("prompts.jsonl", "--url", agent.url, "--quiet")
    assert outcome.code == 1
    assert outcome.err == ("anyagent: 1 of the prompts failed; --retry-failed asks for them again\n")


def test_progress_as_json_ends_with_the_summary(agent: EmbeddedAgent) -> None:
    outcome = batch(many(3), "--url", agent.url, "--json-progress")
    assert outcome.code == 0
    end = json.loads(outcome.err.splitlines()[-1])
    assert (end["event"], end["outcome"], end["done"], end["summary"]["done"]) == ("end", "complete", 3, 3)


def test_progress_as_json_ends_in_any_case() -> None:
    outcome = batch(many(3), "--url", unused_url(), "--json-progress")
    assert outcome.code == 3
    end, reason = outcome.err.splitlines()
    assert json.loads(end)["outcome"] == "failed"
    assert reason.startswith("anyagent: could not connect to 127.0.0.1:")


# Dry runs.


def test_a_dry_run_says_what_there_is_to_do_and_does_nothing(agent: EmbeddedAgent) -> None:
    prompts("fail", "Hello!")
    batch("prompts.jsonl", "--url", agent.url)
    before = Path("answers.jsonl").read_bytes()
    prompts("fail", "Hello!", "more")
    with open("prompts.jsonl", "a") as file:
        file.write('{"id": "2", "text": "other"}\n')
    outcome = batch("prompts.jsonl", "--url", agent.url, "--dry-run", "--metrics", "metrics.json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == (
        "prompts                 4\n"
        "to be asked             2\n"
        "not asked               2  the output has a row for them\n"
        "failed before           1  not asked again without --retry-failed\n"
        "repeated                1  with the id or, without ids, the text of one before\n"
    )
    outcome = batch("prompts.jsonl", "--url", agent.url, "--dry-run", "--retry-failed")
    assert "to be asked             3\n" in outcome.out
    assert "failed before           1  asked again\n" in outcome.out
    assert Path("answers.jsonl").read_bytes() == before
    assert not Path("metrics.json").exists()
    assert len(asked(agent)) == 2


def test_a_dry_run_connects_to_nothing_and_creates_nothing() -> None:
    assert batch(many(3), "--url", unused_url(), "--dry-run").code == 0
    assert not Path("answers.jsonl").exists()


def test_a_dry_run_finds_the_first_problem_of_the_input() -> None:
    many(3)
    with open("prompts.jsonl", "a") as file:
        file.write('{"text": 5}\n{"text": 6}\n')
    outcome = batch("prompts.jsonl", "--dry-run")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("anyagent: prompts.jsonl, line 4: ")


def test_a_dry_run_finds_an_output_that_is_something_else() -> None:
    Path("answers.jsonl").write_text("a diary\n")
    outcome = batch(many(3), "--dry-run")
    assert (outcome.code, outcome.out) == (6, "")
    assert outcome.err.startswith("anyagent: answers.jsonl")


# Signals.


async def answer_one_and_hang(message: im.UserMessage, reply: AgentReply) -> None:
    if message.text == "prompt 0":
        await echo(message, reply)
    else:
        await reply.text("begun")
        await reply.hang()


def hanging(agent: EmbeddedAgent, count: int) -> None:
    """Wait until `agent` has been sent `count` prompts."""
    agent.wait_for(lambda message: isinstance(message, im.UserMessage) and message.id == str(count))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_some_time_to_what_is_in_flight_and_then_cancels_it(
    backend: str, number: signal.Signals, code: int
) -> None:
    def interrupt() -> None:
        hanging(agent, 4)
        send_signal(number)

    options = ["--backend", backend, "--in-flight", "3", "--grace", "0.1", "--metrics", "metrics.json"]
    with embedded_agent(answer_one_and_hang) as agent, someone(interrupt):
        outcome = batch(many(10), "--url", agent.url, *options)
        assert outcome.code == code
        agent.wait_for(is_cancel)
        agent.wait_for_connections(0)
        assert len(asked(agent)) == 4
    assert answers() == {"0": "prompt 0"}
    assert "anyagent: stopping: no new prompt; waiting up to 0.1 s for the 3 in flight\n" in outcome.err
    assert "anyagent: Ctrl-C again ends at once\n" in outcome.err
    assert "\n1 prompt in " in outcome.err
    assert outcome.err.endswith(
        "\nanyagent: the answers are in answers.jsonl\n"
        "anyagent: the same command goes on where this one stopped\n"
    )
    assert json.loads(Path("metrics.json").read_text())["done"] == 1
    with embedded_agent() as agent:
        assert batch("prompts.jsonl", "--url", agent.url).code == 0
        assert len(asked(agent)) == 9
    assert len(answers()) == 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_ends_within_the_time_that_a_signal_leaves_is_an_answer(backend: str) -> None:
    gate = Gate()

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await gate.passed()
        await echo(message, reply)

    with (
        embedded_agent(handler) as agent,
        started(
            *("batch", many(10), "--url", agent.url, "-o", "answers.jsonl", "--in-flight", "3", "--quiet"),
            *("--backend", backend),
        ) as process,
    ):
        hanging(agent, 3)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline().endswith(b"for the 3 in flight\n")
        gate.open()
        assert exit_code(process) == 130
        assert len(asked(agent)) == len(answers()) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_signal_while_standard_input_has_nothing_more_yet(backend: str, agent: EmbeddedAgent) -> None:
    arguments = ("batch", "-", "--url", agent.url, "-o", "answers.jsonl", "--quiet", "--backend", backend)
    with started(*arguments) as process:
        assert process.stdin is not None
        process.stdin.write(b'{"id": "a", "text": "Hello!"}\n{"id"')
        hanging(agent, 1)
        process.send_signal(signal.SIGINT)
        assert exit_code(process) == 130
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[1:] == [b"anyagent: Ctrl-C again ends at once"]
    assert answers() == {"a": "Hello!"}


def test_a_signal_before_there_is_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def interrupt() -> None:
            connections.append(listener.accept()[0])
            send_signal(signal.SIGINT)

        connections: list[socket.socket] = []
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}"
        with someone(interrupt):
            outcome = batch(many(3), "--url", url, "--grace", "0.01")
        connections[0].close()
    assert outcome.code == 130
    assert rows() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_signal_ends_the_process_also_while_the_event_loop_is_blocked(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()
    codes: list[int] = []

    async def block(run: object) -> None:
        begun.set()
        ended.wait(DEADLINE)

    def exit_at_once(code: int) -> None:
        codes.append(code)
        ended.set()

    def interrupt_twice() -> None:
        begun.wait(DEADLINE)
        send_signal(signal.SIGINT)
        pending.wait(DEADLINE)
        send_signal(signal.SIGTERM)

    pending = threading.Event()
    handle = Signals._handle

    def handled(signals: Signals, number: int, frame: Any) -> None:
        try:
            handle(signals, number, frame)
        finally:
            pending.set()

    monkeypatch.setattr(FileRun, "run", block)
    monkeypatch.setattr(os, "_exit", exit_at_once)
    monkeypatch.setattr(Signals, "_handle", handled)
    with someone(interrupt_twice):
        outcome = batch(many(3), "--backend", backend)
    assert codes == [143]
    assert "stopping" in outcome.err


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (
            OutputError(Path("answers.jsonl"), "no space left on device"),
            ["anyagent: answers.jsonl: no space left on device"],
        ),
        (ConnectError("connection refused"), ["anyagent: connection refused"]),
        (None, []),
    ],
)
def test_what_fails_after_a_signal_is_said_and_the_signal_counts(
    failure: Exception | None, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait_and_fail(run: FileRun) -> None:
        send_signal(signal.SIGINT)
        while not run.stopped:
            await anyio.lowlevel.checkpoint()
        if failure is not None:
            raise failure

    monkeypatch.setattr(FileRun, "run", wait_and_fail)
    outcome = batch(many(3))
    assert outcome.code == 130
    after = outcome.err.splitlines()[
        outcome.err.splitlines().index("anyagent: Ctrl-C again ends at once") + 1 :
    ]
    assert after[: len(said) + 1] == [*said, after[len(said)]]
    assert after[len(said)].startswith("anyagent: 0 rows so far")


def test_a_bug_is_not_hidden_by_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait_and_crash(run: FileRun) -> None:
        send_signal(signal.SIGINT)
        while not run.stopped:
            await anyio.lowlevel.checkpoint()
        raise ZeroDivisionError

    monkeypatch.setattr(FileRun, "run", wait_and_crash)
    with pytest.raises(ZeroDivisionError):
        main(["batch", many(3), "-o", "answers.jsonl"])


def test_a_signal_that_the_batch_was_started_to_ignore_is_ignored() -> None:
    gate = Gate()

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        await gate.passed()
        await echo(message, reply)

    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does, or a shell in the background
    try:
        with (
            embedded_agent(handler) as agent,
            started(
                *("batch", many(3), "--url", agent.url, "-o", "answers.jsonl", "--quiet"),
                restore_signals=False,
            ) as process,
        ):
            hanging(agent, 3)
            process.send_signal(signal.SIGINT)
            gate.open()
            assert process.communicate(timeout=DEADLINE) == (b"", b"")
            assert process.returncode == 0
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(answers()) == 3


# Help.


def test_the_help_has_sections_and_fits_80_columns() -> None:
    outcome = run("batch", "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert max(map(len, outcome.out.splitlines())) <= 80
    sections = re.findall(r"^(\w.*):$", outcome.out, re.MULTILINE)
    assert sections == [
        "Input and output",
        "Agents",
        "Pace",
        "Failures and interruptions",
        "What is shown and reported",
        "Other",
    ]
    for option in ("INPUT", "--output", "--url", "--header", "--in-flight", "--max-errors", "--dry-run"):
        assert option in outcome.out
    assert "  anyagent batch " in outcome.out.partition("Examples:\n")[2]


def test_the_help_lists_the_exit_codes() -> None:
    codes = re.findall(r"^    (\d+) ", run("batch", "--help").out, re.MULTILINE)
    assert codes == ["0", "1", "2", "3", "6", "7", "130", "141", "143"]


def test_the_help_never_has_the_values_of_the_environment() -> None:
    outcome = run("batch", "--help", env={"ANYAGENT_URL": "wss://x/?s3cr3t", "ANYAGENT_TOKEN": "s3cr3t"})
    assert "ANYAGENT_TOKEN" in outcome.out
    assert "s3cr3t" not in outcome.out
