"""A pool: several connections behind one agent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from anyagent import (
    IM,
    OM,
    Backoff,
    ConnectError,
    Disconnected,
    Limits,
    Timeouts,
    open_pool,
)
from anyagent.testing import AgentReply, MemoryPeer, embedded_agent

from .peers import LOST, SINGLE, Peers, answer, ask, prompts, until

if TYPE_CHECKING:
    from anyagent import Agent, AnyAgentError, Response

pytestmark = pytest.mark.anyio


async def fill(agent: Agent, peers: Peers, count: int) -> list[Response]:
    """Make a request on each of `count` connections, which are opened one after the other."""
    responses = []
    for number in range(1, count + 1):
        responses.append(await agent.send_message(str(number)))
        await anyio.wait_all_tasks_blocked()
        assert len(peers.made) == min(number + 1, count)
    return responses


async def test_connections_are_opened_as_requests_need_them_up_to_their_number() -> None:
    peers = Peers()
    async with peers.agent(connections=3) as agent:
        await anyio.sleep(1_000)
        assert len(peers.made) == 1
        responses = await fill(agent, peers, 3)
        assert [prompts(peer) for peer in peers.made] == [["1"], ["2"], ["3"]]
        for number in range(3, 30):
            responses.append(await agent.send_message(str(number)))
        await anyio.sleep(1_000)
        assert len(peers.made) == agent.stats.connections == agent.stats.open_connections == 3
        for response in responses:
            await response.aclose()


async def test_one_request_at_a_time_needs_one_connection() -> None:
    peers = Peers()
    async with peers.agent(connections=3) as agent, anyio.create_task_group() as tasks:
        first = await ask(tasks, agent)
        await answer(peers.made[0])
        assert len(peers.made) == 2  # which was opened as soon as the first was busy
        for _ in range(10):
            await ask(tasks, agent)
            (peer,) = [peer for peer in peers.made if prompts_waiting(peer)]
            await answer(peer)
        assert first.text == "answer"
        assert len(peers.made) == 2


def prompts_waiting(peer: MemoryPeer) -> bool:
    return peer._from_client.statistics().current_buffer_used > 0


async def test_a_request_goes_to_the_connection_with_the_fewest() -> None:
    peers = Peers()
    async with peers.agent(connections=3) as agent:
        responses = await fill(agent, peers, 3)
        for peer in peers.made:
            prompts(peer)
        responses += [await agent.send_message("spread") for _ in range(3)]
        await anyio.wait_all_tasks_blocked()
        assert [prompts(peer) for peer in peers.made] == [["spread"]] * 3
        await responses[1].aclose()
        await responses[4].aclose()
        responses += [await agent.send_message("second") for _ in range(2)]
        await anyio.wait_all_tasks_blocked()
        assert [prompts(peer) for peer in peers.made] == [[], ["second"] * 2, []]
        for response in responses:
            await response.aclose()


async def test_on_a_wire_with_one_lane_as_many_requests_run_at_once_as_there_are_connections() -> None:
    peers = Peers(SINGLE)
    async with peers.agent(connections=3) as agent, anyio.create_task_group() as tasks:
        askings = [await ask(tasks, agent, str(number)) for number in range(5)]
        assert agent.in_flight == 3
        assert [prompts(peer) for peer in peers.made] == [["0"], ["1"], ["2"]]
        peers.made[1].send(OM.EventEnd(1))
        await anyio.wait_all_tasks_blocked()
        assert [prompts(peer) for peer in peers.made] == [[], ["3"], []]
        for peer in (peers.made[0], peers.made[1], peers.made[2], peers.made[0]):
            peer.send(OM.EventEnd(1))
            await anyio.wait_all_tasks_blocked()
        assert [asking.text for asking in askings] == [""] * 5


async def test_a_broken_connection_is_replaced_and_hurts_none_of_the_others() -> None:
    peers = Peers()
    async with peers.agent(connections=3) as agent:
        responses = await fill(agent, peers, 3)
        ids = [(await peer.receive()).id for peer in peers.made]
        peers.made[1].close(LOST)
        with pytest.raises(Disconnected) as caught:
            await responses[1].collect()
        assert caught.value.phase == "sent"
        meanwhile = await agent.send_message("meanwhile")
        await peers.connected(4)
        for number in (0, 2):
            peers.made[number].send(OM.EventTextChunk("fine", id=ids[number]), OM.EventEnd(1, id=ids[number]))
            assert (await responses[number].collect()).text == "fine"
        assert agent.stats.open_connections == 3
        assert prompts(peers.made[3]) == []
        await meanwhile.aclose()


async def test_requests_that_were_not_begun_move_to_another_connection_at_once() -> None:
    peers = Peers()
    async with peers.agent(connections=2) as agent, anyio.create_task_group() as tasks:
        responses = await fill(agent, peers, 2)
        peers.made[0].writable = anyio.Event()
        responses.append(await agent.send_message("begun"))
        await anyio.wait_all_tasks_blocked()
        responses.append(await agent.send_message("other"))
        moved = await ask(tasks, agent, "moved")
        peers.down = True
        assert prompts(peers.made[1]) == ["2", "other"]
        peers.made[0].close(LOST)
        await anyio.wait_all_tasks_blocked()
        assert prompts(peers.made[1]) == ["moved"]
        moved.scope.cancel()
        for response in responses:
            await response.aclose()


async def test_a_pool_that_has_lost_all_connections_waits_for_new_ones() -> None:
    peers = Peers()
    async with peers.agent(connections=2) as agent, anyio.create_task_group() as tasks:
        responses = await fill(agent, peers, 2)
        peers.down = True
        for peer in peers.made:
            peer.close(LOST)
        for response in responses:
            with pytest.raises(Disconnected):
                await response.collect()
        askings = [await ask(tasks, agent, str(number)) for number in range(4)]
        await anyio.sleep(100)
        peers.down = False
        await until(lambda: len(peers.made) == 4)
        assert sorted(prompts(peers.made[2]) + prompts(peers.made[3])) == list("0123")
        for asking in askings:
            asking.scope.cancel()


async def test_a_pool_is_not_given_up_as_long_as_it_has_a_connection() -> None:
    peers = Peers()
    async with peers.agent(connections=2, reconnect=Backoff(attempts=2, maximum=1)) as agent:
        responses = await fill(agent, peers, 2)
        peers.down = True
        peers.made[1].close(LOST)
        await anyio.sleep(100)
        assert len(peers.attempts) > 20
        responses.append(await agent.send_message("still there"))
        peers.made[0].close(LOST)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(Disconnected, match="no connection in 2 attempts"):
            await agent.send_message("gone")
        for response in responses:
            await response.aclose()


async def test_a_connection_that_is_too_old_is_replaced_and_closed_once_its_requests_have_ended() -> None:
    causes: list[AnyAgentError | None] = []
    peers = Peers()

    async def renew(cause: AnyAgentError | None) -> None:
        causes.append(cause)

    async with peers.agent(connections=1, max_age=100, renew=renew) as agent:
        response = await agent.send_message("old")
        old_id = (await peers.made[0].receive()).id
        await anyio.sleep(99)
        assert len(peers.made) == 1
        await anyio.sleep(2)
        assert len(peers.made) == 2
        assert peers.made[0].close_code is None
        newer = await agent.send_message("new")
        assert prompts(await peers.connected(2)) == ["new"]
        peers.made[0].send(OM.EventTextChunk("done", id=old_id), OM.EventEnd(1, id=old_id))
        assert (await response.collect()).text == "done"
        await anyio.wait_all_tasks_blocked()
        assert peers.made[0].close_code == 1000
        assert (agent.stats.open_connections, agent.stats.reconnects, agent.stats.last_failure) == (
            1,
            0,
            None,
        )
        await newer.aclose()
        await anyio.sleep(1_000)
        assert 10 <= len(peers.made) <= 12
        assert agent.stats.open_connections == 1
    assert causes == [None] * (len(peers.made) - 1)


async def test_a_connection_that_is_too_old_stays_in_use_until_there_is_another() -> None:
    peers = Peers()
    async with peers.agent(connections=1, max_age=100) as agent, anyio.create_task_group() as tasks:
        peers.down = True
        await anyio.sleep(1_000)
        assert len(peers.attempts) > 10
        asking = await ask(tasks, agent)
        await answer(peers.made[0])
        assert asking.text == "answer"
        peers.down = False
        await peers.connected(2)
        assert peers.made[0].close_code == 1000


async def test_connections_are_opened_without_delay_again_once_the_newest_has_lasted() -> None:
    peers = Peers()
    backoff = Backoff(initial=1_000, maximum=1_000, healthy=50)
    async with peers.agent(connections=2, reconnect=backoff) as agent:
        peers.made[0].close(LOST)
        await peers.connected(2)
        await anyio.sleep(51)
        response = await agent.send_message("busy")
        before = anyio.current_time()
        await until(lambda: len(peers.made) == 3)
        assert anyio.current_time() - before <= 1
        await response.aclose()


async def test_requests_in_flight_are_limited_for_the_pool_as_a_whole() -> None:
    peers = Peers()
    async with (
        peers.agent(connections=3, limits=Limits(in_flight=4)) as agent,
        anyio.create_task_group() as tasks,
    ):
        askings = [await ask(tasks, agent) for _ in range(6)]
        assert agent.in_flight == 4
        await answer(next(peer for peer in peers.made if prompts_waiting(peer)))
        assert agent.in_flight == 4
        assert sum(asking.text == "answer" for asking in askings) == 1
        for asking in askings:
            asking.scope.cancel()


async def test_requests_on_a_connection_that_goes_away_count_for_the_limit() -> None:
    peers = Peers()
    async with (
        peers.agent(connections=2, limits=Limits(in_flight=2)) as agent,
        anyio.create_task_group() as tasks,
    ):
        responses = await fill(agent, peers, 2)
        peers.made[0].send(OM.GracefulDisconnect())
        waiting = await ask(tasks, agent, "waiting")
        await anyio.sleep(100)
        assert [prompts(peer) for peer in peers.made] == [["1"], ["2"], []]
        await responses[0].aclose()
        await anyio.wait_all_tasks_blocked()
        assert prompts(peers.made[2]) == ["waiting"]
        waiting.scope.cancel()
        await responses[1].aclose()


async def test_the_newest_status_of_any_connection_is_the_pools() -> None:
    peers = Peers()
    async with peers.agent(connections=2) as agent:
        responses = await fill(agent, peers, 2)
        for number, state in ((0, "busy"), (1, "idle")):
            peers.made[number].send(OM.Status(state))
            await anyio.wait_all_tasks_blocked()
            assert agent.status.state == state
        for response in responses:
            await response.aclose()


async def test_leaving_the_block_closes_all_connections_within_the_close_timeout() -> None:
    peers = Peers()
    async with peers.agent(connections=4, timeouts=Timeouts(close=5)) as agent:
        responses = await fill(agent, peers, 4)
        for peer in peers.made:
            peer.answers_close = False
        before = anyio.current_time()
    assert anyio.current_time() - before <= 5
    assert [peer.close_code for peer in peers.made] == [1000] * 4
    for response in responses:
        with pytest.raises(Disconnected):
            await response.collect()


class Boom(Exception):
    pass


async def test_an_exception_in_on_notice_for_any_connection_comes_out_as_itself() -> None:
    def on_notice(message: OM.ServerMessage) -> None:
        if message == OM.Status("boom"):
            raise Boom

    peers = Peers()

    responses: list[Response] = []

    async def use() -> None:
        async with peers.agent(connections=3, on_notice=on_notice) as agent:
            responses.extend(await fill(agent, peers, 3))
            peers.made[2].send(OM.Status("boom"))
            await anyio.sleep_forever()

    with pytest.raises(Boom):
        await use()
    for response in responses:
        with pytest.raises(Disconnected):
            await response.collect()


@pytest.mark.parametrize("connections", [0, -1, True, 1.5, None, "2"])
async def test_a_wrong_number_of_connections_is_refused(connections: object) -> None:
    with pytest.raises(ValueError, match="connections must be a positive integer"):
        async with open_pool("ws://localhost", connections=connections):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize("max_age", [0, -1, float("inf"), float("nan"), True, "2"])
async def test_a_wrong_maximum_age_is_refused(max_age: object) -> None:
    with pytest.raises(ValueError, match="max_age must be a positive, finite number"):
        async with open_pool("ws://localhost", max_age=max_age):  # type: ignore[arg-type]
            pass


@pytest.mark.sockets
async def test_a_pool_whose_first_connection_fails_is_not_opened() -> None:
    with pytest.raises(ConnectError):
        async with open_pool("ws://127.0.0.1:1"):
            pass


async def shout(message: IM.UserMessage, reply: AgentReply) -> None:
    await reply.text(message.text.upper())


@pytest.mark.sockets
@pytest.mark.parametrize("wire", ["native", "single"])
async def test_a_pool_answers_many_requests_over_real_connections(wire: str) -> None:
    texts: dict[str, str] = {}

    async def run(agent: Agent, prompt: str) -> None:
        texts[prompt] = (await agent.ask(prompt)).text

    with embedded_agent(shout, wire=wire) as server:  # type: ignore[arg-type]
        async with open_pool(server.url, connections=3) as agent:
            async with anyio.create_task_group() as tasks:
                for number in range(60):
                    tasks.start_soon(run, agent, f"request {number}")
            assert 1 <= agent.stats.connections <= 3
    assert texts == {f"request {number}": f"REQUEST {number}" for number in range(60)}
