"""`AgentPredictor` on a real Ray with several worker processes, one of which is killed now and then."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import anyio
import psutil
import pyarrow as pa
import pytest
import ray
import ray.data
from ray.exceptions import ActorDiedError, RayTaskError, UserCodeException

from anyagent import Backoff
from anyagent.batch import BatchConfig, Rates
from anyagent.ray import AgentPredictor, PredictorConfig, PromptFailed
from anyagent.ray._governor import Governor
from anyagent.ray._predictor import end_actor
from anyagent.testing import AgentReply, embedded_agent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyagent import IM
    from anyagent.testing import EmbeddedAgent

pytestmark = [
    # Ray warns of its own settings, as it makes them, and of what a later version will do.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    # Older versions drop the processes that they start, and what these write to.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file .*'/dev/null':ResourceWarning"),
]

DEADLINE = 300  # seconds; starting a process on a machine that is busy can take a minute
ACTORS = 3
ROWS = 120
BLOCKS = 12


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


class Agent:
    """A handler that notes what it sees, and refuses texts with an x.

    It begins once it has heard of all `ACTORS`. At the `kill_at`-th prompt it kills `victims` predictors.
    """

    def __init__(self, *, takes: float = 0.02, kill_at: int = 0, victims: int = 1) -> None:
        self.server: EmbeddedAgent
        self.takes = takes
        self.kill_at = kill_at
        self.victims = victims
        self.seen: Counter[str] = Counter()
        self.when: list[float] = []
        self.now = self.peak = 0
        self.killed: list[int] = []

    async def __call__(self, message: IM.UserMessage, reply: AgentReply) -> None:
        self.when.append(time.monotonic())
        self.seen[message.text] += 1
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            while self.server.connections_total < ACTORS:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            if len(self.when) == self.kill_at:
                for victim in predictors()[: self.victims]:
                    self.killed.append(victim)
                    os.kill(victim, signal.SIGKILL)
            await anyio.sleep(self.takes)
        finally:
            self.now -= 1
        if "x" in message.text:
            await reply.error("refused", "no x, please")
        else:
            await reply.text(message.text.upper())


@contextlib.contextmanager
def serving(agent: Agent) -> Iterator[EmbeddedAgent]:
    with embedded_agent(agent) as agent.server:
        yield agent.server


def predictors() -> list[int]:
    """The processes of all predictors; those that are at work come first."""
    titles = {
        process.pid: "".join(process.cmdline()) for process in psutil.Process().children(recursive=True)
    }
    found = [pid for pid, title in titles.items() if "MapWorker(MapBatches(AgentPredictor))" in title]
    return sorted(found, key=lambda pid: "submit" not in titles[pid])


def answers(texts: list[str], config: PredictorConfig) -> ray.data.Dataset:
    table = pa.table({"number": range(len(texts)), "text": texts})
    size = -(-len(texts) // BLOCKS)
    blocks = [table.slice(start, size) for start in range(0, len(texts), size)]
    return ray.data.from_arrow(blocks).map_batches(
        AgentPredictor,
        fn_constructor_args=(config,),
        compute=ray.data.ActorPoolStrategy(size=ACTORS),
        num_cpus=0.5,
        batch_size=4,
    )


def config_of(url: str, **settings: Any) -> PredictorConfig:
    return PredictorConfig(BatchConfig(url, in_flight=16, reconnect=Backoff(attempts=3)), **settings)


def texts_of(count: int = ROWS) -> list[str]:
    return [f"row {number}" for number in range(count)]


def rows_of(dataset: ray.data.Dataset) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: rows.extend(dataset.take_all()), daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive(), "the dataset does not come to an end"
    return rows


def assert_each_once(rows: list[dict[str, Any]]) -> None:
    assert sorted(row["number"] for row in rows) == list(range(ROWS))
    assert all(row["response"] == f"ROW {row['number']}" and row["error"] is None for row in rows)


def test_three_actors_answer_every_row_once_and_all_blocks_have_one_schema() -> None:
    texts = ["x" if number < 30 else f"row {number}" for number in range(ROWS)]
    agent = Agent()
    with serving(agent) as server:
        dataset = answers(texts, config_of(server.url)).materialize()
        assert server.connections_total == ACTORS
    rows = sorted(dataset.take_all(), key=lambda row: int(row["number"]))
    assert [row["text"] for row in rows] == texts
    assert all(row["response"] == row["text"].upper() for row in rows[30:])
    assert {(row["response"], row["error"]) for row in rows[:30]} == {
        (None, '{"type":"AgentError","code":"refused","details":"no x, please"}')
    }
    assert agent.seen == Counter(texts)
    refs = [ref for bundle in dataset.iter_internal_ref_bundles() for ref in bundle.block_refs]
    schemas = [block.schema for block in ray.get(refs)]
    assert len(schemas) == BLOCKS
    assert all(schema.equals(schemas[0]) for schema in schemas)


def test_all_actors_are_killed_and_what_they_had_of_the_total_in_flight_comes_back() -> None:
    agent = Agent(kill_at=ROWS // 2, victims=ACTORS)
    with serving(agent) as server:
        assert_each_once(rows_of(answers(texts_of(), config_of(server.url, total_in_flight=6))))
        assert server.connections_total > ACTORS
    assert len(agent.killed) == ACTORS
    assert agent.peak == 6
    assert set(agent.seen) == set(texts_of())


def test_one_actor_is_killed_and_the_total_rate_held() -> None:
    agent = Agent(takes=0, kill_at=ROWS // 2)
    per_second = 30
    with serving(agent) as server:
        begin = time.monotonic()
        config = config_of(server.url, total_rates=Rates(requests_per_minute=60 * per_second))
        assert_each_once(rows_of(answers(texts_of(), config)))
    assert len(agent.killed) == 1
    for number, when in enumerate(agent.when):
        assert number <= per_second * (when - begin) + per_second


@pytest.mark.parametrize("original", [False, True])
def test_the_first_row_that_fails_ends_the_dataset(original: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "raise_original_map_exception", original)
    expected = PromptFailed if original else UserCodeException
    message = re.escape("the row '5' failed with AgentError refused: no x, please")
    with serving(Agent()) as server:
        config = config_of(server.url, on_error="raise", id_column="number")
        texts = ["x" if number == 5 else "fine" for number in range(ROWS)]
        with pytest.raises(expected, match=message) as caught:
            answers(texts, config).take_all()
    assert isinstance(caught.value, RayTaskError)


def test_the_governor_ends_when_nobody_needs_it_any_more() -> None:
    actor: Any = ray.remote(Governor).options(num_cpus=0).remote(None, None, end_actor, linger=0.01)
    with pytest.raises(ActorDiedError):
        ray.get(actor.stay.remote("nobody"), timeout=60)
