"""`run_batch`: for scripts, and for engines that call plain functions."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from anyagent import IM, ConnectError
from anyagent.batch import BatchConfig, Prompt, Result, TooManyErrors, run_batch
from anyagent.testing import AgentReply, embedded_agent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROGRAM = """
import sys
from anyagent.batch import BatchConfig, run_batch

run_batch(["one", "two"], BatchConfig(sys.argv[1]))
"""


async def moody(message: IM.UserMessage, reply: AgentReply) -> None:
    """Answers with the prompt, but for some."""
    if int(message.text) % 5 == 3:
        await reply.error("no_answer", "I do not know")
    else:
        await reply.text(message.text)
        await reply.end()


async def hang(message: IM.UserMessage, reply: AgentReply) -> None:
    await reply.text("one ")
    await reply.hang()


def check(results: list[Result]) -> None:
    assert [result.index for result in results] == list(range(20))
    for index, result in enumerate(results):
        if index % 5 == 3:
            assert result.text is None
            assert result.error is not None
            assert (result.error.type, result.error.code) == ("AgentError", "no_answer")
        else:
            assert (result.text, result.tokens_used, result.error) == (str(index), 1, None)


def test_results_are_in_the_order_of_the_prompts_and_failed_ones_are_among_them() -> None:
    with embedded_agent(moody) as server:
        check(run_batch(map(str, range(20)), BatchConfig(server.url)))
        server.wait_for_connections(0)


def test_the_prompts_may_be_asynchronous() -> None:
    async def prompts() -> AsyncIterator[Prompt]:
        for number in range(20):
            await anyio.lowlevel.checkpoint()
            yield Prompt(str(number), id=f"row {number}")

    with embedded_agent(moody) as server:
        results = run_batch(prompts(), BatchConfig(server.url, connections=2))
        check(results)
    assert [result.id for result in results] == [f"row {number}" for number in range(20)]


def test_what_ends_a_batch_is_raised() -> None:
    with embedded_agent(moody) as server:
        with pytest.raises(TooManyErrors):
            run_batch(["3"], BatchConfig(server.url, max_errors=0))
        with pytest.raises(TypeError, match="iterable of prompts"):
            run_batch("hello", BatchConfig(server.url))
        url = server.url
    with pytest.raises(ConnectError):
        run_batch(["1"], BatchConfig(url))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_where_an_event_loop_runs_there_is_a_hint(backend: str) -> None:
    async def call() -> None:
        with pytest.raises(RuntimeError, match="use open_batch"):
            run_batch(["1"], BatchConfig("ws://agent/"))

    anyio.run(call, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_thread_of_an_event_loop_may_run_a_batch(backend: str) -> None:
    async def call() -> list[Result]:
        return await anyio.to_thread.run_sync(run_batch, map(str, range(20)), BatchConfig(server.url))

    with embedded_agent(moody) as server:
        check(anyio.run(call, backend=backend))


def test_threads_may_run_batches_at_once() -> None:
    found: list[list[Result]] = []
    with embedded_agent(moody) as server:
        config = BatchConfig(server.url)
        threads = [
            threading.Thread(target=lambda: found.append(run_batch(map(str, range(20)), config)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(found) == 4
    for results in found:
        check(results)


def test_ctrl_c_ends_it_and_the_agent_is_told() -> None:
    def cancelled(count: int) -> bool:
        return len([message for message in server.received if isinstance(message, IM.Cancel)]) >= count

    with embedded_agent(hang) as server:
        command = [sys.executable, "-W", "error", "-c", PROGRAM, server.url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
            server.wait_for(lambda message: isinstance(message, IM.UserMessage) and message.text == "two")
            program.send_signal(signal.SIGINT)
            _, stderr = program.communicate(timeout=30)
        server.wait_for(lambda message: isinstance(message, IM.Cancel))
        server.wait_for_connections(0)
        assert cancelled(2)
    assert program.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert "ExceptionGroup" not in stderr
    assert "Warning" not in stderr
