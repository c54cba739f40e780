"""A lost connection is replaced, if that is wanted; no message is ever written twice."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import anyio
import pytest

from anyagent import (
    OM,
    Agent,
    AnyAgentError,
    Backoff,
    ConnectError,
    Disconnected,
    Limits,
    ProtocolError,
    Response,
    Timeouts,
    open_agent,
)
from anyagent.testing import AgentReply, MemoryPeer, embedded_agent

from .peers import LOST, NATIVE, SINGLE, Asking, Peers, answer, ask, prompts, until
from .wire_server import Peer, serve

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

    from anyagent import IM
    from anyagent._transports import Transport

pytestmark = pytest.mark.anyio


async def block(tasks: TaskGroup, agent: Agent, peer: MemoryPeer) -> Asking:
    """Let the connection's writes block, with a request whose message has been begun."""
    peer.writable = anyio.Event()
    return await ask(tasks, agent, "begun")


async def test_a_request_that_is_made_while_there_is_no_connection_waits_for_the_next_one() -> None:
    peers = Peers()
    async with peers.agent() as agent, anyio.create_task_group() as tasks:
        peers.made[0].close(LOST)
        await anyio.wait_all_tasks_blocked()
        asking = await ask(tasks, agent)
        assert asking.text is None
        assert await answer(await peers.connected(2)) == "hello"
        assert asking.text == "answer"
        assert prompts(peers.made[0]) == []


async def test_waiting_for_a_connection_is_bounded_by_the_callers_scope_and_sends_nothing() -> None:
    peers = Peers()
    async with peers.agent() as agent:
        peers.down = True
        peers.made[0].close(LOST)
        await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(100) as scope:
            await agent.ask("hello")
        assert scope.cancelled_caught
        assert len(peers.attempts) > 3
        peers.down = False
        assert prompts(await peers.connected(2)) == []
        assert agent.in_flight == 0
        assert agent.stats.requests == 0


async def test_a_request_whose_message_was_not_begun_moves_over_and_others_fail_with_their_phase() -> None:
    peers = Peers()
    async with peers.agent() as agent, anyio.create_task_group() as tasks:
        (first,) = peers.made
        started = await agent.send_message("started")
        first.send(OM.EventTextChunk("some", id=(await first.receive()).id))
        begun = await block(tasks, agent, first)
        moved = await agent.send_message("moved")
        old_id = moved.id
        first.close(LOST)

        second = await peers.connected(2)
        assert await answer(second) == "moved"
        assert (await moved.collect()).text == "answer"
        assert moved.id != old_id
        with pytest.raises(Disconnected) as caught:
            await started.collect()
        assert caught.value.phase == "started"
        assert caught.value.partial is not None
        assert caught.value.partial.text == "some"
        assert isinstance(begun.error, Disconnected)
        assert begun.error.phase == "sent"
        assert prompts(first) == []
        assert prompts(second) == []
        stats = agent.stats
        assert (stats.requests, stats.completed, stats.failed) == (3, 1, 2)


async def test_requests_that_move_come_first_and_in_their_order() -> None:
    peers = Peers()
    async with peers.agent(limits=Limits(in_flight=4)) as agent, anyio.create_task_group() as tasks:
        await block(tasks, agent, peers.made[0])
        for number in range(6):  # three of them have a lane
            await ask(tasks, agent, str(number))
        peers.made[0].close(LOST)
        await anyio.wait_all_tasks_blocked()
        await ask(tasks, agent, "6")
        second = await peers.connected(2)
        assert [await answer(second) for _ in range(7)] == list("0123456")


async def test_requests_that_move_wait_for_the_lanes_of_the_new_connection() -> None:
    peers = Peers()
    async with peers.agent() as agent, anyio.create_task_group() as tasks:
        await block(tasks, agent, peers.made[0])
        askings = [await ask(tasks, agent, str(number)) for number in range(3)]
        peers.status = SINGLE
        peers.made[0].close(LOST)
        second = await peers.connected(2)
        for number, asking in enumerate(askings):
            assert prompts(second) == [str(number)]
            second.send(OM.EventEnd(1))
            await anyio.wait_all_tasks_blocked()
            assert asking.text == ""


