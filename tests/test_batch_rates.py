"""Rate limits: no more than the rate, no less, first come, first served, and cancellation costs nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent.batch import Rates
from anyagent.batch._rates import Gate, RateGate, TokenBucket

from .properties import REPEATABLE, run, settle

if TYPE_CHECKING:
    from collections.abc import Callable

Step: TypeAlias = tuple[str, int]

pytestmark = pytest.mark.anyio


class Attempts:
    """Enters a gate many times, and notes when."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.entered: list[float] = []
        self.used: list[tuple[float, int]] = []

    async def go_on(self, count: int, *, takes: float = 1, uses: Callable[[int], int | None]) -> None:
        """One attempt after the other is made; they end, and have used something, `takes` seconds later."""
        async with anyio.create_task_group() as tasks:
            for number in range(count):
                await self.gate.enter()
                self.entered.append(anyio.current_time())
                tasks.start_soon(self._attempt, takes, uses(number))

    async def _attempt(self, takes: float, uses: int | None) -> None:
        await anyio.sleep(takes)
        self.gate.leave(uses)
        self.used.append((anyio.current_time(), uses or 0))


def most_in(seconds: float, amounts: list[tuple[float, int]]) -> int:
    """The most in any stretch of so many seconds."""
    best = start = total = 0
    for moment, amount in amounts:
        total += amount
        while amounts[start][0] <= moment - seconds:
            total -= amounts[start][1]
            start += 1
        best = max(best, total)
    return best


@pytest.mark.parametrize("rate", [0.5, 6, 90, 3_000])
async def test_requests_keep_to_their_rate_from_above_and_from_below(rate: float) -> None:
    attempts = Attempts(RateGate(Rates(requests_per_minute=rate)))
    count = math.ceil(rate * 2 + 1)
    start = anyio.current_time()
    await attempts.go_on(count, uses=lambda number: 10)
    full = max(1, rate / 60)
    elapsed = attempts.entered[-1] - start
    assert elapsed * rate / 60 <= count <= elapsed * rate / 60 + full + 1e-6
    assert most_in(60, [(moment, 1) for moment in attempts.entered]) <= rate + full + 1e-6


@pytest.mark.parametrize("takes", [0, 1, 20])
@pytest.mark.parametrize("tokens", [[10], [100], [3_000], [0, 50, 1_000, 150]])
async def test_tokens_keep_to_their_rate_on_the_whole(tokens: list[int], takes: float) -> None:
    rate, mean = 6_000, sum(tokens) / len(tokens)
    attempts = Attempts(RateGate(Rates(tokens_per_minute=rate)))
    count = math.ceil(20 * rate / mean)  # 20 minutes'
    start = anyio.current_time()
    await attempts.go_on(count, takes=takes, uses=lambda number: tokens[number % len(tokens)])
    took = attempts.entered[-1] - start
    assert took * rate / 60 == pytest.approx(sum(used for _, used in attempts.used), rel=0.02)
    later = [(moment, used) for moment, used in attempts.used if moment > start + 200]
    assert most_in(60, later) <= rate + 4 * max(tokens) + 2 * rate / 60


async def test_both_rates_hold_at_once() -> None:
    attempts = Attempts(RateGate(Rates(requests_per_minute=60, tokens_per_minute=60_000)))
    start = anyio.current_time()
    await attempts.go_on(600, uses=lambda number: 100 if number < 300 else 2_000)
    halfway = attempts.entered[299] - start
    assert halfway == pytest.approx(300, rel=0.01)
    assert attempts.entered[-1] - start - halfway == pytest.approx(600, rel=0.05)


async def test_attempts_that_got_no_answer_use_requests_but_no_tokens() -> None:
    attempts = Attempts(RateGate(Rates(requests_per_minute=600, tokens_per_minute=60)))
    start = anyio.current_time()
    await attempts.go_on(100, takes=0.01, uses=lambda number: None)
    assert attempts.entered[-1] - start == pytest.approx(9, rel=0.01)


async def test_more_than_was_there_is_paid_back_before_the_next_one_enters() -> None:
    gate = RateGate(Rates(tokens_per_minute=600))
    start = anyio.current_time()
    await gate.enter()
    await gate.enter()  # 200 tokens in all: the bucket is empty
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(gate.enter)
        await anyio.sleep(1)
        gate.leave(1_100)  # 1,000 more than was thought; and as much is asked for the next one
    assert anyio.current_time() - start == pytest.approx((1_000 + 1_100) / 10)


async def test_what_is_given_back_lets_the_first_one_in_sooner() -> None:
    gate = RateGate(Rates(tokens_per_minute=60))
    start = anyio.current_time()
    await gate.enter()
    await gate.enter()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(gate.enter)
        await anyio.sleep(10)
        gate.leave(50)  # it asks for 50 now, and the bucket has 50 and 10
    assert anyio.current_time() - start == 10


async def test_a_little_that_is_given_back_shortens_the_wait() -> None:
    gate = RateGate(Rates(tokens_per_minute=60))
    start = anyio.current_time()
    await gate.enter()
    await gate.enter()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(gate.enter)
        await anyio.sleep(10)
        gate.leave(90)
    assert anyio.current_time() - start == pytest.approx(80)


