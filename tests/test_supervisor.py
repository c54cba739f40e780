"""What goes wrong in callbacks or between connections comes out as itself, and hurts no one else."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import anyio
import pytest

from anyagent import OM, Backoff, Disconnected, Limits, ProtocolError, Timeouts

from .peers import LOST, NATIVE, SINGLE, Peers, answer, ask, prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyagent import Agent, AnyAgentError, Response

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)


class Boom(Exception):
    pass


async def settle_outside_of_cancellation() -> None:
    with anyio.CancelScope(shield=True):
        await anyio.wait_all_tasks_blocked()


def fail(error: BaseException) -> Callable[[OM.ServerMessage], None]:
    """An `on_notice` that fails at the second notice."""

    def on_notice(message: OM.ServerMessage) -> None:
        if message == OM.Status("fail"):
            raise error

    return on_notice


async def test_a_crash_comes_out_even_if_the_block_waits_in_a_task_group() -> None:
    boom = Boom()
    peers = Peers(SINGLE)

    async def wait_for_a_lane(agent: Agent) -> None:
        await agent.ask("waits")

    async def use() -> None:
        async with peers.agent(on_notice=fail(boom)) as agent, anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(wait_for_a_lane, agent)
            await anyio.wait_all_tasks_blocked()
            peers.newest.send(OM.Status("fail"))

    with pytest.raises(Boom) as caught:
        await use()
    assert caught.value is boom


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [(Boom, KeyboardInterrupt, KeyboardInterrupt), (Boom, LookupError, Boom), (SystemExit, Boom, SystemExit)],
)
async def test_of_two_crashes_the_first_comes_out_but_ctrl_c_before_all(
    first: type[BaseException], second: type[BaseException], winner: type[BaseException]
) -> None:
    peers = Peers()
    responses: list[Response] = []
    errors = {OM.Status("first"): first, OM.Status("second"): second}

    def on_notice(message: OM.ServerMessage) -> None:
        if message in errors:
            raise errors[message]

    async def use() -> None:
        async with peers.agent(connections=2, on_notice=on_notice) as agent:
            responses.append(await agent.send_message("busy"))
            await peers.connected(2)
            for peer, state in zip(peers.made, ("first", "second"), strict=True):
                peer.send(OM.Status(state))
                await settle_outside_of_cancellation()
            await anyio.sleep_forever()

    with pytest.raises(winner):
        await use()
    with pytest.raises(Disconnected):
        await responses[0].collect()


@on_asyncio
async def test_a_cancelled_error_from_on_notice_comes_out_as_itself() -> None:
    peers = Peers()
    cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    cancelled.cancel()

    def on_notice(message: OM.ServerMessage) -> None:
        if message == OM.Status("fail"):
            cancelled.result()

    async def use() -> None:
        async with peers.agent(on_notice=on_notice):
            peers.newest.send(OM.Status("fail"))
            await anyio.sleep_forever()

    with pytest.raises(asyncio.CancelledError):
        await use()


@on_asyncio
async def test_a_cancelled_error_from_on_reconnect_comes_out_as_itself() -> None:
    peers = Peers()

    async def renew(cause: AnyAgentError | None) -> None:
        token: asyncio.Task[None] = asyncio.create_task(asyncio.sleep(100))
        token.cancel()
        await token

    async def use() -> None:
        async with peers.agent(renew=renew):
            peers.newest.close(LOST)
            await anyio.sleep_forever()

    with pytest.raises(asyncio.CancelledError):
        await use()


@pytest.mark.parametrize("error", [ProtocolError("of another agent"), anyio.BrokenResourceError(), Boom()])
async def test_what_fails_in_on_reconnect_is_not_taken_for_a_failed_connection(error: Exception) -> None:
    peers = Peers()

    async def renew(cause: AnyAgentError | None) -> None:
        raise error

    async def use() -> None:
        async with peers.agent(renew=renew):
            peers.newest.close(LOST)
            await anyio.sleep_forever()

    with pytest.raises(type(error)) as caught:
        await use()
    assert caught.value is error


async def test_a_caller_that_is_cancelled_when_its_lane_comes_has_sent_nothing() -> None:
    for _ in range(20):  # Trio wakes tasks in random order
        peers = Peers()
        async with (
            peers.agent(limits=Limits(in_flight=1)) as agent,
            anyio.create_task_group() as tasks,
        ):
            first = await ask(tasks, agent, "first")
            waiting = await ask(tasks, agent, "waiting")
            waiting.scope.cancel()
            message = await peers.newest.receive()
            peers.newest.send(OM.EventEnd(1, id=message.id))
            await anyio.wait_all_tasks_blocked()
            assert first.text == ""
            assert waiting.scope.cancelled_caught
            assert prompts(peers.newest) == []
            assert (agent.stats.requests, agent.stats.cancelled, agent.in_flight) == (1, 0, 0)


async def test_a_lost_connection_makes_room_for_requests_on_another() -> None:
    peers = Peers()
    async with (
        peers.agent(connections=2, limits=Limits(in_flight=1)) as agent,
        anyio.create_task_group() as tasks,
    ):
        first = await ask(tasks, agent, "first")
        await peers.connected(2)
        waiting = await ask(tasks, agent, "waiting")
        (busy,) = [peer for peer in peers.made if prompts(peer)]
        (idle,) = [peer for peer in peers.made if peer is not busy]
        peers.down = True
        busy.close(LOST)
        await anyio.wait_all_tasks_blocked()
        assert isinstance(first.error, Disconnected)
        assert await answer(idle) == "waiting"
        assert waiting.text == "answer"


async def test_a_connection_that_cannot_be_written_to_gets_no_more_requests() -> None:
    peers = Peers()
    async with peers.agent(connections=2, timeouts=Timeouts(close=50)) as agent:
        responses = [await agent.send_message("1")]
        await peers.connected(2)
        broken, healthy = peers.made
        broken.broken = True
        broken.answers_close = False
        await responses[0].aclose()  # the CANCEL fails
        await anyio.wait_all_tasks_blocked()
        responses += [await agent.send_message(prompt) for prompt in "234"]
        await anyio.wait_all_tasks_blocked()
        assert prompts(healthy) == ["2", "3", "4"]
        for response in responses:
            await response.aclose()


async def test_a_healthy_connection_that_says_farewell_is_replaced_without_a_wait() -> None:
    peers = Peers()
    backoff = Backoff(initial=1_000, maximum=1_000, healthy=10, attempts=1)
    async with peers.agent(reconnect=backoff) as agent, anyio.create_task_group() as tasks:
        for number in range(2, 6):
            await anyio.sleep(11)
            peers.newest.send(OM.GracefulDisconnect())
            await anyio.wait_all_tasks_blocked()
            assert len(peers.made) == number
            asking = await ask(tasks, agent)
            await answer(peers.newest)
            assert asking.text == "answer"


async def test_requests_are_served_in_their_order_when_a_connection_with_a_full_queue_is_lost() -> None:
    peers = Peers()
    async with (
        peers.agent(limits=Limits(in_flight=100)) as agent,
        anyio.create_task_group() as tasks,
    ):
        peers.newest.writable = anyio.Event()
        for number in range(10):
            await ask(tasks, agent, f"{number}".ljust(400_000))
        assert agent.in_flight < 10
        peers.newest.close(LOST)
        peer = await peers.connected(2)
        served = []
        for _ in range(9):  # but the one that had been begun
            served.append((await answer(peer)).strip())
            await anyio.wait_all_tasks_blocked()
        assert served == [str(number) for number in range(1, 10)]


async def test_a_tool_result_for_a_request_that_was_left_while_it_waited_is_refused() -> None:
    peers = Peers()
    async with peers.agent() as agent, anyio.create_task_group() as tasks:
        peers.newest.writable = anyio.Event()
        await ask(tasks, agent, "begun")
        response = await agent.send_message("left")
        peers.down = True
        peers.newest.close(LOST)
        await anyio.wait_all_tasks_blocked()
        await response.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await response.send_tool_result("1", "2")


async def test_two_connections_that_are_lost_at_once_are_both_replaced() -> None:
    peers = Peers()
    causes: list[AnyAgentError | None] = []

    async def renew(cause: AnyAgentError | None) -> None:
        causes.append(cause)

    async with peers.agent(connections=2, renew=renew) as agent:
        responses = [await agent.send_message("1")]
        await peers.connected(2)
        responses.append(await agent.send_message("2"))
        await anyio.wait_all_tasks_blocked()
        for peer in tuple(peers.made):
            peer.close(LOST)
        for response in responses:
            with pytest.raises(Disconnected):
                await response.collect()
        await peers.connected(3)
        response = await agent.send_message("3")
        await peers.connected(4)
        assert agent.stats.open_connections == 2
        assert isinstance(causes[1], Disconnected)
        await response.aclose()


async def test_a_connection_that_is_lost_while_another_is_replaced_is_replaced_for_its_own_reason() -> None:
    peers = Peers()
    causes: list[AnyAgentError | None] = []

    async def renew(cause: AnyAgentError | None) -> None:
        causes.append(cause)

    async with peers.agent(connections=2, renew=renew) as agent:
        responses = [await agent.send_message("1")]
        await peers.connected(2)
        responses.append(await agent.send_message("2"))
        await anyio.wait_all_tasks_blocked()
        peers.status = None
        peers.made[0].close(4001)
        replacement = await peers.connected(3)
        peers.made[1].close(4002)
        await anyio.wait_all_tasks_blocked()
        replacement.send(NATIVE)
        peers.status = NATIVE
        await anyio.wait_all_tasks_blocked()
        responses.append(await agent.send_message("3"))
        await peers.connected(4)
        assert agent.stats.reconnects == 2
        for response in responses:
            await response.aclose()
    codes = [cause.code for cause in causes if isinstance(cause, Disconnected)]
    assert codes == [4001, 4002]


async def test_a_thousand_reconnects_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "anyagent")  # pytest keeps the records

    def count() -> int:
        gc.collect()
        return len(gc.get_objects())

    peers = Peers()
    async with peers.agent(reconnect=Backoff(healthy=0.5)) as agent:

        async def reconnect(times: int) -> None:
            for _ in range(times):
                await anyio.sleep(1)
                lost = peers.made.pop()
                lost.close(LOST)
                await peers.connected(1)
                lost.end()

        await reconnect(100)
        before = count()
        await reconnect(1_000)
        assert agent.stats.reconnects == 1_100
        assert count() - before < 500
        assert len(peers.attempts) == 1_101


async def test_the_limit_of_a_later_status_below_what_is_in_flight_holds_for_newcomers() -> None:
    peers = Peers()
    async with peers.agent() as agent, anyio.create_task_group() as tasks:
        askings = [await ask(tasks, agent, str(number)) for number in range(4)]
        peers.newest.send(OM.Status("busy", NATIVE.features, max_in_flight=2))
        await anyio.wait_all_tasks_blocked()
        askings.append(await ask(tasks, agent, "late"))
        for in_flight in (3, 2, 2):
            await answer(peers.newest)
            assert agent.in_flight == in_flight
        await answer(peers.newest)
        await answer(peers.newest)
        assert [asking.text for asking in askings] == ["answer"] * 5
