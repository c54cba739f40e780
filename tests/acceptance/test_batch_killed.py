"""Batch runs that are killed, two hundred times, and go on: no row is lost, and none is there twice."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest

from anyagent import IM
from anyagent.testing import embedded_agent

from .batches import Program, program, rows_in, rows_in_parquet, whole_lines, write_prompts
from .processes import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from anyagent.testing import AgentReply, EmbeddedAgent

IN_FLIGHT: Final = 16


class Agent:
    """Answers after some milliseconds, and kills whoever asks when told to.

    * `moody`: nearly all prompts that begin with "moody" are answered with an error.
    * `target`: the process to kill; whoever changes it holds the `lock`.
    * `kill_at`: once that many prompts of a run have come. `delay`: so many seconds later.
    """

    def __init__(self, draw: random.Random) -> None:
        self.moody = True
        self.lock = threading.Lock()
        self.target: int | None = None
        self.kill_at: int | None = None
        self.delay = 0.0
        self.asked = 0
        self._draw = draw

    async def answer(self, message: IM.UserMessage, reply: AgentReply) -> None:
        self.asked += 1
        if self.asked == self.kill_at:
            await anyio.sleep(self.delay)
            self.kill()
        await anyio.sleep(self._draw.uniform(0, 0.008))
        if self.moody and message.text.startswith("moody") and self._draw.random() < 0.95:
            await reply.error("no_answer", "not now")
        else:
            await reply.text(f"answer to {message.text}")

    def kill(self) -> None:
        with self.lock:
            if self.target is not None:
                os.kill(self.target, signal.SIGKILL)


class Moment:
    """When a run is killed. `name` says which kind of moment it is."""

    def __init__(self, name: str, draw: random.Random, *, at: int, write: int, line: int) -> None:
        self.name = name
        self.after: float | None = None  # seconds since it was begun
        self.kill_at: int | None = None
        self.delay = draw.uniform(0, 0.01)
        self.order: dict[str, Any] = {}
        match name:
            case "while it starts":
                self.after = draw.uniform(0, 0.1)
            case "while it asks":
                self.kill_at = draw.randint(1, at)
            case "within a write":
                self.order = {"write": (draw.randrange(write), draw.random())}
            case "while it waits for the disk":
                self.kill_at = at
                self.order = {"sync": 30}
            case "between two lines":
                self.order = {"line": [draw.randrange(line)]}
            case _:
                raise ValueError(name)


class Line(Moment):
    """Before yet another line of some functions."""

    def __init__(self, number: int, *functions: str) -> None:
        self.name = f"within {functions[0]}"
        self.after = self.kill_at = None
        self.delay = 0
        self.order = {"line": [number, functions]}


class Batch:
    """One input and its output, run again and again."""

    def __init__(self, program: Program, embedded: EmbeddedAgent, agent: Agent, draw: random.Random) -> None:
        self.asked: list[str] = []  # the prompts that the agent has seen in the newest run
        self._draw = draw
        self._program = program
        self._embedded = embedded
        self._agent = agent

    def run(self, source: Path, output: Path, moment: Moment | None = None, **options: object) -> bool:
        """Whether it came to its end before it was killed."""
        agent = self._agent
        agent.asked = 0
        agent.kill_at, agent.delay = (None, 0) if moment is None else (moment.kill_at, moment.delay)
        order = {
            "url": self._embedded.url,
            "input": str(source),
            "output": str(output),
            "backend": self._draw.choice(BACKENDS),
            "config": {"in_flight": IN_FLIGHT},
            "options": options,
            **({} if moment is None else moment.order),
        }
        self._program.send(order)
        pid = self._program.line()
        with agent.lock:
            agent.target = pid
        if moment is not None and moment.after is not None and not self._program.says(moment.after):
            agent.kill()
        said = self._program.line()
        with agent.lock:
            agent.target = None
        self._embedded.wait_for_connections(0)
        received, self.asked = self._embedded.received, []
        while received:
            message = received.popleft()
            assert isinstance(message, IM.UserMessage)
            self.asked.append(message.text)
        if isinstance(said, int):
            assert said == signal.SIGKILL, self._program.complaint()
            return False
        assert self._program.line() in (0, signal.SIGKILL)  # it may be killed behind its last word
        assert said["error"] is None
        return True


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


@pytest.fixture
def agent(draw: random.Random) -> Agent:
    return Agent(draw)


@pytest.fixture
def batch(agent: Agent, draw: random.Random) -> Iterator[Batch]:
    with embedded_agent(agent.answer) as embedded, program("fork_runs") as forks:
        yield Batch(forks, embedded, agent, draw)


class Ledger:
    """Holds what a run has done against what it may do; the rows are those of a file of lines."""

    def __init__(self, prompts: list[dict[str, object]]) -> None:
        self._prompts = prompts
        self._texts = Counter(str(prompt["text"]) for prompt in prompts)
        self.kills: Counter[str] = Counter()
        self.finished = 0
        self.asked = 0
        self.asked_again = 0
        self.most_again = 0

    def check(
        self,
        before: list[bytes],
        after: list[bytes],
        asked: list[str],
        moment: Moment | None,
        finished: bool,
        *,
        retry_failed: bool,
    ) -> None:
        """A run found the rows `before` and left those `after`; it was killed at `moment`, or `finished`."""
        self.finished += finished
        if not finished:
            assert moment is not None
            self.kills[moment.name] += 1
        answered = [line for line in before if json.loads(line)["error"] is None] if retry_failed else before
        kept = before if after[: len(before)] == before else answered
        assert after[: len(kept)] == kept, "a row is lost"
        sought = self._texts - self._texts_of(answered)
        assert Counter(asked) <= sought, "a prompt was asked twice, or has its answer"
        gained = self._texts_of(after[len(kept) :])
        assert gained <= Counter(asked), "nobody has asked for this answer"
        assert not finished or gained == Counter(asked)
        again = (Counter(asked) - gained).total()
        assert again <= 2 * IN_FLIGHT, "more than was in flight"
        self.asked += len(asked)
        self.asked_again += again
        self.most_again = max(self.most_again, again)

    def check_finished(self, lines: list[bytes]) -> None:
        """These rows are all that there have to be."""
        rows = [json.loads(line) for line in lines]
        assert sorted(row["number"] for row in rows) == list(range(len(self._prompts)))
        assert sorted(row["index"] for row in rows) == list(range(len(self._prompts)))

    def _texts_of(self, lines: list[bytes]) -> Counter[str]:
        texts: Counter[str] = Counter()
        for row in map(json.loads, lines):
            prompt = self._prompts[row["index"]]
            assert row["number"] == prompt["number"]
            assert row["id"] == prompt.get("id", row["id"])
            assert row["text"] == (None if row["error"] else f"answer to {prompt['text']}")
            texts[str(prompt["text"])] += 1
        return texts

    def __str__(self) -> str:
        kills = ", ".join(f"{count} {name}" for name, count in sorted(self.kills.items()))
        return (
            f"killed {self.kills.total()} times ({kills}), finished {self.finished} times; "
            f"{self.asked:,} prompts were seen, {self.asked_again} of them had no row yet at a kill, "
            f"at most {self.most_again} at once"
        )


def named(count: int) -> list[dict[str, object]]:
    return [
        {
            "id": f"row {number}",
            "text": f"{'moody' if number % 10 == 3 else 'calm'} {number}",
            "number": number,
        }
        for number in range(count)
    ]


def nameless(count: int, draw: random.Random) -> list[dict[str, object]]:
    """Each text is there five times, on average, and only another column tells its rows apart."""
    return [{"text": f"text {draw.randrange(count // 5)}", "number": number} for number in range(count)]


class Moments:
    """Draws moments, of each kind about as often as its weight says."""

    def __init__(self, draw: random.Random, kinds: dict[str, int], *, at: int, write: int, line: int) -> None:
        self._draw = draw
        self._kinds = kinds
        self._bounds = {"at": at, "write": write, "line": line}

    def next(self) -> Moment:
        (name,) = self._draw.choices(list(self._kinds), list(self._kinds.values()))
        return Moment(name, self._draw, **self._bounds)


class Trial:
    """Runs one batch, again and again, and holds each run against what it may do."""

    def __init__(self, batch: Batch, prompts: list[dict[str, object]], source: Path, output: Path) -> None:
        self.ledger = Ledger(prompts)
        self.output = output
        self._batch = batch
        self._source = source
        write_prompts(source, prompts)

    @property
    def kills(self) -> int:
        return self.ledger.kills.total()

    def run(self, moment: Moment | None = None, *, retry_failed: bool = False, **options: object) -> bool:
        """Whether it came to its end before it was killed."""
        before = rows_of(self.output)
        finished = self._batch.run(self._source, self.output, moment, retry_failed=retry_failed, **options)
        after = rows_of(self.output)
        self.ledger.check(before, after, self._batch.asked, moment, finished, retry_failed=retry_failed)
        if finished:
            self.ledger.check_finished(after)
        return finished


def rows_of(output: Path) -> list[bytes]:
    """The rows that count. Of Parquet: those of the journal, or of the file itself if there is none."""
    if output.suffix == ".jsonl":
        return whole_lines(output)
    journal = output.with_name(output.name + ".jsonl")
    if journal.exists() or not output.exists():
        rows = [json.loads(line) for line in whole_lines(journal)]
    else:
        rows = rows_in_parquet(output)
    names = ("id", "index", "text", "tokens_used", "error", "number")  # which both spell in the same way
    return [json.dumps({name: row[name] for name in names}).encode() for row in rows]


@pytest.mark.parametrize("with_ids", [True, False], ids=["with ids", "with repeated texts"])
def test_killed_at_any_moment_and_resumed_each_prompt_has_one_row_and_none_is_asked_that_has_one(
    with_ids: bool, batch: Batch, draw: random.Random, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    prompts = named(2_000) if with_ids else nameless(2_000, draw)
    trial = Trial(batch, prompts, tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl")
    kinds = {"while it starts": 10, "while it asks": 40, "within a write": 15, "between two lines": 10}
    moments = Moments(draw, kinds, at=60, write=40, line=110)
    while trial.kills < 60:
        if trial.run(moments.next()):
            trial.output = tmp_path / f"answers-{trial.kills}.jsonl"
    assert trial.run()
    figure(str(trial.ledger))


def test_killed_while_the_disk_is_slow_no_more_is_asked_again_than_was_in_flight(
    batch: Batch, draw: random.Random, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    trial = Trial(batch, named(500), tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl")
    moment = Moment("while it waits for the disk", draw, at=400, write=1, line=1)
    assert not trial.run(moment, fsync="always")
    assert trial.run()
    figure(str(trial.ledger))


def test_killed_while_failed_rows_are_taken_out_and_tried_again_no_answer_is_lost(
    batch: Batch, agent: Agent, draw: random.Random, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    trial = Trial(batch, named(500), tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl")
    for number in itertools.count():
        assert trial.run()  # so that there are failed rows
        if trial.run(Line(number, "_take_out_failed"), retry_failed=True):
            break
    assert trial.kills >= 15
    moments = Moments(draw, {"while it starts": 3, "while it asks": 1}, at=50, write=1, line=1)
    while trial.kills < 50:
        trial.run(moments.next(), retry_failed=True)
    agent.moody = False
    assert trial.run(retry_failed=True)
    assert {row["error"] for row in rows_in(trial.output)} == {None}
    figure(str(trial.ledger))


def test_killed_while_answers_become_parquet_none_is_lost(
    batch: Batch, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    trial = Trial(batch, named(100), tmp_path / "prompts.jsonl", tmp_path / "answers.parquet")
    for number in itertools.count():
        if trial.run(Line(number, "finish", "_replaced")):
            break
        assert trial.run()
        trial.output = tmp_path / f"answers-{number}.parquet"
    for number in itertools.count():
        if trial.output.with_name(f"{trial.output.name}.jsonl").exists():
            assert trial.run()
        if trial.run(Line(number, "begin")):
            break
    assert trial.ledger.kills["within finish"] >= 10
    assert trial.ledger.kills["within begin"] >= 10
    figure(str(trial.ledger))
