"""Agents in memory, one for each connection that a client makes, and tasks that ask them."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from anyagent import IM, OM, Agent, AnyAgentError, Backoff, ConnectError, Heartbeat, Limits, Timeouts
from anyagent._open import run_agent
from anyagent.testing import MemoryPeer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from anyio.abc import TaskGroup

    from anyagent._transports import Transport

__all__ = ["LOST", "NATIVE", "SINGLE", "Asking", "Peers", "answer", "ask", "prompts", "until"]

NATIVE = OM.Status("ready", ("ids", "cancel"))
SINGLE = OM.Status("ready")
LOST = 1006
"""The close code of a connection that ended without a close frame."""


async def until(condition: Callable[[], object]) -> None:
    """Let virtual time pass until `condition` holds, and everything happen that follows."""
    while not condition():  # noqa: ASYNC110 - in virtual time
        await anyio.sleep(1)
    await anyio.wait_all_tasks_blocked()


class Peers:
    """What a client connects to.

    * `made`: the peers, in the order in which the client connected to them.
    * `attempts`: when it tried to, in seconds of `anyio.current_time`.
    * `down`: whether it is refused.
    * `status`: what each peer begins with; with ``None`` it says nothing.
    """

    def __init__(self, status: OM.Status | None = NATIVE) -> None:
        self.made: list[MemoryPeer] = []
        self.attempts: list[float] = []
        self.down = False
        self.status = status

    @property
    def newest(self) -> MemoryPeer:
        return self.made[-1]

    async def connect(self, task_group: TaskGroup) -> Transport:
        await anyio.lowlevel.checkpoint()
        self.attempts.append(anyio.current_time())
        if self.down:
            raise ConnectError("nobody is there")
        peer = MemoryPeer()
        self.made.append(peer)
        if self.status is not None:
            peer.send(self.status)
        return await peer.connect(task_group)

    async def connected(self, count: int) -> MemoryPeer:
        """Wait until the client has connected `count` times; the newest peer."""
        await until(lambda: len(self.made) >= count)
        return self.made[count - 1]

    @asynccontextmanager
    async def agent(
        self,
        *,
        reconnect: Backoff | None = Backoff(),  # noqa: B008 - immutable
        connections: int = 1,
        max_age: float | None = None,
        limits: Limits = Limits(),  # noqa: B008
        timeouts: Timeouts = Timeouts(),  # noqa: B008
        heartbeat: Heartbeat | None = None,
        on_notice: Callable[[OM.ServerMessage], object] | None = None,
        renew: Callable[[AnyAgentError | None], Awaitable[None]] | None = None,
    ) -> AsyncIterator[Agent]:
        """A client of these peers; its settings are those of `open_pool`."""

        try:
            async with run_agent(
                self.connect,
                dialect=None,
                limits=limits,
                timeouts=timeouts,
                heartbeat=heartbeat,
                reconnect=reconnect,
                renew=renew,
                on_notice=on_notice,
                connections=connections,
                max_age=max_age,
            ) as agent:
                yield agent
        finally:
            for peer in self.made:
                peer.end()


class Asking:
    """A task that asks, and what came of it."""

    def __init__(self, agent: Agent, prompt: str = "hello") -> None:
        self.text: str | None = None
        self.error: AnyAgentError | None = None
        self.done = False
        self.scope = anyio.CancelScope()
        self._agent = agent
        self._prompt = prompt

    async def run(self) -> None:
        with self.scope:
            try:
                self.text = (await self._agent.ask(self._prompt)).text
            except AnyAgentError as exc:
                self.error = exc
        self.done = True


async def ask(tasks: TaskGroup, agent: Agent, prompt: str = "hello") -> Asking:
    asking = Asking(agent, prompt)
    tasks.start_soon(asking.run)
    await anyio.wait_all_tasks_blocked()
    return asking


async def answer(peer: MemoryPeer, text: str = "answer") -> str:
    """Answer the next message to `peer`; its prompt."""
    message = await peer.receive()
    assert isinstance(message, IM.UserMessage)
    peer.send(OM.EventTextChunk(text, id=message.id), OM.EventEnd(1, id=message.id))
    await anyio.wait_all_tasks_blocked()
    return message.text


def prompts(peer: MemoryPeer) -> list[str]:
    """The prompts that have reached `peer` and were not received yet."""
    found: list[str] = []
    while True:
        try:
            message = peer.receive_nowait()
        except (anyio.WouldBlock, anyio.EndOfStream):
            return found
        if isinstance(message, IM.UserMessage):
            found.append(message.text)
