"""Applications that use the library, each for a process of its own.

``python -m tests.acceptance.programs NAME BACKEND URL...`` runs one of them. What it has measured is all that
it prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
import psutil
import trio

from anyagent import Agent, ConnectError, Timeouts, open_agent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

__all__ = ["CLOSING", "IDLE", "IN_FLIGHT", "PER_ROUND"]

IN_FLIGHT: Final = 100
"""How many requests a program has in flight when it is interrupted, or when it cancels them."""

CLOSING: Final = Timeouts(close=1)
"""The timeouts of a program that is interrupted."""

IDLE: Final = 2.0
"""For how many seconds the use of the processor is measured."""

PER_ROUND: Final = 500
"""How many requests `ask_often` has in flight; the agent answers once it has that many prompts."""

_WARM_UP_ROUNDS: Final = 40
_ROUNDS_IN_HALF: Final = 80


# Interrupted


async def read_for_ever(agent: Agent, begun: list[str]) -> None:
    async with await agent.send_message("Count") as response:
        async for _ in response:
            begun.append(response.id)
            if len(begun) == IN_FLIGHT:
                print("all have begun", flush=True)


async def hold_on_trio(url: str) -> None:
    begun: list[str] = []
    async with open_agent(url, timeouts=CLOSING) as agent, trio.open_nursery() as nursery:
        for _ in range(IN_FLIGHT):
            nursery.start_soon(read_for_ever, agent, begun)


async def hold_on_asyncio(url: str) -> None:
    begun: list[str] = []
    async with open_agent(url, timeouts=CLOSING) as agent, asyncio.TaskGroup() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.create_task(read_for_ever(agent, begun))


async def hold_on_anyio(url: str) -> None:
    begun: list[str] = []
    async with open_agent(url, timeouts=CLOSING) as agent, anyio.create_task_group() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.start_soon(read_for_ever, agent, begun)


async def hold_until_terminated(url: str) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold_on_anyio, url)
            async for _ in signals:
                tasks.cancel_scope.cancel()


def interrupted(run: Callable[[], None]) -> int:
    """Run an application as one does that ends with the shell's exit code after a Ctrl-C."""
    code = 0
    try:
        run()
    except* KeyboardInterrupt:
        code = 130
    return code


def terminated(run: Callable[[], None]) -> int:
    run()
    return 143


# Measured


def file_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


async def connect_often(good: str, *bad: str) -> dict[str, object]:
    """A thousand connections that come about, and a thousand that do not, without garbage collection."""
    gc.disable()
    async with open_agent(good):  # so that the event loop has what it keeps
        pass
    before, refused = file_descriptors(), 0
    for number in range(1_000):
        async with open_agent(good) as agent:
            if number % 10 == 0:
                await agent.ask("hello")
        try:
            async with open_agent(bad[number % len(bad)]):
                pass
        except ConnectError:
            refused += 1
    with anyio.move_on_after(5):
        while file_descriptors() > before:  # an event loop may need some turns to close a socket
            await anyio.lowlevel.checkpoint()
    return {"before": before, "after": file_descriptors(), "refused": refused}


def resident_memory() -> int:
    gc.collect()
    with contextlib.suppress(AttributeError):  # what glibc keeps for later
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


async def ask_often(url: str) -> dict[str, object]:
    """A hundred thousand requests on one connection, asked and streamed, `PER_ROUND` at a time."""

    async def stream(agent: Agent) -> None:
        async with await agent.send_message("hello") as response:
            async for _ in response:
                pass

    async def play_round(agent: Agent) -> None:
        async with anyio.create_task_group() as tasks:
            for number in range(PER_ROUND):
                tasks.start_soon(*((agent.ask, "hello") if number % 2 else (stream, agent)))

    async with open_agent(url) as agent:
        for _ in range(_WARM_UP_ROUNDS):
            await play_round(agent)
        memory, blocks = [resident_memory()], sys.getallocatedblocks()
        for _ in range(2):
            for _ in range(_ROUNDS_IN_HALF):
                await play_round(agent)
            memory.append(resident_memory())
        return {
            "completed": agent.stats.completed,
            "grown": [after - before for before, after in itertools.pairwise(memory)],
            "blocks": sys.getallocatedblocks() - blocks,
        }


def clocks() -> tuple[float, float]:
    return time.process_time(), time.monotonic()


def since(before: tuple[float, float]) -> dict[str, object]:
    """How many seconds of the processor were used, and how many have passed."""
    used, took = (now - then for now, then in zip(clocks(), before, strict=True))
    return {"used": used, "took": took}


async def ask_all(agent: Agent, tasks: TaskGroup) -> None:
    for _ in range(IN_FLIGHT):
        tasks.start_soon(agent.ask, "hello")
    while agent.in_flight < IN_FLIGHT:
        await anyio.lowlevel.checkpoint()


async def rest_after_cancels(url: str) -> dict[str, object]:
    """Requests are cancelled, and nothing else happens on a connection that stays open."""
    async with open_agent(url, timeouts=Timeouts(close=0.1)) as agent:
        async with anyio.create_task_group() as tasks:
            await ask_all(agent, tasks)
            tasks.cancel_scope.cancel()
        async with await agent.send_message("hello"):
            pass
        before = clocks()
        await anyio.sleep(IDLE)
        return {**since(before), "cancelled": agent.stats.cancelled}


async def close_after_a_cancel(url: str) -> dict[str, object]:
    """The block itself is cancelled, and the agent does not answer its close."""
    with anyio.CancelScope() as scope:
        async with (
            open_agent(url, timeouts=Timeouts(close=IDLE)) as agent,
            anyio.create_task_group() as tasks,
        ):
            await ask_all(agent, tasks)
            before = clocks()
            scope.cancel()
    return {**since(before), "cancelled": agent.stats.cancelled}


MEASURED: Final[dict[str, Callable[..., Awaitable[dict[str, Any]]]]] = {
    program.__name__: program
    for program in (connect_often, ask_often, rest_after_cancels, close_after_a_cancel)
}


def main(name: str, backend: str, url: str, *more: str) -> int:
    match name, backend:
        case "interrupted", "trio.run":
            return interrupted(lambda: trio.run(hold_on_trio, url))
        case "interrupted", "asyncio.run":
            return interrupted(lambda: asyncio.run(hold_on_asyncio(url)))
        case "interrupted", "anyio.run":
            return interrupted(lambda: anyio.run(hold_on_anyio, url))
        case "terminated", _:
            return terminated(lambda: anyio.run(hold_until_terminated, url, backend=backend))
    print(json.dumps(anyio.run(MEASURED[name], url, *more, backend=backend)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
