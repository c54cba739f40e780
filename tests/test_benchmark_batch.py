"""The batch scenario of the benchmarks: its ways from file to file, and what it holds against them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from benchmarks import scenarios
from benchmarks.scenarios import batch
from benchmarks.scenarios._rounds import SIZE
from benchmarks.server import ReplayServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLIENTS = (
    "anyagent-asyncio",
    "anyagent-trio",
    "anyagent-adaptive",
    "replaced",
    "replaced-16",
    "aiohttp",
    "aiohttp-connecting",
    "trio-websocket",
)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ReplayServer()
    yield server.port
    server.close()


@pytest.mark.parametrize("client", CLIENTS)
def test_every_way_answers_each_prompt_once(client: str, port: int) -> None:
    job = scenarios.Job("batch", "long", client, quick=True, port=port, server_pid=os.getpid())
    answer = scenarios.find("batch").run(job)  # it checks the output
    assert answer.measurement is not None
    assert answer.measurement.value > 0
    assert answer.measurement.extra["prompts_per_s"] > 0
    assert (answer.remark is not None) is (client == "replaced")


def test_prompts_can_be_told_apart_by_their_answers() -> None:
    beginnings = {prompt.text[:SIZE] for prompt in batch._prompts(2000)}
    assert len(beginnings) == 2000


ROWS = [{"id": prompt.id, "text": 2 * prompt.text[:SIZE]} for prompt in batch._prompts(3)]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (ROWS[:2], "1 prompts were not answered"),
        ([*ROWS, ROWS[1]], "row-1 was answered twice"),
        ([*ROWS, {"id": "row-7", "text": ""}], "row-7 was answered twice, or not asked"),
        ([{**ROWS[0], "text": ROWS[1]["text"]}, *ROWS[1:]], "row-0 has an answer that is not its own"),
        ([{**ROWS[0], "text": ROWS[0]["text"][:-1]}, *ROWS[1:]], "row-0 has .* not whole"),
    ],
)
def test_an_output_that_is_not_right_is_refused(
    rows: list[dict[str, str]], problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS)))
    batch._check(path, batch._prompts(3), chunks=2)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RuntimeError, match=problem):
        batch._check(path, batch._prompts(3), chunks=2)
