"""Agents in memory for batches: each behind a URL of its own, answering with a handler, in virtual time."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import anyio

from anyagent import IM, OM, ConnectError
from anyagent._open import run_agent
from anyagent.batch import _fleet
from anyagent.testing import MemoryPeer

from .peers import NATIVE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import pytest
    from anyio.abc import TaskGroup

    from anyagent import Agent
    from anyagent._transports import Transport

    Handler: TypeAlias = Callable[[str, "Answer"], Awaitable[None]]

__all__ = ["Answer", "Handler", "MemoryAgent", "echo", "memory_agents"]


class Answer:
    """The agent's side of one prompt."""

    def __init__(self, agent: MemoryAgent, peer: MemoryPeer, request_id: str | None) -> None:
        self.agent = agent
        self.peer = peer
        self.id = request_id
        self.chunks = 0

    def text(self, text: str) -> None:
        self.chunks += 1
        self.send(OM.EventTextChunk(text, id=self.id))

    def end(self, status: str = "completed") -> None:
        self.send(OM.EventEnd(self.chunks, status, id=self.id))

    def error(self, code: str | int, details: str = "no", retry_after: float | None = None) -> None:
        self.send(OM.Error(code, details, retry_after, id=self.id))

    def send(self, message: OM.ServerMessage | bytes) -> None:
        if self.peer in self.agent.peers:
            self.peer.send(message)


async def echo(prompt: str, answer: Answer) -> None:
    """Answers at once, with the prompt."""
    answer.text(prompt)
    answer.end()


class MemoryAgent:
    """An agent whose prompts are answered by `handler`, each in a task of its own.

    * `seen`: the prompts, in order; `cancelled`: those that the client told it to stop.
    * `in_flight`, `peak`: handlers at work, now and at most.
    * `connections`: how often it was connected to; `peers`: those connections that are open.
    * `down`: whether it refuses connections.
    """

    def __init__(self, handler: Handler = echo, *, status: OM.Status = NATIVE, down: bool = False) -> None:
        self.handler = handler
        self.status = status
        self.down = down
        self.seen: list[str] = []
        self.cancelled: list[str] = []
        self.in_flight = 0
        self.peak = 0
        self.connections = 0
        self.headers: list[object] = []
        self.peers: list[MemoryPeer] = []
        self.all_peers: list[MemoryPeer] = []
        self.tasks: TaskGroup

    async def connect(self, task_group: TaskGroup) -> Transport:
        await anyio.lowlevel.checkpoint()
        if self.down:
            raise ConnectError("nobody is there")
        self.connections += 1
        peer = MemoryPeer()
        peer.send(self.status)
        self.peers.append(peer)
        self.all_peers.append(peer)
        self.tasks.start_soon(self._serve, peer)
        return await peer.connect(task_group)

    def lose(self, code: int = 1006) -> None:
        """End all connections."""
        peers, self.peers = self.peers, []
        for peer in peers:
            peer.close(code)

    async def _serve(self, peer: MemoryPeer) -> None:
        scopes: dict[str | None, tuple[str, anyio.CancelScope]] = {}

        async def work(message: IM.UserMessage, scope: anyio.CancelScope) -> None:
            self.seen.append(message.text)
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            try:
                with scope:
                    await self.handler(message.text, Answer(self, peer, message.id))
            finally:
                scopes.pop(message.id, None)
                self.in_flight -= 1

        async with anyio.create_task_group() as tasks:
            while True:
                try:
                    message = await peer.receive()
                except anyio.EndOfStream:
                    break
                if isinstance(message, IM.UserMessage):
                    scope = anyio.CancelScope()
                    scopes[message.id] = message.text, scope
                    tasks.start_soon(work, message, scope)
                elif isinstance(message, IM.Cancel) and message.id in scopes:
                    text, scope = scopes[message.id]
                    self.cancelled.append(text)
                    scope.cancel()
            if peer in self.peers:
                self.peers.remove(peer)
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def memory_agents(
    monkeypatch: pytest.MonkeyPatch, **agents: MemoryAgent
) -> AsyncIterator[tuple[str, ...]]:
    """Let a batch reach `agents`, each under the URL ``ws://NAME/``; gives the URLs."""
    urls = {f"ws://{name}/": agent for name, agent in agents.items()}

    @asynccontextmanager
    async def open_agent(
        url: str, *, headers: object, ssl_context: object, **options: object
    ) -> AsyncIterator[Agent]:
        agent = urls[url]
        agent.headers.append(headers)
        options["heartbeat"] = None
        async with run_agent(agent.connect, on_notice=None, **options) as opened:  # type: ignore[arg-type]  # passed on as they are
            yield opened

    monkeypatch.setattr(_fleet, "open_agent", open_agent)
    try:
        async with anyio.create_task_group() as tasks:
            for agent in agents.values():
                agent.tasks = tasks
            yield tuple(urls)
            tasks.cancel_scope.cancel()
    finally:
        for agent in agents.values():
            for peer in agent.all_peers:
                peer.end()