async def leave_by_aclose(responses: list[Response]) -> None:
    await responses[0].aclose()


async def leave_by_dropping(responses: list[Response]) -> None:
    with pytest.warns(ResourceWarning):
        responses.clear()
    await anyio.wait_all_tasks_blocked()


@pytest.mark.parametrize("leave", [leave_by_aclose, leave_by_dropping])
async def test_a_request_that_waits_to_move_can_be_left(
    leave: Callable[[list[Response]], Awaitable[None]],
) -> None:
    peers = Peers()
    async with peers.agent() as agent, anyio.create_task_group() as tasks:
        await block(tasks, agent, peers.made[0])
        responses = [await agent.send_message("left")]
        peers.down = True
        peers.made[0].close(LOST)
        await anyio.wait_all_tasks_blocked()
        await leave(responses)
        peers.down = False
        assert prompts(await peers.connected(2)) == []
        assert (agent.in_flight, agent.stats.cancelled) == (0, 1)


async def test_a_request_moves_as_often_as_it_has_to() -> None:
    class Stuck(Peers):
        async def connect(self, task_group: TaskGroup) -> Transport:
            transport = await super().connect(task_group)
            if len(self.made) < 4:
                self.newest.writable = anyio.Event()
            return transport

    peers = Stuck()
    async with peers.agent() as agent, anyio.create_task_group() as tasks:
        askings = [await ask(tasks, agent, str(number).ljust(100_000)) for number in range(5)]
        for number in range(2, 5):
            peers.newest.close(LOST)  # with one message begun, and the others behind it
            await peers.connected(number)
        assert [(await answer(peers.newest)).strip() for _ in range(2)] == ["3", "4"]
        phases = [asking.error.phase for asking in askings if isinstance(asking.error, Disconnected)]
        assert phases == ["sent", "sent", "sent"]
        assert [asking.text for asking in askings] == [None, None, None, "answer", "answer"]


async def test_a_request_with_a_tool_result_behind_it_does_not_move() -> None:
    peers = Peers()
    async with peers.agent() as agent, anyio.create_task_group() as tasks:
        await block(tasks, agent, peers.made[0])
        response = await agent.send_message("with a result")
        errors: list[AnyAgentError] = []

        async def send_result() -> None:
            try:
                await response.send_tool_result("1", "2")
            except Disconnected as exc:
                errors.append(exc)

        tasks.start_soon(send_result)
        await anyio.wait_all_tasks_blocked()
        peers.made[0].close(LOST)
        with pytest.raises(Disconnected) as caught:
            await response.collect()
        assert caught.value.phase == "not_sent"
        await anyio.wait_all_tasks_blocked()
        assert len(errors) == 1
        assert prompts(await peers.connected(2)) == []


async def test_a_tool_result_for_a_request_that_waits_to_move_is_refused() -> None:
    peers = Peers()
    async with peers.agent() as agent, anyio.create_task_group() as tasks:
        await block(tasks, agent, peers.made[0])
        response = await agent.send_message("waits")
        peers.down = True
        peers.made[0].close(LOST)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(Disconnected, match="waits for a new connection") as caught:
            await response.send_tool_result("1", "2")
        assert caught.value.phase == "not_sent"
        peers.down = False
        await answer(await peers.connected(2))
        assert (await response.collect()).text == "answer"


async def test_a_violation_fails_what_was_sent_and_moves_what_was_not() -> None:
    peers = Peers()
    async with peers.agent() as agent, anyio.create_task_group() as tasks:
        begun = await block(tasks, agent, peers.made[0])
        moved = await ask(tasks, agent, "moved")
        peers.made[0].send(b"no JSON")
        peers.made[0].writable.set()
        assert await answer(await peers.connected(2)) == "moved"
        assert isinstance(begun.error, ProtocolError)
        assert moved.text == "answer"


