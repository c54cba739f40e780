"""No log record, exception or repr of a batch shows a token, or what is asked or answered."""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING

import anyio
import pytest

from anyagent import OM, AgentError, Backoff, ConnectError, Timeouts
from anyagent.batch import AttemptTimeouts, Batch, BatchConfig, Prompt, TooManyErrors, open_batch

from .batch_agents import Answer, MemoryAgent, memory_agents
from .misbehaviour import rejection, silence
from .properties import chain
from .wire_server import Peer, serve

if TYPE_CHECKING:
    from anyagent import AnyAgentError

    from .wire_server import Script

pytestmark = pytest.mark.anyio

SECRET = "s3cr3t"
BASIC = "czNjcjN0OnMzY3IzdA=="
PROMPTS = [
    Prompt(
        f"{SECRET} {number}",
        conversation=SECRET,
        metadata={SECRET: object() if number == 9 else SECRET},
        columns={SECRET: SECRET},
    )
    for number in range(10)
]


async def moody(prompt: str, answer: Answer) -> None:
    """Fails in every way there is, and quotes the prompt only in what is the answer's text."""
    answer.text(prompt)
    match int(prompt[-1]):
        case 0:
            answer.error("no_answer", "no")
        case 1:
            answer.error("busy", "later")
        case 2:
            answer.agent.lose()
        case 3:
            answer.send(
                b'{"type": "AGENT_EVENT_TEXT_CHUNK", "id": "%s", "text": 5}' % (answer.id or "").encode()
            )
        case 4:
            await anyio.sleep_forever()
        case 5:
            answer.send(OM.GracefulDisconnect("maintenance"))
            answer.end("incomplete")
        case 6:
            answer.send(b'{"type": "%s"' % SECRET.encode())
    answer.end()


def shown(exc: BaseException) -> list[str]:
    return [
        *traceback.format_exception(exc),
        *(f"{each!r} {each}" for each in chain(exc)),
    ]


async def test_nothing_but_the_answers_shows_what_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []

    async def take_all(batch: Batch) -> None:
        async for result in batch:
            seen.extend(f"{attempt.error}" for attempt in result.attempts)

    async with memory_agents(monkeypatch, a=MemoryAgent(moody), b=MemoryAgent(moody)) as urls:
        config = BatchConfig(
            urls,
            headers={"X-Token": SECRET},
            retry="idempotent",
            reconnect=Backoff(maximum=1),
            timeouts=AttemptTimeouts(total=5),
            max_errors=6,
        )
        async with open_batch(PROMPTS, config) as batch:
            seen += [repr(batch), repr(config)]
            with pytest.raises(TooManyErrors) as info:
                await take_all(batch)
            seen += [repr(batch.summary()), *shown(info.value)]
    assert len(seen) > 10
    assert "connecting again" in caplog.text
    assert [line for line in [*seen, caplog.text] if SECRET in line] == []


async def renew(cause: AnyAgentError | None) -> None:
    raise AgentError("expired", "no new token")


async def test_what_a_callback_raises_is_not_mixed_with_what_was_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with memory_agents(monkeypatch, agent=MemoryAgent(moody)) as urls:
        config = BatchConfig(urls, headers={"X-Token": SECRET}, on_reconnect=renew, retry="idempotent")
        with pytest.raises(AgentError, match="no new token") as info:
            async with open_batch(PROMPTS[2:3], config) as batch:
                await anext(batch)
    assert [line for line in [*shown(info.value), caplog.text] if SECRET in line] == []


@pytest.mark.sockets
@pytest.mark.parametrize("script", [silence, rejection("302 Found"), Peer.upgrade, Peer.reset])
async def test_an_agent_that_cannot_be_reached_is_not_named_with_its_secrets(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serve(script) as server:
        url = f"ws://{SECRET}:{SECRET}@{server.authority}/?{SECRET}={SECRET}"
        timeouts = Timeouts(connect=0.3)
        config = BatchConfig(url, headers={"X-Token": SECRET}, connection_timeouts=timeouts)
        with pytest.raises(ConnectError) as info:
            async with open_batch(PROMPTS, config) as batch:
                await anext(batch)
    assert [line for line in [*shown(info.value), caplog.text] if SECRET in line or BASIC in line] == []
