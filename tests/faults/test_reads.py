"""However an agent's bytes are cut into reads, be it amid a character, the client makes the same of them."""

from __future__ import annotations

import collections
import socket
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import given, settings

from anyagent import OM, Agent, AgentError, Disconnected, Reply, open_agent

from ..properties import REPEATABLE
from .reads import CLOSE_CODE, LAST, End, Plan, plans, play
from .running import run

if TYPE_CHECKING:
    from collections.abc import Callable

PLANS = 1_000


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_thousand_drawn_plans_come_out_the_same_in_single_bytes_coalesced_and_in_between(
    backend: str, figure: Callable[[str], None]
) -> None:
    played: collections.Counter[str] = collections.Counter()

    @settings(REPEATABLE, max_examples=PLANS)
    @given(plan=plans)
    def play_one(plan: Plan) -> None:
        run(backend, Client(plan, listener).main, collect_garbage=False)
        played["drawn sizes" if len(plan.sizes) > 1 else "bytes" if plan.sizes == [1] else "as one"] += 1

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        play_one()
    assert played.total() >= PLANS
    assert min(played["bytes"], played["as one"]) >= PLANS / 20
    figure(", ".join(f"{count} in {sizes}" for sizes, count in sorted(played.items())))


class Client:
    """The client of a plan: sends the requests, and holds what comes against what the plan foretells."""

    def __init__(self, plan: Plan, listener: socket.socket) -> None:
        self._plan = plan
        self._listener = listener
        self._notices: list[str] = []
        self._last_notice = anyio.Event()

    async def main(self) -> None:
        url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}/"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(play, self._plan, self._listener)
            async with open_agent(url, heartbeat=None, on_notice=self._notice) as agent:
                async with anyio.create_task_group() as requests:
                    for number in range(self._plan.requests):
                        requests.start_soon(self._request, agent, number)
                assert agent.in_flight == 0
                await self._last_notice.wait()
        assert self._notices == self._plan.notices()

    def _notice(self, message: OM.ServerMessage) -> None:
        assert isinstance(message, OM.Unknown)
        self._notices.append(described(message)[1])
        if self._notices[-1] == LAST.payload:
            self._last_notice.set()

    async def _request(self, agent: Agent, number: int) -> None:
        expected = self._plan.events(number)
        response = await agent.send_message(str(number))
        async with response:
            if self._plan.collected[number]:
                texts = "".join(payload for kind, payload in expected if kind == "text")
                try:
                    reply = await response.collect()
                except (AgentError, Disconnected) as exc:
                    reply, end = exc.partial or Reply("no partial"), self._end(exc, number)
                else:
                    end = ("end", "")
                assert reply.text == texts
            else:
                events = []
                try:
                    async for event in response:
                        events.append(described(event))
                except (AgentError, Disconnected) as exc:
                    end = self._end(exc, number)
                else:
                    end = ("end", "")
                assert events == expected
            kind, payload = self._plan.end(number)
            assert end == (kind, "" if kind == "end" else payload)
            assert response.tokens_used == (7 if kind == "end" else None)

    def _end(self, exc: AgentError | Disconnected, number: int) -> End:
        if isinstance(exc, AgentError):
            return "error", str(exc.code)
        assert exc.code == (CLOSE_CODE if self._plan.ending == "close frame" else 1006)
        assert exc.phase == ("started" if self._plan.events(number) else "sent")
        return "cut", ""


def described(event: OM.AgentEvent) -> tuple[str, str]:
    match event:
        case OM.EventTextChunk(text=text):
            return "text", text
        case OM.EventReasoningChunk(text=text):
            return "reasoning", text
        case OM.EventToolCall(arguments=arguments):
            return "tool", arguments
        case OM.Unknown(type=kind):
            return "unknown", kind.removeprefix("NEW ")
        case _:
            raise AssertionError(f"a {type(event).__name__} is never yielded")