async def test_after_a_graceful_disconnect_new_requests_go_to_the_next_connection_at_once() -> None:
    peers = Peers()
    async with peers.agent() as agent, anyio.create_task_group() as tasks:
        (first,) = peers.made
        in_flight = await ask(tasks, agent, "in flight")
        message = await first.receive()
        first.send(OM.GracefulDisconnect())
        newer = await ask(tasks, agent, "newer")
        assert await answer(await peers.connected(2)) == "newer"
        assert newer.text == "answer"
        assert in_flight.text is None
        assert agent.stats.open_connections == 2
        first.send(OM.EventEnd(1, id=message.id))
        await anyio.wait_all_tasks_blocked()
        assert in_flight.text == ""
        assert first.close_code == 1000
        assert agent.stats.open_connections == 1


async def test_a_request_that_was_not_begun_moves_at_a_graceful_disconnect() -> None:
    peers = Peers()
    async with peers.agent() as agent, anyio.create_task_group() as tasks:
        await block(tasks, agent, peers.made[0])
        moved = await ask(tasks, agent, "moved")
        peers.made[0].send(OM.GracefulDisconnect())
        assert await answer(await peers.connected(2)) == "moved"
        assert moved.text == "answer"
        peers.made[0].writable.set()
        await anyio.wait_all_tasks_blocked()
        assert prompts(peers.made[0]) == ["begun"]
        tasks.cancel_scope.cancel()


async def test_attempts_are_spaced_with_jitter_and_within_bounds(figure: Callable[[str], None]) -> None:
    backoff = Backoff(initial=0.5, maximum=8)
    peers = Peers()
    async with peers.agent(reconnect=backoff) as agent:
        peers.down = True
        lost = anyio.current_time()
        peers.made[0].close(LOST)
        await anyio.sleep(60)
        peers.down = False
        attempts = [lost, *peers.attempts[1:]]
        waits = [later - earlier for earlier, later in itertools.pairwise(attempts)]
        for number, wait in enumerate(waits, 1):
            assert 0 <= wait <= backoff.bound(number)
        assert len(set(waits)) == len(waits) >= 6
        stats = agent.stats
        assert stats.reconnect_attempts == len(waits)
        assert stats.reconnect_wait is not None
        assert isinstance(stats.last_failure, ConnectError)
        await peers.connected(2)
        assert agent.stats.reconnects == 1
    figure(f"{len(waits)} attempts in 60 s, after {', '.join(f'{wait:.2f}' for wait in waits)} s")


async def test_an_agent_is_given_up_after_so_many_attempts_in_a_row() -> None:
    peers = Peers()
    async with peers.agent(reconnect=Backoff(attempts=3)) as agent, anyio.create_task_group() as tasks:
        await block(tasks, agent, peers.made[0])
        moved = await ask(tasks, agent, "moved")
        peers.down = True
        peers.made[0].close(LOST)
        await anyio.wait_all_tasks_blocked()
        waiting = await ask(tasks, agent, "waiting")
        await anyio.sleep(1_000)
        with pytest.raises(Disconnected) as caught:
            await agent.send_message("late")
        for error in (moved.error, waiting.error, caught.value):
            assert isinstance(error, Disconnected)
            assert (error.phase, error.reason) == ("not_sent", "no connection in 3 attempts")
            assert isinstance(error.__cause__, ConnectError)
        assert len(peers.attempts) == 1 + 3
        assert agent.stats.reconnect_attempts == 3
        assert (agent.stats.requests, agent.stats.failed) == (2, 2)


