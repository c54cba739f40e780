"""`AgentPredictor`, called as Ray calls it, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import pickle
import re
import ssl
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.exceptions import ActorDiedError

from anyagent import Backoff, ConnectError
from anyagent.batch import BatchConfig, ErrorRecord, Prompt, Rates, Retry
from anyagent.ray import AgentPredictor, PredictorConfig, PromptFailed
from anyagent.ray._governor import Governor
from anyagent.ray._pool import Call, Pool
from anyagent.ray._predictor import _governed, end_actor
from anyagent.testing import AgentReply, embedded_agent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping

    from anyagent import IM

pytestmark = pytest.mark.anyio

SOON = 30  # seconds


def on_asyncio(test: Any) -> Any:
    """Ray knows no other event loop."""
    return pytest.mark.sockets(pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)(test))


async def moody(message: IM.UserMessage, reply: AgentReply) -> None:
    """Answers in capitals, but refuses what begins with an x."""
    if message.text.startswith("x"):
        await reply.error("refused", "no x, please")
    else:
        await reply.text(message.text.upper())


class Door:
    """A handler behind which prompts wait that begin with "slow", until it is opened."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self.seen: list[str] = []

    async def __call__(self, message: IM.UserMessage, reply: AgentReply) -> None:
        self.seen.append(message.text)
        while message.text.startswith("slow") and not self._opened.is_set():  # noqa: ASYNC110
            await anyio.sleep(0.005)
        await reply.text(message.text)

    def open(self) -> None:
        self._opened.set()


def config_of(url: str, *, in_flight: int = 8, **settings: Any) -> PredictorConfig:
    batch = BatchConfig(url, in_flight=in_flight, retry=Retry(initial=0.001), reconnect=Backoff(attempts=1))
    return PredictorConfig(batch, **settings)


@contextlib.contextmanager
def predictor_of(config: PredictorConfig) -> Iterator[AgentPredictor]:
    predictor = AgentPredictor(config)
    try:
        yield predictor
    finally:
        predictor.close()


def column(*values: object) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=object)


def table_of(columns: Mapping[str, Any]) -> pa.Table:
    return pa.table({name: pa.array(values) for name, values in columns.items()})


async def answered(predictor: AgentPredictor, **columns: Any) -> pa.Table:
    groups = [table_of(group) async for group in predictor(columns)]
    return pa.concat_tables(groups, promote_options="default")


async def eventually(predicate: Callable[[], object]) -> None:
    with anyio.fail_after(SOON):
        while not predicate():  # noqa: ASYNC110 - it changes in another thread
            await anyio.sleep(0.005)


@on_asyncio
async def test_every_row_comes_once_with_its_own_answer_beside_its_own_columns() -> None:
    numbers = np.arange(300)
    texts = column(*(f"row {number}" for number in numbers))
    lists = [[int(number)] for number in numbers]
    with embedded_agent(moody) as agent, predictor_of(config_of(agent.url)) as predictor:
        rows = (await answered(predictor, number=numbers, text=texts, list=lists)).sort_by("number")
    assert rows.column_names[:3] == ["number", "text", "list"]
    assert rows["number"].to_pylist() == numbers.tolist()
    assert rows["response"].to_pylist() == [f"ROW {number}" for number in numbers]
    assert rows["list"].to_pylist() == lists
    assert set(rows["tokens_used"].to_pylist()) == {1}
    assert set(rows["attempts"].to_pylist()) == {1}
    assert rows["error"].null_count == 300
    assert min(rows["ttft_ms"].to_pylist()) > 0


@on_asyncio
async def test_rows_come_as_they_finish() -> None:
    door = Door()
    with embedded_agent(door) as agent, predictor_of(config_of(agent.url)) as predictor:
        groups = predictor({"text": column("slow", "fast")})
        assert (await anext(groups))["text"].tolist() == ["fast"]
        door.open()
        assert (await anext(groups))["text"].tolist() == ["slow"]
        with pytest.raises(StopAsyncIteration):
            await anext(groups)


@on_asyncio
async def test_all_calls_of_an_actor_share_its_connections() -> None:
    with embedded_agent(moody) as agent, predictor_of(config_of(agent.url)) as predictor:
        texts = [f"{number}" for number in range(100)]
        calls = [answered(predictor, text=column(*texts[start::4])) for start in range(4)]
        for start, rows in enumerate(await asyncio.gather(*calls)):
            assert sorted(rows["response"].to_pylist()) == sorted(texts[start::4])
        await answered(predictor, text=column("again"))
        assert agent.connections_total == 1


