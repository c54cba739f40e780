"""A batch of a hundred thousand prompts: each has its row, and it takes no more memory than one of twenty."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from .batch_programs import EARLY, LATE
from .batches import program, write_prompts
from .measuring import MEBIBYTE
from .processes import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROMPTS: Final = 100_000


@contextlib.contextmanager
def replay_server() -> Iterator[str]:
    """The URL of a server in a process of its own, which answers every prompt with two chunks of its text."""
    command = [sys.executable, "-m", "benchmarks.server"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        yield f"ws://127.0.0.1:{port}/ids/answer?chunks=2&size=13"


def test_a_hundred_thousand_prompts_are_answered_once_each_in_memory_that_stays_and_then_passed_over(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    write_prompts(source, ({"id": f"row {n}", "text": f"prompt {n:06}"} for n in range(PROMPTS)))
    # without syncs: what waits for them to end goes up and down
    order = {"input": str(source), "output": str(output), "options": {"fsync": "never"}}
    with replay_server() as url:
        with program("measure") as measuring:
            run = measuring.ask({**order, "url": url})
        assert (run["done"], run["failed"], run["attempts"]) == (PROMPTS, 0, PROMPTS)
        assert_answered_once_each(output)
        with program("measure") as measuring:
            resumed = measuring.ask({**order, "url": url})
    assert (resumed["done"], resumed["skipped"], resumed["attempts"]) == (0, PROMPTS, 0)
    assert_answered_once_each(output)
    grown, objects = (lowest_late(run[name]) - lowest_early(run[name]) for name in ("memory", "blocks"))
    figure(
        f"{run['took']:.1f} s, of the processor {run['used'] / PROMPTS * 1e6:.0f} µs a prompt; "
        f"from {EARLY.start:,} to {PROMPTS:,} answers {grown // 1024} KiB and {objects} objects more, "
        f"at the peak {run['peak'] / MEBIBYTE:.1f} MiB"
    )
    figure(
        f"to pass over all of them again: {resumed['took']:.1f} s, "
        f"at the peak {resumed['peak'] / PROMPTS:.0f} bytes a row"
    )
    assert grown <= MEBIBYTE
    assert objects <= 0.1 * (LATE.start - EARLY.start)
    assert resumed["peak"] <= 300 * PROMPTS


def lowest_early(measured: list[int]) -> int:
    return min(measured[: len(EARLY)])


def lowest_late(measured: list[int]) -> int:
    assert len(measured) == len(EARLY) + len(LATE), "it was looked at too seldom"
    return min(measured[len(EARLY) :])


def assert_answered_once_each(output: Path) -> None:
    answered = bytearray(PROMPTS)
    with output.open("rb") as file:
        for line in file:
            row = json.loads(line)
            number = row["index"]
            assert (row["id"], row["text"]) == (f"row {number}", f"prompt {number:06}" * 2)
            answered[number] += 1
    assert set(answered) == {1}