async def test_connections_that_do_not_last_count_as_attempts_and_one_that_lasts_ends_the_row() -> None:
    peers = Peers()
    async with peers.agent(reconnect=Backoff(attempts=2, healthy=10)) as agent:
        for number in range(1, 6):
            await anyio.sleep(11)
            peers.newest.close(LOST)
            await peers.connected(number + 1)
        peers.newest.close(LOST)
        await peers.connected(7)
        peers.newest.close(LOST)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(Disconnected, match="no connection in 2 attempts"):
            await agent.ask("hello")
        assert len(peers.made) == 7


async def test_an_agent_without_reconnect_is_not_connected_again() -> None:
    peers = Peers()
    async with peers.agent(reconnect=None) as agent:
        peers.made[0].close(4000, "bye")
        await anyio.sleep(1_000)
        with pytest.raises(Disconnected) as caught:
            await agent.ask("hello")
        assert (caught.value.code, caught.value.reason) == (4000, "bye")
        assert len(peers.attempts) == 1


async def test_leaving_the_block_ends_a_wait_between_attempts_at_once() -> None:
    peers = Peers()
    async with peers.agent(reconnect=Backoff(initial=1_000, maximum=1_000)):
        peers.down = True
        peers.made[0].close(LOST)
        await anyio.wait_all_tasks_blocked()
        before = anyio.current_time()
    assert anyio.current_time() == before


async def test_leaving_the_block_ends_an_attempt_at_once() -> None:
    peers = Peers()
    async with peers.agent(timeouts=Timeouts(connect=1_000)) as agent:
        peers.status = None
        peers.made[0].close(LOST)
        await peers.connected(2)
        before = anyio.current_time()
    assert anyio.current_time() == before
    with pytest.raises(Disconnected):
        await agent.ask("hello")


async def test_leaving_the_block_fails_a_request_that_waits_for_a_connection() -> None:
    peers = Peers()
    async with anyio.create_task_group() as tasks, peers.agent() as agent:
        peers.down = True
        peers.made[0].close(LOST)
        await anyio.wait_all_tasks_blocked()
        asking = await ask(tasks, agent)
    assert isinstance(asking.error, Disconnected)
    assert asking.error.code == 1000


async def test_a_connection_that_comes_about_while_the_block_is_left_is_closed() -> None:
    connecting = anyio.Event()

    class Late(Peers):
        async def connect(self, task_group: TaskGroup) -> Transport:
            if not self.made:
                return await super().connect(task_group)
            connecting.set()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(3)
                transport = await super().connect(task_group)
            return transport  # noqa: RET504 - for mypy, a scope may swallow what is raised

    peers = Late()
    async with peers.agent():
        peers.made[0].close(LOST)
        await connecting.wait()
    assert len(peers.made) == 2
    assert peers.made[1]._client_receives.statistics().open_receive_streams == 0


async def test_an_attempt_without_a_status_in_time_is_one_in_vain() -> None:
    peers = Peers()
    async with peers.agent(timeouts=Timeouts(connect=5)) as agent:
        peers.status = None
        peers.made[0].close(LOST)
        await peers.connected(3)
        peers.status = NATIVE
        with anyio.fail_after(100):
            peer = await peers.connected(4)
        assert isinstance(agent.stats.last_failure, ConnectError)
        async with anyio.create_task_group() as tasks:
            asking = await ask(tasks, agent)
            await answer(peer)
        assert asking.text == "answer"


# on_reconnect


async def test_on_reconnect_is_given_the_cause_of_each_attempt_and_not_called_for_the_first_connection() -> (
    None
):
    causes: list[AnyAgentError | None] = []
    peers = Peers()

    async def renew(cause: AnyAgentError | None) -> None:
        causes.append(cause)

    async with peers.agent(renew=renew):
        assert causes == []
        peers.down = True
        peers.made[0].close(4000, "bye")
        await until(lambda: len(causes) >= 3)
        peers.down = False
        await peers.connected(2)
    lost, *refused = causes
    assert isinstance(lost, Disconnected)
    assert (lost.code, lost.reason) == (4000, "bye")
    assert all(isinstance(cause, ConnectError) for cause in refused)