@on_asyncio
async def test_a_row_that_fails_says_why_in_its_column() -> None:
    with embedded_agent(moody) as agent, predictor_of(config_of(agent.url)) as predictor:
        rows = await answered(predictor, text=column("x", "fine", None))
    by_text = {row["text"]: row for row in rows.to_pylist()}
    assert by_text["fine"]["error"] is None
    error: dict[str, Any] = {"type": "AgentError", "code": "refused", "details": "no x, please"}
    refused = {"response": None, "tokens_used": None, "ttft_ms": None, "attempts": 1}
    assert json.loads(by_text["x"].pop("error")) == error
    assert by_text["x"] == {"text": "x", **refused}
    error = {"type": "ValueError", "code": None, "details": "the prompt is not a string"}
    assert json.loads(by_text[None].pop("error")) == error
    assert by_text[None] == {"text": None, **refused, "attempts": 0}


@on_asyncio
async def test_the_schema_is_the_same_whatever_comes() -> None:
    texts = [column("fine", "y"), column("x", "xx"), np.array([], dtype="U1"), column("fine", "x")]
    with embedded_agent(moody) as agent, predictor_of(config_of(agent.url)) as predictor:
        schemas = [(await answered(predictor, text=text)).select([1, 2, 3, 4, 5]).schema for text in texts]
        assert (await answered(predictor, text=texts[2])).num_rows == 0
    assert schemas[0].names == ["response", "tokens_used", "ttft_ms", "attempts", "error"]
    assert schemas[0].types == [pa.string(), pa.int64(), pa.float64(), pa.int64(), pa.string()]
    assert schemas[1:] == [schemas[0]] * 3


@on_asyncio
async def test_an_absurd_number_of_tokens_fits_into_the_column() -> None:
    async def generous(message: IM.UserMessage, reply: AgentReply) -> None:
        end = {"type": "AGENT_EVENT_END", "tokens_used": 2**64 - 1, "id": reply.id}
        reply.end_silently()
        await reply.raw(json.dumps(end))

    with embedded_agent(generous) as agent, predictor_of(config_of(agent.url)) as predictor:
        rows = await answered(predictor, text=column("hello"))
    (tokens_used,) = rows["tokens_used"].to_pylist()
    assert tokens_used > 0
    assert rows["ttft_ms"].to_pylist() == [None]


@on_asyncio
@pytest.mark.parametrize(("id_column", "row"), [(None, "a row"), ("key", "the row 'k2'")])
async def test_the_first_row_that_fails_can_be_an_exception(id_column: str | None, row: str) -> None:
    with (
        embedded_agent(moody) as agent,
        predictor_of(config_of(agent.url, on_error="raise", id_column=id_column)) as predictor,
    ):
        with pytest.raises(PromptFailed) as caught:
            await answered(predictor, text=column("fine", "xyz"), key=column("k1", "k2"))
        assert str(caught.value) == f"{row} failed with AgentError refused: no x, please"
        assert caught.value.error == ErrorRecord("AgentError", "refused", "no x, please")
        again = await answered(predictor, text=column("fine"), key=column("k3"))
        assert again["response"].to_pylist() == ["FINE"]
        with pytest.raises(PromptFailed, match="failed with ValueError: the prompt is not a string"):
            await answered(predictor, text=column(None), key=column("k4"))


def test_the_exception_of_a_row_survives_the_way_out_of_an_actor() -> None:
    error = PromptFailed("k1", ErrorRecord("TimeoutError", "idle", "too long"))
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, PromptFailed)
    assert (str(copy), copy.id, copy.error) == (str(error), error.id, error.error)


