"""Requests of every kind in flight on a connection that goes silent, and how long until they have failed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import anyio

from anyagent import Disconnected, Heartbeat, Timeouts, open_agent

from .measuring import SLACK, Stopwatch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyagent import Agent

__all__ = ["AGENT", "BEGUN", "FAIL_BOUND", "LEAVE_BOUND", "LOST", "Silence", "go_silent"]

AGENT: Final = "anyagent.testing.faults:late_events"
"""The handler of the agent that goes silent: it begins its answers, goes on for ever, and answers pings."""

BEGUN: Final = 20
LOST: Final = 2
"""How many requests are in flight when the connection goes silent, and how many are sent into the silence."""

_HEARTBEAT: Final = Heartbeat(interval=0.2, timeout=0.2)
_TIMEOUTS: Final = Timeouts(close=0.3)

FAIL_BOUND: Final = _HEARTBEAT.interval + _HEARTBEAT.timeout + 1
LEAVE_BOUND: Final = _TIMEOUTS.close + SLACK

_LARGE: Final = 16 * 2**20 * "x"  # more than the sockets' buffers hold


@dataclasses.dataclass
class Silence:
    """What was measured: seconds until the last request had failed, and then for leaving the block."""

    codes: list[int] = dataclasses.field(default_factory=list)
    phases: list[str] = dataclasses.field(default_factory=list)
    failed: float = 0
    left: float = 0

    def add(self, error: Disconnected) -> None:
        self.codes.append(error.code)
        self.phases.append(error.phase)


async def _stream(agent: Agent, begun: anyio.Semaphore, silence: Silence) -> None:
    try:
        async with await agent.send_message("hello") as response:
            async for _ in response:
                begun.release()
    except Disconnected as error:
        silence.add(error)


async def _ask(agent: Agent, text: str, silence: Silence) -> None:
    try:
        await agent.ask(text)
    except Disconnected as error:
        silence.add(error)


async def go_silent(url: str, cut: Callable[[], Awaitable[object]]) -> Silence:
    """Begin requests at `url`, `cut` the connection, send more, and wait until all have failed."""
    silence = Silence()
    begun = anyio.Semaphore(0)
    async with open_agent(url, heartbeat=_HEARTBEAT, timeouts=_TIMEOUTS) as agent:
        async with anyio.create_task_group() as tasks:
            for _ in range(BEGUN):
                tasks.start_soon(_stream, agent, begun, silence)
            for _ in range(BEGUN):
                await begun.acquire()
            await cut()
            stopwatch = Stopwatch()
            tasks.start_soon(_ask, agent, _LARGE, silence)
            tasks.start_soon(_ask, agent, "behind what cannot be written", silence)
        silence.failed = stopwatch.elapsed
        stopwatch = Stopwatch()
    silence.left = stopwatch.elapsed
    return silence