async def test_who_comes_first_enters_first() -> None:
    gate = RateGate(Rates(requests_per_minute=60))
    order: list[int] = []

    async def enter(number: int) -> None:
        await anyio.sleep(number / 1_000)
        await gate.enter()
        order.append(number)

    async with anyio.create_task_group() as tasks:
        for number in reversed(range(50)):
            tasks.start_soon(enter, number)
    assert order == list(range(50))


async def test_where_nobody_waits_and_tokens_are_there_entering_takes_no_time_but_is_a_checkpoint() -> None:
    gate = RateGate(Rates(requests_per_minute=6_000))
    seen: list[str] = []

    async def other() -> None:
        seen.append("another task")

    start = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        for _ in range(99):
            await gate.enter()
        assert seen == ["another task"]
    assert anyio.current_time() == start


async def test_without_rates_everyone_enters_at_once() -> None:
    attempts = Attempts(RateGate(Rates()))
    start = anyio.current_time()
    await attempts.go_on(1_000, takes=0, uses=lambda number: 10**9)
    assert attempts.entered == [start] * 1_000


async def test_one_that_is_cancelled_as_it_enters_takes_nothing() -> None:
    gate = RateGate(Rates(requests_per_minute=1, tokens_per_minute=60))
    start = anyio.current_time()
    for _ in range(100):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await gate.enter()
    await gate.enter()
    assert anyio.current_time() == start


async def test_one_that_is_cancelled_while_it_waits_leaves_its_place_to_the_next() -> None:
    gate = RateGate(Rates(tokens_per_minute=60))
    await gate.enter()
    await gate.enter()
    scopes = [anyio.CancelScope() for _ in range(3)]
    entered: list[int] = []

    async def enter(number: int) -> None:
        with scopes[number]:
            await gate.enter()
            entered.append(number)

    async with anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(enter, number)
            await settle()
        await anyio.sleep(1)
        scopes[0].cancel()
        gate.leave(None)  # enough for one
        await settle()
        assert entered == [1]
        gate.leave(None)
        await settle()
        assert entered == [1, 2]


def test_a_bucket_is_full_at_first_and_never_more_than_full() -> None:
    bucket = TokenBucket(10, 30)
    bucket.take(30, 100)
    assert bucket.ready_at(1) == pytest.approx(100.1)
    bucket.take(30, 1_000)
    assert bucket.ready_at(0) == 1_000
    bucket.take(50, 1_000)
    assert bucket.ready_at(30) == 1_008
    bucket.take(-20, 1_000)
    assert bucket.ready_at(30) == 1_006


_steps: Final[st.SearchStrategy[Step]] = st.tuples(
    st.sampled_from(["enter", "enter", "enter", "cancel", "cancel", "leave", "fail", "wait"]),
    st.integers(0, 30),
)


class Player:
    """Carries out steps on a gate, and remembers who waits, in order, and who is in."""

    def __init__(self, gate: RateGate) -> None:
        self.gate = gate
        self.waiting: dict[int, anyio.CancelScope] = {}
        self.inside = 0
        self.entered: list[tuple[float, int]] = []
        self._came = 0
        self._last = -1

    async def enter(self) -> None:
        number = self._came
        self._came += 1
        with anyio.CancelScope() as scope:
            self.waiting[number] = scope
            try:
                await self.gate.enter()
            finally:
                del self.waiting[number]
            self.inside += 1
            self.entered.append((anyio.current_time(), 1))
            self._last = max(self._last, number)

    async def play(self, plan: list[list[Step]]) -> None:
        async with anyio.create_task_group() as tasks:
            for steps in plan:  # those of one list happen before anyone can react
                for name, number in steps:
                    match name:
                        case "enter":
                            tasks.start_soon(self.enter)
                        case "cancel" if self.waiting:
                            list(self.waiting.values())[number % len(self.waiting)].cancel()
                        case "leave" | "fail" if self.inside:
                            self.inside -= 1
                            self.gate.leave(number * 10 if name == "leave" else None)
                        case "wait":
                            await anyio.sleep(number / 10)
                await settle()
                assert all(number > self._last for number in self.waiting)
            await anyio.sleep(80_000)  # enough for everyone
            assert not self.waiting


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(REPEATABLE, max_examples=150)
@given(
    st.sampled_from([Rates(requests_per_minute=20), Rates(requests_per_minute=120, tokens_per_minute=3_000)]),
    st.lists(st.lists(_steps, min_size=1, max_size=5), max_size=25),
)
def test_whoever_is_cancelled_whenever_no_one_is_forgotten_and_nothing_is_lost(
    backend: str, rates: Rates, plan: list[list[Step]]
) -> None:
    async def play() -> None:
        gate = RateGate(rates)
        player = Player(gate)
        await player.play(plan)
        assert rates.requests_per_minute is not None
        full = max(1, rates.requests_per_minute / 60)
        assert most_in(60, player.entered) <= rates.requests_per_minute + full + 1e-6
        while player.inside:
            player.inside -= 1
            gate.leave(0)
        await anyio.sleep(80_000)
        start = anyio.current_time()
        for _ in range(math.floor(full)):  # all of it is there again
            await gate.enter()
        assert anyio.current_time() == pytest.approx(start, abs=1e-6)
        await gate.enter()
        assert anyio.current_time() > start + 0.1  # and no more

    run(backend, play)
