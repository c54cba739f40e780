"""Every response gets exactly its own events, in order, however requests are interleaved."""

from __future__ import annotations

import random

import anyio
import anyio.lowlevel
import pytest

from anyagent import IM, OM, Agent, Limits
from anyagent.testing import memory_agent

pytestmark = pytest.mark.anyio


async def test_two_hundred_interleaved_requests_get_their_own_events_in_order() -> None:
    answers: dict[str, list[str]] = {}

    async def ask(agent: Agent, prompt: str) -> None:
        async with await agent.send_message(prompt) as response:
            answers[prompt] = [event.text async for event in response if isinstance(event, OM.EventTextChunk)]
        assert response.tokens_used == 20

    async with memory_agent() as (agent, peer), anyio.create_task_group() as tasks:
        prompts = [f"prompt {number}" for number in range(200)]
        for prompt in prompts:
            tasks.start_soon(ask, agent, prompt)
        ids = {}
        for _ in prompts:
            message = await peer.receive()
            assert isinstance(message, IM.UserMessage)
            ids[message.text] = message.id
        outgoing = [(prompt, number) for prompt in prompts for number in range(20)]
        shuffled = random.Random(1).sample(prompts * 20, len(outgoing))
        sent = dict.fromkeys(prompts, 0)
        batch: list[OM.ServerMessage] = []
        for prompt in shuffled:
            batch.append(OM.EventTextChunk(f"{prompt}/{sent[prompt]}", id=ids[prompt]))
            sent[prompt] += 1
            if sent[prompt] == 20:
                batch.append(OM.EventEnd(20, id=ids[prompt]))
            if len(batch) > 37:
                peer.send(*batch)
                batch.clear()
                await anyio.lowlevel.checkpoint()
        peer.send(*batch)
    assert answers == {prompt: [f"{prompt}/{number}" for number in range(20)] for prompt in prompts}
    assert agent.in_flight == 0


async def test_on_the_single_wire_requests_wait_their_turn_in_first_come_order() -> None:
    answers: dict[str, str] = {}

    async def ask(agent: Agent, prompt: str) -> None:
        answers[prompt] = (await agent.ask(prompt)).text

    async with memory_agent(wire="single") as (agent, peer), anyio.create_task_group() as tasks:
        for number in range(200):
            tasks.start_soon(ask, agent, f"prompt {number}")
            await anyio.wait_all_tasks_blocked()
        for number in range(200):
            message = await peer.receive()
            assert isinstance(message, IM.UserMessage)
            assert (message.text, message.id) == (f"prompt {number}", None)
            with pytest.raises(anyio.WouldBlock):
                peer.receive_nowait()
            assert agent.in_flight == 1
            peer.send(OM.EventTextChunk(f"answer {number}"), OM.EventEnd(1))
    assert answers == {f"prompt {number}": f"answer {number}" for number in range(200)}


@pytest.mark.parametrize(("agents", "ours", "expected"), [(3, 10, 3), (10, 3, 3), (None, 3, 3)])
async def test_the_smaller_in_flight_limit_holds(agents: int | None, ours: int, expected: int) -> None:
    async def ask(agent: Agent) -> None:
        await agent.ask("hello")

    status = OM.Status("ready", ("ids", "cancel"), agents)
    async with memory_agent(status=status, limits=Limits(in_flight=ours)) as (agent, peer):
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(ask, agent)
            await anyio.wait_all_tasks_blocked()
            assert agent.in_flight == expected
            for answered in range(8):
                message = await peer.receive()
                assert agent.in_flight == min(expected, 8 - answered)
                peer.send(OM.EventEnd(1, id=message.id))
                await anyio.wait_all_tasks_blocked()
        assert agent.in_flight == 0


async def test_a_later_status_changes_the_in_flight_limit() -> None:
    async def ask(agent: Agent) -> None:
        await agent.ask("hello")

    status = OM.Status("ready", ("ids", "cancel"), 1)
    async with memory_agent(status=status) as (agent, peer), anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(ask, agent)
        await anyio.wait_all_tasks_blocked()
        assert agent.in_flight == 1
        peer.send(OM.Status("roomy", max_in_flight=3))
        await anyio.wait_all_tasks_blocked()
        assert agent.in_flight == 3
        assert agent.status.state == "roomy"
        for _ in range(3):
            peer.send(OM.EventEnd(1, id=(await peer.receive()).id))


async def test_events_for_ids_that_are_not_live_are_dropped_and_counted() -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        message = await peer.receive()
        peer.send(
            OM.EventTextChunk("spoofed", id="999"),
            OM.EventTextChunk("mine", id=message.id),
            OM.EventEnd(7, id="999"),
            OM.EventEnd(1, id=message.id),
            OM.EventTextChunk("late", id=message.id),
            OM.EventEnd(9, id=message.id),
        )
        assert (await response.collect()).text == "mine"
        assert response.tokens_used == 1
        assert agent.stats.unroutable_events == 4


async def test_an_id_that_was_guessed_before_its_message_was_written_is_not_live() -> None:
    async with memory_agent() as (agent, peer):
        peer.writable = anyio.Event()
        async with anyio.create_task_group() as tasks:
            response = await agent.send_message("first")
            second = await agent.send_message("second, queued behind the blocked write")
            await anyio.wait_all_tasks_blocked()
            third = await agent.send_message("third, not taken by the writer yet")
            peer.send(OM.EventTextChunk("guessed", id=third.id), OM.EventEnd(1, id=third.id))
            await anyio.wait_all_tasks_blocked()
            assert agent.stats.unroutable_events == 2
            peer.writable.set()
            for _ in range(3):
                message = await peer.receive()
                peer.send(OM.EventEnd(1, id=message.id))
            for each in (response, second, third):
                tasks.start_soon(each.collect)


async def test_messages_go_out_in_the_order_in_which_they_were_sent() -> None:
    async with memory_agent() as (agent, peer):
        responses = [await agent.send_message(str(number)) for number in range(100)]
        texts = []
        for _ in responses:
            message = await peer.receive()
            assert isinstance(message, IM.UserMessage)
            texts.append(message.text)
        assert texts == [str(number) for number in range(100)]
        for response in responses:
            await response.aclose()
