"""Whatever consumers do while connections come and go, every request ends once and nothing is left behind."""

from __future__ import annotations

import asyncio
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent import IM, OM, AnyAgentError, Limits, Timeouts

from .peers import LOST, NATIVE, SINGLE, Peers
from .properties import REPEATABLE, run, settle

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from anyagent import Agent, Response
    from anyagent.testing import MemoryPeer

Step: TypeAlias = tuple[str, int]

LAST: Final[Step] = ("", 0)
_numbers: Final = st.integers(0, 5)
_WAYS: Final = ("collect", "iterate", "break", "result", "drop", "aclose")
_steps: Final[st.SearchStrategy[Step]] = st.one_of(
    *(st.tuples(st.sampled_from(_WAYS), _numbers) for _ in range(3)),
    *(st.tuples(st.sampled_from(["say", "say", "end", "fail"]), _numbers) for _ in range(2)),
    st.tuples(st.sampled_from(["cancel", "cancel natively"]), _numbers),
    st.tuples(st.sampled_from(["close", "violate", "say farewell", "close all", "allow"]), _numbers),
    st.tuples(st.sampled_from(["block", "unblock", "refuse", "admit", "wait"]), _numbers),
    st.tuples(st.just("and at once"), _numbers),
)


class Consumer:
    """A task that asks in one of several ways, and what came of it."""

    def __init__(self, agent: Agent, prompt: str, way: str) -> None:
        self.prompt = prompt
        self.way = way
        self.outcomes: list[str] = []
        self.scope = anyio.CancelScope()
        self.task: asyncio.Task[object] | None = None
        self.cancelled_natively = False
        self._agent = agent

    async def run(self, backend: str) -> None:
        outcome = "cancelled"
        if backend == "asyncio":
            self.task = asyncio.current_task()
        try:
            with self.scope:
                outcome = await self._ask()
        except anyio.get_cancelled_exc_class():
            if not self.cancelled_natively:
                raise
        finally:
            self.outcomes.append(outcome)

    async def _ask(self) -> str:
        try:
            response = await self._agent.send_message(self.prompt)
            match self.way:
                case "collect":
                    reply = await response.collect()
                    assert set(reply.text) <= {self.prompt[-1]}
                case "drop":
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", ResourceWarning)
                        del response
                    return "left"
                case "aclose":
                    try:
                        await anyio.sleep(1)
                    finally:
                        await response.aclose()
                    return "left"
                case _:
                    return await self._iterate(response)
        except AnyAgentError:
            return "failed"
        return "completed"

    async def _iterate(self, response: Response) -> str:
        async with response:
            if self.way == "result":
                with suppress(anyio.ClosedResourceError):
                    await response.send_tool_result("1", "2")
            async for event in response:
                assert isinstance(event, OM.EventTextChunk)
                assert set(event.text) == {self.prompt[-1]}
                if self.way == "break":
                    return "left"
                await anyio.sleep(1)
        return "completed"


