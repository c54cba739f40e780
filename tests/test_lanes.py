"""Lanes are handed out first come, first served, and none is ever lost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent import IM, AgentStats, Limits
from anyagent._dispatcher import Dispatcher
from anyagent._lanes import Lanes
from anyagent._transports import waker_factory

from .properties import REPEATABLE, run, settle

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup

    from anyagent._request import Request


class Closed(Exception):
    pass


class Queue:
    """A dispatcher with one connection that does nothing with its lanes."""

    def __init__(self, names: tuple[str, ...] | None, limit: int) -> None:
        self.dispatcher = Dispatcher([self], Limits(), AgentStats(), waker_factory(), ("memory", 0))
        self._lanes = Lanes(names, limit)
        self._holders: dict[str, Request] = {}

    @property
    def ready(self) -> bool:
        return self._lanes.free

    @property
    def in_flight(self) -> int:
        return self._lanes.in_use

    @property
    def waiting(self) -> int:
        return self.dispatcher.waiting

    def start(self, request: Request) -> None:
        lane = self._lanes.take()
        self._holders[lane] = request
        request.assign(self, lane)

    def claim(self, request: Request) -> None:
        request.claimed = True

    def leave(self, request: Request) -> None:
        self.release(request.lane)

    async def send_tool_result(self, request: Request, call_id: str, output: str) -> None:
        raise NotImplementedError

    async def acquire(self) -> str:
        return (await self.dispatcher.open_request(IM.UserMessage(text="hello"))).lane

    def release(self, lane: str) -> None:
        del self._holders[lane]
        self._lanes.release(lane)
        self.dispatcher.serve()

    def resize(self, limit: int) -> None:
        self._lanes.resize(limit)
        self.dispatcher.serve()

    def close(self, error: Callable[[], Exception]) -> None:
        self.dispatcher.close(error)


class Caller:
    """A task that acquires a lane."""

    def __init__(self, lanes: Queue, number: int = 0) -> None:
        self.number = number
        self.lane: str | None = None
        self.error: Closed | None = None
        self.done = False
        self.scope = anyio.CancelScope()
        self._lanes = lanes

    async def run(self) -> None:
        try:
            with self.scope:
                self.lane = await self._lanes.acquire()
        except Closed as exc:
            self.error = exc
        finally:
            self.done = True

    def release(self) -> None:
        lane, self.lane = self.lane, None
        if lane is not None:
            self._lanes.release(lane)


async def start(tasks: TaskGroup, lanes: Queue, count: int) -> list[Caller]:
    callers = [Caller(lanes, number) for number in range(count)]
    for caller in callers:
        tasks.start_soon(caller.run)
        await anyio.wait_all_tasks_blocked()
    return callers


@pytest.mark.anyio
async def test_lanes_without_names_are_new_every_time() -> None:
    lanes = Queue(None, 2)
    assert [await lanes.acquire(), await lanes.acquire()] == ["1", "2"]
    lanes.release("1")
    assert await lanes.acquire() == "3"
    assert lanes.in_flight == 2


@pytest.mark.anyio
async def test_named_lanes_are_used_again_after_their_release_only() -> None:
    lanes = Queue(("A", "B", "C"), 10)
    assert [await lanes.acquire() for _ in range(3)] == ["A", "B", "C"]
    with anyio.move_on_after(1) as scope:
        await lanes.acquire()
    assert scope.cancelled_caught
    lanes.release("B")
    assert await lanes.acquire() == "B"


@pytest.mark.anyio
async def test_a_limit_below_the_number_of_names_holds() -> None:
    lanes = Queue(("A", "B", "C"), 1)
    async with anyio.create_task_group() as tasks:
        first, second = await start(tasks, lanes, 2)
        assert (first.lane, second.lane, lanes.in_flight, lanes.waiting) == ("A", None, 1, 1)
        first.release()


@pytest.mark.anyio
async def test_waiters_are_served_in_the_order_in_which_they_came() -> None:
    lanes = Queue(None, 1)
    async with anyio.create_task_group() as tasks:
        callers = await start(tasks, lanes, 20)
        assert lanes.waiting == 19
        for served, caller in enumerate(callers, 1):
            assert [each.lane for each in callers if each.lane] == [str(served)]
            assert caller.lane == str(served)
            caller.release()
            await anyio.wait_all_tasks_blocked()
    assert (lanes.in_flight, lanes.waiting) == (0, 0)


@pytest.mark.anyio
async def test_a_newcomer_cannot_snatch_the_lane_of_a_waiter_that_has_not_woken_up_yet() -> None:
    lanes = Queue(None, 1)
    async with anyio.create_task_group() as tasks:
        first, waiter = await start(tasks, lanes, 2)
        first.release()
        newcomer = Caller(lanes)
        tasks.start_soon(newcomer.run)
        await anyio.wait_all_tasks_blocked()
        assert (waiter.lane, newcomer.lane) == ("2", None)
        waiter.release()
        await anyio.wait_all_tasks_blocked()
        assert newcomer.lane == "3"


@pytest.mark.anyio
async def test_a_cancelled_waiter_holds_nothing_and_delays_nobody() -> None:
    lanes = Queue(None, 1)
    async with anyio.create_task_group() as tasks:
        first, second, third = await start(tasks, lanes, 3)
        second.scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert (second.done, second.lane, lanes.waiting, lanes.in_flight) == (True, None, 1, 1)
        first.release()
        await anyio.wait_all_tasks_blocked()
        assert third.lane == "2"


@pytest.mark.anyio
async def test_a_lane_is_not_lost_if_its_new_holder_is_cancelled_at_the_moment_of_the_hand_over() -> None:
    for cancel_first in (False, True):
        lanes = Queue(("A",), 1)
        async with anyio.create_task_group() as tasks:
            first, second, third = await start(tasks, lanes, 3)
            steps: list[Callable[[], None]] = [first.release, second.scope.cancel]
            for step in reversed(steps) if cancel_first else steps:
                step()
            await anyio.wait_all_tasks_blocked()
            second.release()  # it may have got the lane before the cancellation reached it
            await anyio.wait_all_tasks_blocked()
            assert (third.lane, lanes.in_flight) == ("A", 1)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_lane_is_not_lost_if_asyncio_cancels_the_task_of_its_new_holder() -> None:
    for cancel_first in (False, True):
        lanes = Queue(("A",), 1)
        callers = [Caller(lanes) for _ in range(3)]
        tasks = [asyncio.create_task(caller.run()) for caller in callers]
        await anyio.wait_all_tasks_blocked()
        steps: list[Callable[[], object]] = [callers[0].release, tasks[1].cancel]
        for step in reversed(steps) if cancel_first else steps:
            step()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        await tasks[2]
        assert (callers[1].lane, callers[2].lane, lanes.in_flight) == (None, "A", 1)


@pytest.mark.anyio
async def test_acquiring_in_a_cancelled_scope_takes_nothing_even_if_a_lane_is_free() -> None:
    lanes = Queue(None, 1)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await lanes.acquire()
    assert scope.cancelled_caught
    assert (lanes.in_flight, lanes.waiting) == (0, 0)


@pytest.mark.anyio
async def test_a_larger_limit_serves_those_who_wait_and_a_smaller_one_holds_for_those_who_come() -> None:
    lanes = Queue(None, 1)
    async with anyio.create_task_group() as tasks:
        callers = await start(tasks, lanes, 5)
        lanes.resize(3)
        await anyio.wait_all_tasks_blocked()
        assert [caller.lane for caller in callers] == ["1", "2", "3", None, None]
        lanes.resize(2)
        callers[0].release()
        await anyio.wait_all_tasks_blocked()
        assert [caller.lane for caller in callers] == [None, "2", "3", None, None]
        callers[1].release()
        await anyio.wait_all_tasks_blocked()
        assert [caller.lane for caller in callers] == [None, None, "3", "4", None]
        callers[2].release()


@pytest.mark.anyio
async def test_closing_wakes_every_waiter_with_an_exception_of_its_own() -> None:
    lanes = Queue(None, 1)
    async with anyio.create_task_group() as tasks:
        callers = await start(tasks, lanes, 4)
        lanes.close(Closed)
        await anyio.wait_all_tasks_blocked()
        newcomer = Caller(lanes)
        await newcomer.run()
    errors = [caller.error for caller in (*callers[1:], newcomer)]
    assert None not in errors
    assert len(set(map(id, errors))) == 4
    callers[0].release()
    assert (lanes.in_flight, lanes.waiting) == (0, 0)


@pytest.mark.anyio
async def test_the_first_close_counts() -> None:
    lanes = Queue(None, 1)
    lanes.close(Closed)
    lanes.close(ValueError)
    with pytest.raises(Closed):
        await lanes.acquire()


Step: TypeAlias = tuple[str, int]
STEPS: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("acquire"), st.just(0)),
    st.tuples(st.just("release"), st.integers(0, 5)),
    st.tuples(st.just("cancel"), st.integers(0, 5)),
    st.tuples(st.just("cancel task"), st.integers(0, 5)),
    st.tuples(st.just("release"), st.just(0)),
    st.tuples(st.just("acquire"), st.just(1)),
    st.tuples(st.just("resize"), st.integers(1, 4)),
    st.tuples(st.just("pause"), st.just(0)),
)


class Play:
    """Carries out steps that race with each other, and checks after each what can be seen at once."""

    def __init__(self, backend: str, names: tuple[str, ...] | None, limit: int) -> None:
        self.lanes = Queue(names, limit)
        self.names = names
        self.limit = limit
        self.callers: list[Caller] = []
        self._on_asyncio = backend == "asyncio"
        self._tasks: list[asyncio.Task[None]] = []

    async def do(self, step: Step, task_group: TaskGroup) -> None:
        before = self.lanes.in_flight
        match step:
            case ("acquire", _):
                caller = Caller(self.lanes, len(self.callers))
                self.callers.append(caller)
                if self._on_asyncio:
                    self._tasks.append(asyncio.create_task(caller.run()))
                else:
                    task_group.start_soon(caller.run)
                await settle()
            case ("release", index):
                holders = [caller for caller in self.callers if caller.lane is not None]
                if holders:
                    holders[index % len(holders)].release()
            case ("cancel" | "cancel task" as how, index):
                waiters = [caller for caller in self.callers if not caller.done]
                if waiters and how == "cancel task" and self._on_asyncio:
                    self._tasks[waiters[index % len(waiters)].number].cancel()
                elif waiters:
                    waiters[index % len(waiters)].scope.cancel()
            case ("resize", limit):
                self.limit = limit
                self.lanes.resize(limit)
            case _:
                await settle()
        held = [caller.lane for caller in self.callers if caller.lane is not None]
        assert len(held) == len(set(held)) <= self.lanes.in_flight
        assert self.lanes.in_flight <= max(before, self.limit)
        assert self.names is None or self.lanes.in_flight <= len(self.names)

    async def check(self) -> None:
        """Check what has to hold when nothing moves."""
        await settle()
        holders = [caller for caller in self.callers if caller.lane is not None]
        waiting = [caller for caller in self.callers if not caller.done]
        assert self.lanes.in_flight == len(holders)
        assert self.lanes.waiting == len(waiting)
        free = self.limit if self.names is None else min(self.limit, len(self.names))
        assert not waiting or self.lanes.in_flight >= free
        assert not waiting or all(holder.number < waiting[0].number for holder in holders)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("names", [None, ("A", "B", "C")])
@settings(REPEATABLE, max_examples=150)
@given(
    steps=st.lists(STEPS, max_size=40), limit=st.integers(1, 4), closed_after=st.none() | st.integers(0, 40)
)
def test_no_sequence_of_steps_loses_a_lane_or_hands_out_one_too_many(
    backend: str, names: tuple[str, ...] | None, steps: list[Step], limit: int, closed_after: int | None
) -> None:
    async def main() -> None:
        play = Play(backend, names, limit)
        lanes = play.lanes
        async with anyio.create_task_group() as task_group:
            for number, step in enumerate(steps):
                if number == closed_after:
                    lanes.close(Closed)
                await play.do(step, task_group)
                if step[0] == "pause":
                    await play.check()
            await play.check()
            lanes.close(Closed)
            await settle()
            errors = [caller.error for caller in play.callers if caller.error is not None]
            assert len(errors) == len(set(map(id, errors)))
            assert all(caller.done for caller in play.callers)
            for caller in play.callers:
                caller.release()
            assert (lanes.in_flight, lanes.waiting) == (0, 0)
        if backend == "asyncio":
            await play.end()

    run(backend, main)
