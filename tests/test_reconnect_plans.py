"""Whatever happens to the connections of an agent or a pool, no prompt is written twice and none is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent import IM, OM, Disconnected, Limits, ProtocolError

from .peers import LOST, NATIVE, SINGLE, Asking, Peers
from .properties import REPEATABLE, run, settle

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from anyagent import Agent
    from anyagent.testing import MemoryPeer

Step: TypeAlias = tuple[str, int]

_numbers: Final = st.integers(0, 5)
_steps: Final[st.SearchStrategy[Step]] = st.one_of(
    *(st.tuples(st.just("ask"), _numbers) for _ in range(3)),
    st.tuples(st.sampled_from(["answer", "answer", "cancel", "close", "violate", "say farewell"]), _numbers),
    st.tuples(st.sampled_from(["block", "unblock", "refuse", "admit", "wait"]), _numbers),
)


class Player:
    """Carries out steps on an agent and on its peers, and remembers what the peers have heard."""

    def __init__(self, agent: Agent, peers: Peers, tasks: TaskGroup) -> None:
        self.askings: list[Asking] = []
        self.heard: list[str] = []
        self._agent = agent
        self._peers = peers
        self._tasks = tasks
        self._unanswered: list[tuple[MemoryPeer, IM.UserMessage]] = []
        self._ended: set[MemoryPeer] = set()

    async def do(self, step: Step) -> None:
        name, number = step
        peer = self._peers.made[-1 - number % len(self._peers.made)]
        match name:
            case "ask":
                self.ask()
            case "answer" if self._unanswered:
                self.answer(number % len(self._unanswered))
            case "cancel" if self.askings:
                self.askings[-1 - number % len(self.askings)].scope.cancel()
            case "close" if is_open(peer):
                self._ended.add(peer)
                peer.close(LOST)
            case "violate" if is_open(peer):
                self._ended.add(peer)
                peer.send(b"no JSON")
            case "say farewell" if is_open(peer):
                peer.send(OM.GracefulDisconnect())
            case "block" if peer.writable.is_set():
                peer.writable = anyio.Event()
            case "unblock":
                peer.writable.set()
            case "refuse" | "admit":
                self._peers.down = name == "refuse"
            case "wait":
                await anyio.sleep(3**number)
        await settle()
        self.listen()

    def ask(self) -> None:
        asking = Asking(self._agent, str(len(self.askings)))
        self.askings.append(asking)
        self._tasks.start_soon(asking.run)

    def answer(self, index: int) -> None:
        peer, message = self._unanswered.pop(index)
        peer.send(OM.EventTextChunk(message.text, id=message.id), OM.EventEnd(1, id=message.id))

    def listen(self) -> None:
        for peer in self._peers.made:
            while peer._from_client.statistics().current_buffer_used:
                message = peer.receive_nowait()
                if isinstance(message, IM.UserMessage):
                    self.heard.append(message.text)
                    self._unanswered.append((peer, message))
        self._unanswered = [
            (peer, message) for peer, message in self._unanswered if is_open(peer) and peer not in self._ended
        ]

    async def end(self) -> None:
        """Let everything come to an end that can."""
        self._peers.down = False
        self.ask()
        for _ in range(100):
            for peer in self._peers.made:
                peer.writable.set()
            await settle()
            self.listen()
            while self._unanswered:
                self.answer(0)
            await anyio.sleep(100)
            if all(asking.done for asking in self.askings):
                return
        raise AssertionError("a request does not end")


@pytest.mark.parametrize("status", [NATIVE, SINGLE], ids=["native", "single"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(REPEATABLE, max_examples=150)
@given(
    steps=st.lists(_steps, max_size=40),
    connections=st.integers(1, 3),
    max_age=st.none() | st.just(50),
    in_flight=st.integers(1, 4),
)
def test_no_prompt_is_written_twice_and_no_request_is_lost(
    backend: str,
    status: OM.Status,
    steps: list[Step],
    connections: int,
    max_age: float | None,
    in_flight: int,
) -> None:
    async def main() -> None:
        peers = Peers(status)
        limits = Limits(in_flight=in_flight)
        async with (
            peers.agent(connections=connections, max_age=max_age, limits=limits) as agent,
            anyio.create_task_group() as tasks,
        ):
            player = Player(agent, peers, tasks)
            for step in steps:
                await player.do(step)
                open_connections = [peer for peer in peers.made if is_open(peer)]
                assert len(open_connections) == agent.stats.open_connections
            await player.end()
            assert agent.in_flight == 0
        check(player)

    run(backend, main)


def is_open(peer: MemoryPeer) -> bool:
    return peer._client_receives.statistics().open_receive_streams > 0


def check(player: Player) -> None:
    assert len(player.heard) == len(set(player.heard))
    for prompt, asking in enumerate(player.askings):
        heard = str(prompt) in player.heard
        match asking.error:
            case Disconnected(phase=phase):
                assert phase == "sent"
            case ProtocolError():
                pass
            case None if asking.text is None:
                assert asking.scope.cancelled_caught
            case None:
                assert heard
                assert asking.text == str(prompt)
            case error:
                raise AssertionError(error)
    assert player.askings[-1].text is not None
