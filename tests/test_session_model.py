"""Whatever an application and an agent do to a connection, every request has one outcome: the right one."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import pytest
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent import OM, Agent, Timeouts
from anyagent.testing import MemoryPeer, memory_agent

from .clocks import JumpingLoop
from .model.exact import play
from .model.plans import WIRES, Plan, Wire, plans
from .model.races import race
from .properties import REPEATABLE, run, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

each_wire = pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
each_backend = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.fixture(autouse=True, scope="module")
def _quick_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@each_wire
@each_backend
@settings(REPEATABLE, max_examples=120)
@given(plan=plans, leave_at_once=st.booleans())
def test_the_session_does_what_its_model_does(
    backend: str, wire: Wire, plan: Plan, leave_at_once: bool
) -> None:
    async def main() -> None:
        await play(plan, wire, leave_at_once=leave_at_once)

    run(backend, main, afterwards=gc.collect)


@each_wire
@each_backend
@settings(REPEATABLE, max_examples=120)
@given(plan=plans, pauses=st.lists(st.integers(0, 3), max_size=40), leave_at_once=st.booleans())
def test_steps_that_race_give_every_request_one_outcome_and_its_own_events(
    backend: str, wire: Wire, plan: Plan, pauses: list[int], leave_at_once: bool
) -> None:
    async def main() -> None:
        await race(plan, pauses, wire, leave_at_once=leave_at_once)

    run(backend, main, afterwards=gc.collect)


@each_backend
def test_an_answer_that_ends_at_the_very_moment_of_the_drain_timeout_has_ended(backend: str) -> None:
    async def main() -> None:
        status = OM.Status("ready", ("ids",))
        async with memory_agent(status=status, timeouts=Timeouts(drain=10)) as (agent, peer):
            for _ in range(20):  # Trio runs what is ready at the same time in any order
                response = await agent.send_message("hello")
                end = OM.EventEnd(1, id=(await peer.receive()).id)
                await response.aclose()
                await settle()
                if backend == "asyncio":
                    loop = asyncio.get_running_loop()
                    assert isinstance(loop, JumpingLoop)
                    loop.call_soon(peer.send, end)
                    loop.jump(10)
                else:
                    clock = trio.lowlevel.current_clock()
                    assert isinstance(clock, trio.testing.MockClock)
                    peer.send(end)
                    clock.jump(10)
                await settle()
                assert agent.in_flight == 0
            assert await answered(agent, peer) == "fine"

    run(backend, main)


async def answered(agent: Agent, peer: MemoryPeer) -> str:
    """The text of one more request, which is answered with "fine"."""
    async with await agent.send_message("hello") as response:
        request_id = (await peer.receive()).id
        peer.send(OM.EventTextChunk("fine", id=request_id), OM.EventEnd(1, id=request_id))
        return (await response.collect()).text
