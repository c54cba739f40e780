from __future__ import annotations
import anyio, pytest, gc, itertools
from anyagent import OM, Backoff, ConnectError, Timeouts
from anyagent.batch import *
from .batch_agents import Answer, MemoryAgent, echo, memory_agents
from .peers import SINGLE
from .test_batch_engine import results_of, numbered, lost
pytestmark = pytest.mark.anyio

@pytest.mark.parametrize("prompt", [Prompt("hello \ud800"), Prompt("hello", metadata={"a": object()}), Prompt(5)])
@pytest.mark.parametrize("at", [0, 3])
async def test_nokey(prompt, at, monkeypatch):
    agent = MemoryAgent()
    async with memory_agents(monkeypatch, agent=agent) as urls:
        prompts = numbered(6); prompts[at:at] = [prompt]
        results = await results_of(prompts, BatchConfig(urls, in_flight=1))
        assert sorted(r.index for r in results) == list(range(7))
        assert [r.index for r in results if r.error] == [at]

async def test_begun_gate(monkeypatch):
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        results = await results_of(numbered(20), BatchConfig(urls, rates=Rates(requests_per_minute=60), timeouts=AttemptTimeouts(total=0.5)))
        assert {r.error for r in results} == {None}

async def test_ended_without_line(monkeypatch):
    async def gone(prompt, answer):
        if answer.agent.in_flight == 2:
            answer.agent.down = True
            answer.agent.lose()
        else:
            await anyio.sleep_forever()
    agent = MemoryAgent(gone)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        results = await results_of(numbered(2), BatchConfig(urls, in_flight=2))
        assert len(results) == 2

async def test_empty_down(monkeypatch):
    async with memory_agents(monkeypatch, agent=MemoryAgent(down=True)) as urls:
        assert await results_of([], BatchConfig(urls, in_flight=2)) == []

async def test_after_left(monkeypatch):
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        async with open_batch(numbered(10), BatchConfig(urls)) as batch:
            pass
        with pytest.raises(anyio.ClosedResourceError):
            with anyio.fail_after(100):
                await anext(batch)

async def test_renew_iter(monkeypatch):
    calls = []
    async def renew(cause):
        calls.append(1)
        return iter([("A", "b")]) if len(calls) == 1 else None
    agent = MemoryAgent(lost)
    async with memory_agents(monkeypatch, agent=agent) as urls:
        config = BatchConfig(urls, on_reconnect=renew, in_flight=1, retry="idempotent")
        await results_of(numbered(3), config)
    assert [list(h or ()) for h in agent.headers] == [[], [("A","b")], [("A","b")],[("A","b")]]

async def test_ordered_after_end(monkeypatch):
    async def first_last(prompt, answer):
        if prompt == "prompt 0":
            await anyio.sleep(5)
            await echo(prompt, answer)
        else:
            answer.error("no")
    async with memory_agents(monkeypatch, agent=MemoryAgent(first_last)) as urls:
        got = []
        async with open_batch(numbered(100), BatchConfig(urls, in_flight=10, ordered=True, max_errors=5)) as batch:
            with pytest.raises(TooManyErrors):
                async for r in batch:
                    got.append(r.index)
                    await anyio.sleep(3)
        assert got == sorted(got)

async def test_skip_raises(monkeypatch):
    from anyagent.batch._batch import run_engine
    n = itertools.count()
    def skip(key):
        if next(n) == 3: raise ValueError("skip")
        return False
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        got = []
        async with run_engine(numbered(10), BatchConfig(urls, in_flight=1), skip=skip) as engine:
            with pytest.raises(ValueError, match="skip"):
                while True: got.append((await engine.take()).index)
        assert sorted(got) == [0,1,2]

async def test_asyncgen_inline(monkeypatch):
    async def gen():
        for p in numbered(1000):
            await anyio.lowlevel.checkpoint()
            yield p
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        async with open_batch(gen(), BatchConfig(urls, window=10)) as batch:
            await anext(batch)
    gc.collect()
    await anyio.wait_all_tasks_blocked()
    gc.collect()

async def test_native_cancel_in_source(monkeypatch, anyio_backend_name):
    if anyio_backend_name == "trio": return
    import asyncio
    async def gen():
        t = asyncio.create_task(asyncio.sleep(1000)); t.cancel()
        await t
        yield "x"
    async with memory_agents(monkeypatch, agent=MemoryAgent()) as urls:
        async with open_batch(gen(), BatchConfig(urls, window=10)) as batch:
            with pytest.raises(asyncio.CancelledError):
                await anext(batch)
            print("AFTER")
