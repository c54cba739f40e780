"""The client against WebSocket servers that this project did not write, over loopback sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from anyagent import OM, AgentError, ConnectError, Disconnected, open_agent
from tests.servers import ENDPOINTS, NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyagent import Response

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]


@pytest.fixture(params=ENDPOINTS)
def url(request: pytest.FixtureRequest, url_of: Callable[[str], str]) -> str:
    return url_of(request.param)


async def _read(response: Response, texts: list[str]) -> None:
    async for event in response:
        assert isinstance(event, OM.EventTextChunk)
        texts.append(event.text)


async def test_each_of_two_hundred_concurrent_responses_gets_exactly_its_own_text(url: str) -> None:
    async def check(number: int) -> None:
        words = [f"{number}:{word}·ß→🐟 " for word in range(number % 7 + 1)]
        texts: list[str] = []
        async with await agent.send_message("".join(words)) as response:
            await _read(response, texts)
        assert "".join(texts) == "".join(words)
        assert response.tokens_used == len(words)

    async with open_agent(url) as agent, anyio.create_task_group() as tasks:
        for number in range(200):
            tasks.start_soon(check, number)


async def test_an_error_fails_its_request_and_leaves_the_connection_usable(url: str) -> None:
    async with open_agent(url) as agent:
        with pytest.raises(AgentError) as caught:
            await agent.ask("!error")
        assert (await agent.ask("and now?")).text == "and now?"
    assert (caught.value.code, caught.value.details) == ("refused", "as asked")


async def test_what_came_before_a_close_is_delivered_before_disconnected_is_raised(url: str) -> None:
    texts: list[str] = []
    async with open_agent(url) as agent:
        response = await agent.send_message("!close 1011")
        with pytest.raises(Disconnected) as caught:
            await _read(response, texts)
    assert texts == ["closing "]
    error = caught.value
    assert (error.code, error.reason, error.graceful, error.phase) == (1011, "as asked", False, "started")


async def test_a_response_left_early_does_not_disturb_the_next_one(url: str) -> None:
    async with open_agent(url) as agent:
        async with await agent.send_message("!count 1000") as response:
            async for event in response:
                assert isinstance(event, OM.EventTextChunk)
                assert event.text.startswith("0 ")
                break
        reply = await agent.ask("what comes next")
    assert (reply.text, reply.tokens_used) == ("what comes next", 3)


async def test_an_answer_with_pings_between_its_chunks_is_whole(url: str) -> None:
    async with open_agent(url) as agent:
        reply = await agent.ask("!ping")
    assert (reply.text, reply.tokens_used) == ("0 1 2 3 4 5 6 7 8 9 ", 10)


@pytest.mark.parametrize("length", [10, 1_000, 100_000])
async def test_messages_of_each_frame_length_are_whole_both_ways(url: str, length: int) -> None:
    async with open_agent(url) as agent:
        reply = await agent.ask("é" * length)
    assert (reply.text, reply.tokens_used) == ("é" * length, 1)


@pytest.mark.parametrize("name", NAMES)
async def test_a_path_that_is_not_served_is_a_connect_error_with_its_status(
    name: str, url_of: Callable[[str], str]
) -> None:
    with pytest.raises(ConnectError) as caught:
        async with open_agent(url_of(f"{name}/elsewhere")):
            pass
    assert caught.value.status_code == (403 if name.startswith("uvicorn") else 404)