@on_asyncio
@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"text": ["a"], "error": [1], "attempts": [1]}, {}, "output's names: attempts, error; rename them"),
        ({"prompt": ["a"], "n": [1]}, {}, "no column 'text' in the input, which has: prompt, n"),
        ({"text": ["a"]}, {"id_column": "key"}, "no column 'key' in the input"),
    ],
)
async def test_columns_that_do_not_fit_are_a_clear_error(
    columns: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    predictor = AgentPredictor(config_of("ws://nobody.invalid", **settings))
    with pytest.raises(ValueError, match=message):
        await answered(predictor, **columns)


@on_asyncio
async def test_batches_in_another_format_are_a_clear_error() -> None:
    predictor = AgentPredictor(config_of("ws://nobody.invalid"))
    with pytest.raises(TypeError, match="batch_format='numpy', not Table"):
        await anext(predictor(pa.table({"text": ["a"]})))


@pytest.mark.parametrize(
    ("batch", "settings", "message"),
    [
        ({}, {"on_error": "ignore"}, "on_error must be"),
        ({}, {"total_in_flight": 0}, "total_in_flight must be a positive integer"),
        ({"rates": Rates(requests_per_minute=1)}, {}, "use total_rates"),
        ({"ordered": True}, {}, "ordered"),
        ({"ssl_context": ssl.create_default_context()}, {}, "SSL_CERT_FILE"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    batch: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PredictorConfig(BatchConfig("wss://localhost", **batch), **settings)


def test_the_configuration_can_be_pickled_and_shows_no_secret() -> None:
    batch = BatchConfig("ws://localhost?key=s3cr3t", headers={"Authorization": "s3cr3t"})
    config = PredictorConfig(batch, total_in_flight=7, total_rates=Rates(tokens_per_minute=1))
    assert pickle.loads(pickle.dumps(config)) == config
    assert "s3cr3t" not in repr(config)
    assert PredictorConfig(batch).governor != config.governor


@on_asyncio
async def test_without_any_agent_the_call_fails_and_a_later_one_connects_anew() -> None:
    with embedded_agent(moody) as agent:
        port = agent.port
    predictor = AgentPredictor(config_of(f"ws://127.0.0.1:{port}"))
    for _ in range(2):
        with pytest.raises(ConnectError):
            await answered(predictor, text=column("hello"))
    with embedded_agent(moody, port=port), contextlib.closing(predictor):
        assert (await answered(predictor, text=column("hello")))["response"].to_pylist() == ["HELLO"]


@on_asyncio
async def test_of_a_call_that_is_left_no_further_prompt_is_asked() -> None:
    door = Door()
    with embedded_agent(door) as agent, predictor_of(config_of(agent.url, in_flight=1)) as predictor:
        groups = predictor({"text": column("fast", "slow", *("later" for _ in range(300)))})
        await anext(groups)
        await eventually(lambda: "slow" in door.seen)
        await groups.aclose()
        door.open()
        await answered(predictor, text=column("other"))
        assert door.seen[:2] == ["fast", "slow"]
        assert len(door.seen) < 100  # some prompts are read ahead


@on_asyncio
async def test_closing_tells_the_agent_and_ends_the_calls() -> None:
    with embedded_agent(Door()) as agent:
        predictor = AgentPredictor(config_of(agent.url))
        predictor.close()
        call = asyncio.create_task(answered(predictor, text=column("slow")))
        await eventually(lambda: agent.received)
        predictor.close()
        with pytest.raises(RuntimeError, match="the predictor was closed"):
            await call
        await eventually(lambda: not agent.connections)


@on_asyncio
async def test_a_predictor_that_is_dropped_closes_its_connections() -> None:
    with embedded_agent(moody) as agent:
        predictor = AgentPredictor(config_of(agent.url))
        await answered(predictor, text=column("hello"))
        assert agent.connections == 1
        del predictor
        gc.collect()
        await eventually(lambda: not agent.connections)


@on_asyncio
async def test_a_pool_can_be_closed_from_its_own_thread() -> None:
    """As the garbage collector may."""
    results: asyncio.Queue[Any] = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def open_batch(prompts: Any) -> AsyncIterator[Any]:
        async def none_ever() -> AsyncIterator[Any]:
            pool.close()
            yield await results.get()

        yield none_ever()

    with_pool = threading.Event()

    @contextlib.asynccontextmanager
    async def open_when_there(prompts: Any) -> AsyncIterator[Any]:
        with_pool.wait()
        async with open_batch(prompts) as batch:
            yield batch

    pool = Pool(open_when_there, 5)
    with_pool.set()
    await eventually(lambda: pool.failed)
    with pytest.raises(RuntimeError, match="closed"):
        pool.ask(Call([Prompt("too late")]))
    pool.close()


# The governor, as predictors find it


class Actors:
    """Stands for Ray: actors are objects of this process; the first `dying` of them are about to end."""

    def __init__(self, dying: int) -> None:
        self.dying = dying
        self.made = 0
        self.options_given: dict[str, Any] = {}
        self.actor: Any = None

    def remote(self, actor_class: type[Governor]) -> Any:
        actors = self

        class ActorClass:
            def options(self, **options: Any) -> ActorClass:
                actors.options_given = options
                return self

            def remote(self, in_flight: int | None, rates: Rates | None, on_end: Callable[[], None]) -> Any:
                actors.made += 1
                if actors.made <= 1 + actors.dying:
                    # Its end, a minute later, would be that of this process.
                    governor = actor_class(in_flight, rates, lambda: None)
                    actors.actor = Actor(governor, dead=actors.made <= actors.dying)
                return actors.actor

        class Actor:
            def __init__(self, target: Governor, *, dead: bool) -> None:
                self.target = target
                self.dead = dead

            def __getattr__(self, name: str) -> Any:
                return Method(self, name)

        class Method:
            def __init__(self, actor: Actor, name: str) -> None:
                self.actor = actor
                self.name = name

            def remote(self, *args: Any) -> asyncio.Future[Any]:
                if self.actor.dead:
                    failed = asyncio.get_running_loop().create_future()
                    failed.set_exception(ActorDiedError())
                    failed.exception()  # not every caller looks
                    return failed
                method: Callable[..., Coroutine[Any, Any, Any]] = getattr(self.actor.target, self.name)
                return asyncio.ensure_future(method(*args))

        return ActorClass()


@on_asyncio
@pytest.mark.parametrize("dying", [0, 2])
async def test_the_totals_hold_by_way_of_a_governor(monkeypatch: pytest.MonkeyPatch, dying: int) -> None:
    monkeypatch.setattr("anyagent.ray._predictor._PAUSES", (0.001, 0.001))
    actors = Actors(dying)
    monkeypatch.setattr(ray, "remote", actors.remote)
    in_flight = Crowd()
    totals: dict[str, Any] = {
        "total_in_flight": 3,
        "total_rates": Rates(requests_per_minute=60_000),
        "governor": "shared",
    }
    with (
        embedded_agent(in_flight) as agent,
        predictor_of(config_of(agent.url, **totals)) as predictor,
    ):
        rows = await answered(predictor, text=column(*"abcdefghijkl"))
    assert sorted(rows["response"].to_pylist()) == list("abcdefghijkl")
    assert in_flight.peak == 3
    assert actors.made == dying + 1
    assert actors.options_given["name"] == "shared"


@on_asyncio
async def test_one_that_leaves_gives_back_at_once_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = Actors(dying=0)
    monkeypatch.setattr(ray, "remote", actors.remote)
    for _ in range(2):
        async with _governed("shared", 1, None) as gate:
            with anyio.fail_after(SOON):
                await gate.enter()
    assert actors.made == 2
    assert not actors.actor.target._members


@on_asyncio
async def test_other_totals_than_the_governors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = Actors(dying=0)
    monkeypatch.setattr(ray, "remote", actors.remote)
    async with _governed("shared", 1, None):
        with pytest.raises(ValueError, match="must have the same totals"):
            async with _governed("shared", 2, None):
                pass
        await eventually(lambda: len(actors.actor.target._stays) == 1)


@on_asyncio
async def test_a_governor_that_cannot_be_joined_fails_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyagent.ray._predictor._PAUSES", (0.001, 0.001))
    monkeypatch.setattr(ray, "remote", Actors(dying=100).remote)
    predictor = AgentPredictor(config_of("ws://nobody.invalid", total_in_flight=3))
    with pytest.raises(ActorDiedError):
        await answered(predictor, text=column("hello"))


@on_asyncio
async def test_a_governor_that_dies_fails_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = Actors(dying=0)
    monkeypatch.setattr(ray, "remote", actors.remote)

    async def die(*_: object) -> None:
        raise ActorDiedError

    monkeypatch.setattr(Governor, "listen", die)
    with embedded_agent(Door()) as agent, pytest.raises(ActorDiedError):
        await answered(AgentPredictor(config_of(agent.url, total_in_flight=3)), text=column("slow"))


def test_the_governors_actor_can_end_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[object] = []

    class Context:
        current_actor = "this one"

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(ray, "kill", killed.append)
    end_actor()
    assert killed == ["this one"]


class Crowd:
    """A handler that counts how many prompts it has at once."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    async def __call__(self, message: IM.UserMessage, reply: AgentReply) -> None:
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            await anyio.sleep(0.01)
        finally:
            self.now -= 1
        await reply.text(message.text)


def test_without_ray_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "anyagent.ray")
    monkeypatch.delitem(sys.modules, "anyagent.ray._predictor")
    with pytest.raises(ImportError, match=re.escape("pip install 'anyagent[ray]'")):
        importlib.import_module("anyagent.ray")


def test_importing_it_does_not_start_ray() -> None:
    program = "import anyagent.ray, ray; print(ray.is_initialized())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