class Player:
    """Carries out steps on an agent and on its peers, and remembers what the peers have heard."""

    def __init__(self, agent: Agent, peers: Peers, tasks: TaskGroup, backend: str) -> None:
        self.consumers: list[Consumer] = []
        self.heard: list[str] = []
        self._agent = agent
        self._peers = peers
        self._tasks = tasks
        self._backend = backend
        self._unended: list[tuple[MemoryPeer, IM.UserMessage]] = []
        self._closed: set[MemoryPeer] = set()

    async def do(self, step: Step) -> None:
        name, number = step
        if name in _WAYS:
            self._start(name)
        elif name in ("say", "end", "fail"):
            self._answer(name, number)
        elif name in ("cancel", "cancel natively"):
            self._cancel(number, natively=name == "cancel natively")
        else:
            self._disturb(name, self._peers.made[-1 - number % len(self._peers.made)])
        if name == "wait":
            await anyio.sleep(3**number)

    def _start(self, way: str) -> None:
        number = len(self.consumers)
        consumer = Consumer(self._agent, f"{number} {chr(ord('a') + number % 26)}", way)
        self.consumers.append(consumer)
        self._tasks.start_soon(consumer.run, self._backend)

    def _answer(self, name: str, number: int) -> None:
        self.listen()
        if not self._unended:
            return
        index = number % len(self._unended)
        peer, message = self._unended[index]
        if name == "say":
            peer.send(*[OM.EventTextChunk(message.text[-1] * 10, id=message.id) for _ in range(3)])
            return
        del self._unended[index]
        peer.send(OM.EventEnd(1, id=message.id) if name == "end" else OM.Error("1", "2", id=message.id))

    def _cancel(self, number: int, *, natively: bool) -> None:
        if self.consumers:
            consumer = self.consumers[-1 - number % len(self.consumers)]
            if natively and consumer.task is not None:
                consumer.cancelled_natively = True
                consumer.task.cancel()
            else:
                consumer.scope.cancel()

    def _disturb(self, name: str, peer: MemoryPeer) -> None:
        match name:
            case "close" | "violate":
                self._lose(peer, violate=name == "violate")
            case "close all":
                for each in self._peers.made:
                    self._lose(each, violate=False)
            case "say farewell" if is_open(peer):
                peer.send(OM.GracefulDisconnect(deadline=5))
            case "allow" if is_open(peer):
                peer.send(OM.Status("ready", max_in_flight=1))
            case "block" if peer.writable.is_set():
                peer.writable = anyio.Event()
            case "unblock":
                peer.writable.set()
            case "refuse" | "admit":
                self._peers.down = name == "refuse"

    def _lose(self, peer: MemoryPeer, *, violate: bool) -> None:
        if is_open(peer) and peer not in self._closed:
            self._closed.add(peer)
            if violate:
                peer.send(b"no JSON")
            else:
                peer.close(LOST)

    def listen(self) -> None:
        for peer in self._peers.made:
            while peer._from_client.statistics().current_buffer_used:
                message = peer.receive_nowait()
                if isinstance(message, IM.UserMessage):
                    self.heard.append(message.text)
                    self._unended.append((peer, message))
        self._unended = [
            (peer, message) for peer, message in self._unended if is_open(peer) and peer not in self._closed
        ]

    async def end(self) -> None:
        """Let everything come to an end that can."""
        self._peers.down = False
        self._start("collect")
        for _ in range(100):
            for peer in self._peers.made:
                peer.writable.set()
            await settle()
            self.listen()
            while self._unended:
                self._answer("end", 0)
            await anyio.sleep(100)
            if all(consumer.outcomes for consumer in self.consumers) and not self._agent.in_flight:
                return
        raise AssertionError("a request does not end")


@pytest.mark.parametrize("status", [NATIVE, SINGLE], ids=["native", "single"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(REPEATABLE, max_examples=120)
@given(
    steps=st.lists(_steps, max_size=40),
    connections=st.integers(1, 3),
    max_age=st.none() | st.just(50),
    limits=st.builds(
        Limits,
        in_flight=st.integers(1, 4),
        response_events=st.sampled_from([1, 65_536]),
        response_bytes=st.sampled_from([100, 2**20]),
        overflow=st.sampled_from(["fail", "block"]),
    ),
    stays=st.booleans(),
)
def test_every_request_ends_once_and_nothing_is_left_behind(
    backend: str,
    status: OM.Status,
    steps: list[Step],
    connections: int,
    max_age: float | None,
    limits: Limits,
    stays: bool,
) -> None:
    async def main() -> None:
        peers = Peers(status)
        pool = peers.agent(
            connections=connections, max_age=max_age, limits=limits, timeouts=Timeouts(drain=10)
        )
        async with anyio.create_task_group() as tasks, pool as agent:
            player = Player(agent, peers, tasks, backend)
            for step, (following, _) in zip(steps, [*steps[1:], LAST][: len(steps)], strict=True):
                await player.do(step)
                if "and at once" not in (step[0], following):
                    await settle()
                    check_counts(agent, limits)
            if stays:
                await player.end()
        check_end(agent, player)
        if stays and limits.overflow == "fail":  # else a consumer may hold up the news of a lost connection
            assert player.consumers[-1].outcomes == ["completed"]

    run(backend, main)


def is_open(peer: MemoryPeer) -> bool:
    return peer._client_receives.statistics().open_receive_streams > 0


def check_counts(agent: Agent, limits: Limits) -> None:
    stats = agent.stats
    assert agent.in_flight <= limits.in_flight
    assert stats.completed + stats.failed + stats.cancelled <= stats.requests


def check_end(agent: Agent, player: Player) -> None:
    stats = agent.stats
    assert (agent.in_flight, stats.open_connections) == (0, 0)
    assert stats.completed + stats.failed + stats.cancelled == stats.requests
    assert len(player.heard) == len(set(player.heard))
    assert stats.requests >= len(player.heard)
    for consumer in player.consumers:
        assert len(consumer.outcomes) == 1
        if consumer.outcomes == ["completed"]:
            assert consumer.prompt in player.heard
