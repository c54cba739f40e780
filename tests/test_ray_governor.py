"""The totals of a cluster: never exceeded, shared out, given back. Without Ray, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import threading
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyagent.batch import Rates
from anyagent.ray._gate import GovernedGate
from anyagent.ray._governor import UNLIMITED, Governor, Told, shares

from .clocks import JumpingLoop
from .properties import REPEATABLE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize(
    "anyio_backend", ["asyncio"], indirect=True
)  # Ray's actors know no other

GRACE = 1.0


class Remote:
    """A governor over a network: every message takes its time, and one may overtake another.

    Without `chance` they take none.
    """

    def __init__(self, governor: Governor, member: str, chance: random.Random | None = None) -> None:
        self.governor = governor
        self.member = member
        self.chance = chance
        self.calls = 0

    async def _travel(self) -> None:
        self.calls += 1
        if self.chance is not None:
            await asyncio.sleep(self.chance.uniform(0, 0.01))

    async def tell(self, number: int, returned: int, wanted: int, ended: Sequence[int | None], /) -> None:
        await self._travel()
        await self.governor.tell(self.member, number, returned, wanted, ended)
        await self._travel()

    async def listen(self, version: int, /) -> Told:
        await self._travel()
        told = await self.governor.listen(self.member, version)
        await self._travel()
        return told

    async def take(self, wanted: int, /) -> int:
        await self._travel()
        count = await self.governor.take(self.member, wanted)
        await self._travel()
        return count


class Cluster:
    """Members of a governor that answer prompts, and what the agent sees of them."""

    def __init__(self, in_flight: int | None = None, rates: Rates | None = None, *, seed: int = 0) -> None:
        self.totals = (in_flight, rates)
        self.governor = Governor(in_flight, rates, lambda: None, grace=GRACE)
        self.chance = random.Random(seed)
        self.in_flight: dict[str, int] = {}
        self.peak = 0
        self.begun: list[float] = []  # when
        self.done: dict[str, int] = {}
        self.remotes: dict[str, Remote] = {}
        self.scopes: dict[str, anyio.CancelScope] = {}
        self.presences: dict[str, asyncio.Future[None]] = {}

    async def member(
        self, name: str, prompts: int, at_once: int, *, takes: float = 0.1, tokens: int | None = 5
    ) -> None:
        """Answers `prompts`, `at_once` of them, and leaves."""
        remote = self.remotes[name] = Remote(self.governor, name, self.chance)
        presence = self.presences[name] = asyncio.get_running_loop().create_future()
        gate = GovernedGate(remote, rated=self.totals[1] is not None)
        self.in_flight[name] = self.done[name] = 0
        left = prompts

        async def work() -> None:
            nonlocal left
            while left:
                left -= 1
                await gate.enter()
                self.in_flight[name] += 1
                self.peak = max(self.peak, sum(self.in_flight.values()))
                self.begun.append(anyio.current_time())
                await asyncio.sleep(self.chance.uniform(0, 2 * takes))
                self.in_flight[name] -= 1
                self.done[name] += 1
                gate.leave(tokens)

        with anyio.CancelScope() as scope:
            self.scopes[name] = scope
            await self.governor.join(name, *self.totals, [presence])
            async with anyio.create_task_group() as services:
                services.start_soon(gate.run)
                async with anyio.create_task_group() as workers:
                    for _ in range(at_once):
                        workers.start_soon(work)
                services.cancel_scope.cancel()
            await self.governor.leave(name)
        if scope.cancelled_caught:
            await self._die(name)

    async def _die(self, name: str) -> None:
        """The others learn of it after a while, and the agent, of what was in flight, up to a grace later."""
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(self.chance.uniform(0, 2))
            self.presences[name].set_exception(OSError("died"))
            await asyncio.sleep(self.chance.uniform(0, GRACE * 0.99))
            self.in_flight[name] = 0


async def at(time: float, function: Callable[..., Awaitable[None]], *args: object) -> None:
    await anyio.sleep(time)
    await function(*args)


@pytest.mark.parametrize(
    ("permits", "wanted", "expected"),
    [
        (10, {}, {}),
        (10, {"a": 3, "b": 3}, {"a": 5, "b": 5}),
        (10, {"a": 2, "b": 100}, {"a": 2, "b": 8}),
        (10, {"a": 100, "b": 100, "c": 1}, {"c": 1, "a": 4, "b": 5}),
        (2, {"a": 9, "b": 9, "c": 9}, {"a": 0, "b": 1, "c": 1}),
        (10, {"a": 0}, {"a": 10}),
    ],
)
def test_permits_are_shared_by_what_is_wanted(
    permits: int, wanted: dict[str, int], expected: dict[str, int]
) -> None:
    assert shares(permits, wanted) == expected


@on_asyncio
async def test_the_total_is_used_and_not_exceeded_with_few_calls() -> None:
    cluster = Cluster(in_flight=12)
    async with anyio.create_task_group() as members:
        for name in "abc":
            members.start_soon(cluster.member, name, 400, 50)
    assert cluster.done == dict.fromkeys("abc", 400)
    assert cluster.peak == 12
    assert anyio.current_time() < 1.25 * (3 * 400 * 0.1 / 12)
    assert sum(remote.calls for remote in cluster.remotes.values()) < 3 * 400 * 2


@on_asyncio
async def test_one_that_comes_late_gets_its_share_of_what_another_one_has() -> None:
    cluster = Cluster(in_flight=10)
    async with anyio.create_task_group() as members:
        members.start_soon(cluster.member, "early", 2_000, 50)
        await anyio.sleep(1)
        assert cluster.in_flight == {"early": 10}
        members.start_soon(cluster.member, "late", 2_000, 50)
        await anyio.sleep(1)
        assert cluster.in_flight == {"early": 5, "late": 5}
        for scope in cluster.scopes.values():
            scope.cancel()


@on_asyncio
async def test_what_one_cannot_use_another_one_gets() -> None:
    cluster = Cluster(in_flight=10)
    async with anyio.create_task_group() as members:
        members.start_soon(cluster.member, "small", 2_000, 2)
        members.start_soon(cluster.member, "large", 2_000, 50)
        await anyio.sleep(2)
        assert cluster.in_flight["large"] == 8
        for scope in cluster.scopes.values():
            scope.cancel()


@on_asyncio
async def test_what_a_dead_member_had_comes_back_when_its_connections_have_surely_ended() -> None:
    cluster = Cluster(in_flight=10)
    async with anyio.create_task_group() as members:
        members.start_soon(cluster.member, "dying", 2_000, 50)
        await anyio.sleep(1)
        members.start_soon(cluster.member, "living", 500, 50)
        await anyio.sleep(1)
        cluster.scopes["dying"].cancel()
        await anyio.sleep(4)
        assert cluster.in_flight == {"dying": 0, "living": 10}
    assert cluster.peak == 10


@REPEATABLE
@given(
    st.integers(0, 2**32),
    st.integers(1, 20),
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=6),
    st.lists(st.floats(0, 8), max_size=3),
)
def test_whoever_comes_and_dies_the_total_holds_and_all_is_done(
    seed: int,
    permits: int,
    plan: list[tuple[float, int, int]],
    deaths: list[float],
) -> None:
    async def main() -> None:
        cluster = Cluster(permits, seed=seed)

        async def die(name: str) -> None:
            if name in cluster.scopes:
                cluster.scopes[name].cancel()

        async with anyio.create_task_group() as members:
            for number, (when, prompts, at_once) in enumerate(plan):
                members.start_soon(at, when, cluster.member, str(number), prompts, at_once)
            for number, when in enumerate(deaths):
                members.start_soon(at, when, die, str(number))
        assert cluster.peak <= permits
        for number, (_, prompts, _) in enumerate(plan):
            if number >= len(deaths):
                assert cluster.done[str(number)] == prompts

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(asyncio.wait_for(main(), 10_000))


@on_asyncio
@pytest.mark.parametrize(
    "rates",
    [Rates(requests_per_minute=600), Rates(tokens_per_minute=3_000)],
    ids=["requests", "tokens"],
)
async def test_the_rates_hold_for_all_together(rates: Rates) -> None:
    cluster = Cluster(rates=rates)
    async with anyio.create_task_group() as members:
        for name in "abc":
            members.start_soon(cluster.member, name, 200, 20)
        await anyio.sleep(10)
        members.start_soon(cluster.member, "dying", 200, 20)
        await anyio.sleep(10)
        cluster.scopes["dying"].cancel()
    per_second, burst = 10, 10 + 60  # what was in flight when the tokens of an answer were not known yet
    for number, begin in enumerate(cluster.begun):
        within = sum(begin <= moment < begin + 10 for moment in cluster.begun[number:])
        assert within <= 10 * per_second + burst
    assert (
        len(cluster.begun) / per_second - 10 <= anyio.current_time() <= len(cluster.begun) / per_second + 10
    )


@on_asyncio
async def test_without_a_total_in_flight_nothing_is_held_up() -> None:
    cluster = Cluster(rates=Rates(requests_per_minute=1e9))
    async with anyio.create_task_group() as members:
        members.start_soon(cluster.member, "a", 300, 300)
    assert cluster.peak > 250
    assert shares(UNLIMITED, {"a": 1})["a"] > 10**9


@contextlib.asynccontextmanager
async def gate_of(in_flight: int | None, rates: Rates | None) -> AsyncIterator[GovernedGate]:
    governor = Governor(in_flight, rates, lambda: None)
    await governor.join("a", in_flight, rates, [asyncio.get_running_loop().create_future()])
    gate = GovernedGate(Remote(governor, "a"), rated=rates is not None)
    async with anyio.create_task_group() as services:
        services.start_soon(gate.run)
        yield gate
        services.cancel_scope.cancel()


@on_asyncio
@pytest.mark.parametrize("rates", [None, Rates(requests_per_minute=1)], ids=["permit", "rate"])
async def test_an_attempt_that_is_cancelled_at_the_gate_takes_nothing(rates: Rates | None) -> None:
    in_flight = 1 if rates is None else None
    async with gate_of(in_flight, rates) as gate:
        await gate.enter()
        with anyio.move_on_after(5) as early:
            await gate.enter()
        assert early.cancelled_caught
        gate.leave(None)
        began = anyio.current_time()
        await gate.enter()
        assert anyio.current_time() - began < 61


@on_asyncio
@pytest.mark.parametrize("rates", [None, Rates(tokens_per_minute=600)], ids=["permit", "rate"])
async def test_an_attempt_that_is_cancelled_when_it_is_its_turn_gives_that_back(rates: Rates | None) -> None:
    async with gate_of(1, rates) as gate:
        for ticks in [*range(20), *range(20)]:
            await anyio.sleep(1)  # until all is returned and told
            task = asyncio.create_task(gate.enter())
            for _ in range(ticks):
                await asyncio.sleep(0)
            if not task.done():
                task.cancel()
            (ended,) = await asyncio.gather(task, return_exceptions=True)
            if ended is None:
                gate.leave(None)

        await anyio.sleep(1)
        await gate.enter()
        task = asyncio.create_task(gate.enter())
        await anyio.sleep(1)
        gate.leave(None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await anyio.sleep(1)
        with anyio.fail_after(1):
            await gate.enter()


class Played:
    """A governor played by hand: it grants a permit, and lets attempts through when `let` says how many."""

    def __init__(self) -> None:
        self.let: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.ended: list[int | None] = []

    async def tell(self, number: int, returned: int, wanted: int, ended: Sequence[int | None], /) -> None:
        self.ended += ended

    async def listen(self, version: int, /) -> Told:
        if version:
            await asyncio.Event().wait()
        return Told(1, 1, 1)

    async def take(self, wanted: int, /) -> int:
        return await self.let


@on_asyncio
async def test_an_attempt_that_is_cancelled_when_the_rate_has_let_it_through_is_told_to_have_ended() -> None:
    governor = Played()
    gate = GovernedGate(governor, rated=True)
    async with anyio.create_task_group() as services:
        services.start_soon(gate.run)
        task = asyncio.create_task(gate.enter())
        await anyio.sleep(1)
        governor.let.set_result(1)
        while gate._for_rate:  # noqa: ASYNC110 - tick by tick
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await anyio.sleep(1)
        assert governor.ended == [None]
        services.cancel_scope.cancel()


@on_asyncio
async def test_those_that_share_a_governor_must_agree_on_the_totals() -> None:
    governor = Governor(5, None, lambda: None)
    with pytest.raises(ValueError, match="the same totals"):
        await governor.join("a", 6, None, [])


@on_asyncio
async def test_what_arrives_twice_counts_once() -> None:
    governor = Governor(5, None, lambda: None)
    for _ in range(2):
        await governor.join("a", 5, None, [asyncio.get_running_loop().create_future()])
    await governor.tell("a", 1, 0, 3, [])
    await governor.tell("a", 2, 2, 3, [])
    told = await governor.listen("a", 0)
    await governor.tell("a", 1, 0, 100, [])
    assert await governor.listen("a", told.version - 1) == told
    await governor.tell("a", 2, 0, 100, [None])
    assert governor._members["a"].held == 3


@on_asyncio
async def test_one_that_was_taken_for_dead_is_told_so() -> None:
    rates = Rates(tokens_per_minute=600)
    governor = Governor(5, rates, lambda: None, grace=GRACE)
    presence = asyncio.get_running_loop().create_future()
    await governor.join("a", 5, rates, [presence])
    assert await governor.take("a", 9) == 2
    calls: list[Callable[[], Awaitable[object]]] = [
        functools.partial(governor.listen, "a", 0),
        functools.partial(governor.take, "a", 1),
    ]
    waiting = [asyncio.ensure_future(call()) for call in calls]
    await asyncio.sleep(0)
    presence.set_exception(OSError("no longer there"))
    _, taken = await asyncio.gather(*waiting)
    assert taken == 0
    calls.append(functools.partial(governor.tell, "a", 1, 0, 1, []))
    for call in calls:
        with pytest.raises(LookupError, match="taken for dead"):
            await call()


@on_asyncio
async def test_staying_ends_with_leaving() -> None:
    governor = Governor(5, None, lambda: None)
    stay = asyncio.ensure_future(governor.stay("a"))
    await governor.join("a", 5, None, [stay])
    await governor.leave("a")
    await stay
    await governor.leave("a")  # by now it is no member


def test_it_ends_when_nobody_has_come_and_when_the_last_one_has_gone() -> None:
    ended = threading.Event()
    Governor(5, None, ended.set, linger=0.01)
    assert ended.wait(30)

    ended = threading.Event()
    governor = Governor(5, None, ended.set, linger=1)

    async def come_and_go() -> None:
        for name in "ab":
            await governor.join(name, 5, None, [asyncio.get_running_loop().create_future()])
        assert governor._end is None
        await governor.leave("a")
        assert governor._end is None
        await governor.leave("b")

    asyncio.run(come_and_go())
    assert ended.wait(30)