@pytest.mark.parametrize("error", [ConnectError("no token"), TimeoutError()])
async def test_on_reconnect_can_fail_an_attempt(error: Exception) -> None:
    peers = Peers()
    errors = [error]

    async def renew(cause: AnyAgentError | None) -> None:
        if errors:
            raise errors.pop()

    async with peers.agent(renew=renew) as agent:
        peers.made[0].close(LOST)
        await peers.connected(2)
        assert isinstance(agent.stats.last_failure, ConnectError)
        assert agent.stats.reconnect_attempts == 2


async def test_on_reconnect_is_bounded_by_the_connect_timeout() -> None:
    peers = Peers()
    called: list[float] = []

    async def renew(cause: AnyAgentError | None) -> None:
        called.append(anyio.current_time())
        if len(called) == 1:
            await anyio.sleep_forever()

    async with peers.agent(renew=renew, timeouts=Timeouts(connect=5)):
        peers.made[0].close(LOST)
        await peers.connected(2)
        assert 5 <= called[1] - called[0] <= 5 + Backoff().bound(2)


class Boom(Exception):
    pass


async def test_another_exception_in_on_reconnect_ends_the_block_and_comes_out_as_itself() -> None:
    boom = Boom()
    peers = Peers()
    askings: list[Asking] = []

    async def renew(cause: AnyAgentError | None) -> None:
        raise boom

    async def use(tasks: TaskGroup) -> None:
        async with peers.agent(renew=renew) as agent:
            peers.made[0].close(LOST)
            askings.append(Asking(agent))
            tasks.start_soon(askings[0].run)
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        with pytest.raises(Boom) as caught:
            await use(tasks)
    assert caught.value is boom
    assert isinstance(askings[0].error, Disconnected)


async def hello(message: IM.UserMessage, reply: AgentReply) -> None:
    await reply.text("hello")
    if message.text == "drop":
        reply.drop()


@pytest.mark.sockets
async def test_headers_are_renewed_for_a_new_connection() -> None:
    tokens: list[str] = []

    def script(peer: Peer) -> None:
        peer.open()
        tokens.extend(peer.header("authorization"))
        peer.receive_prompt()

    async def on_reconnect(cause: AnyAgentError | None) -> dict[str, str] | None:
        return {"Authorization": "second"} if len(tokens) == 1 else None

    async with (
        serve(script) as server,
        open_agent(
            server.url,
            headers={"Authorization": "first"},
            reconnect=Backoff(initial=0.01),
            on_reconnect=on_reconnect,
        ) as agent,
    ):
        for number in range(3):
            with pytest.raises(Disconnected):
                await agent.ask("hello")
            assert len(tokens) == number + 1
    assert tokens == ["first", "second", "second"]


@pytest.mark.sockets
async def test_bad_headers_from_on_reconnect_come_out_of_the_block() -> None:
    async def on_reconnect(cause: AnyAgentError | None) -> dict[str, str]:
        return {"Authorization": "evil\r\nX: y"}

    async def use(url: str) -> None:
        async with open_agent(url, reconnect=Backoff(initial=0.01), on_reconnect=on_reconnect) as agent:
            with pytest.raises(Disconnected):
                await agent.ask("drop")
            await anyio.sleep_forever()

    with embedded_agent(hello) as server, pytest.raises(ValueError, match="header"):
        await use(server.url)


@pytest.mark.sockets
async def test_an_agent_that_was_restarted_is_found_again() -> None:
    with embedded_agent(hello) as server:
        async with open_agent(server.url, reconnect=Backoff(initial=0.01)) as agent:
            for _ in range(5):
                with pytest.raises(Disconnected) as caught:
                    await agent.ask("drop")
                assert caught.value.phase in ("sent", "started")
                assert (await agent.ask("hello")).text == "hello"
            assert agent.stats.reconnects == 5
