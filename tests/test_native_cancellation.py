"""On asyncio a task can be cancelled with no regard to cancel scopes, at any tick, and several times."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import pytest

from anyagent import OM, Backoff

from .clocks import JumpingLoop
from .peers import LOST, Peers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from anyagent import Agent

AT_ONCE = Backoff(initial=1e-300, maximum=1e-300)


async def do_nothing(agent: Agent, peers: Peers) -> None:
    await asyncio.sleep(0)


async def reconnect(agent: Agent, peers: Peers) -> None:
    peers.made[0].close(LOST)
    while len(peers.made) < 2:  # noqa: ASYNC110 - tick by tick
        await asyncio.sleep(0)
    async with await agent.send_message("hello") as response:
        message = await peers.newest.receive()
        peers.newest.send(OM.EventEnd(1, id=message.id))
        await response.collect()
    peers.newest.send(OM.GracefulDisconnect())
    while len(peers.made) < 3:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await (await agent.send_message("left")).aclose()


async def use(body: Callable[[Agent, Peers], Awaitable[None]]) -> None:
    peers = Peers()
    async with peers.agent(reconnect=AT_ONCE) as agent:
        await body(agent, peers)


def run(main: Callable[[], Coroutine[None, None, bool]]) -> bool:
    """Run `main` and cancel what it leaves; a hang is a `RuntimeError`."""
    loop = JumpingLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        loop.call_later(1_000, loop.stop)
        return runner.run(main())


@pytest.mark.parametrize("body", [do_nothing, reconnect])
@pytest.mark.parametrize("again_after", [None, 0, 1, 2, 5, 10])
def test_cancelled_at_any_tick_once_or_twice_the_block_is_left(
    body: Callable[[Agent, Peers], Awaitable[None]], again_after: int | None
) -> None:
    async def cancel_at(tick: int) -> bool:
        task = asyncio.create_task(use(body))
        for _ in range(tick):
            await asyncio.sleep(0)
        early = task.cancel()
        if again_after is not None:
            for _ in range(again_after):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait([task])
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return early and task.cancelled()

    ticks = 0
    while run(partial(cancel_at, ticks)):
        ticks += 1
    assert 10 < ticks < 1_000


@pytest.mark.filterwarnings(
    "ignore:coroutine '.*' was never awaited:RuntimeWarning"
)  # it was cancelled before
@pytest.mark.parametrize("body", [do_nothing, reconnect])
def test_an_event_loop_that_ends_at_any_tick_comes_to_its_end(
    body: Callable[[Agent, Peers], Awaitable[None]],
) -> None:
    async def end_at(tick: int) -> bool:
        task = asyncio.create_task(use(body))
        for _ in range(tick):
            await asyncio.sleep(0)
        return not task.done()

    ticks = 0
    while run(partial(end_at, ticks)):
        ticks += 1
    assert 10 < ticks < 1_000
