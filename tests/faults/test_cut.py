"""Wherever a connection is killed, its request ends as what had arrived says, and no prompt is seen twice."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pytest

from anyagent import IM, OM, AnyAgentError, Backoff, ConnectError, Disconnected, open_agent
from anyagent.testing import AgentReply, embedded_agent

from .proxy import Connection, Cut, Faults, Proxy, Reset, proxy_to

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]


async def answer(message: IM.UserMessage, reply: AgentReply) -> None:
    await reply.text("one, ")
    output = await reply.tool_call("count", "{}")
    await reply.reasoning("That was two.")
    await reply.text(output)


@dataclasses.dataclass
class Exchange:
    """One prompt, and the reading of its answer, amid which a tool is called; `error` is what ended that."""

    prompt: str
    events: list[OM.AgentEvent] = dataclasses.field(default_factory=list)
    end: OM.EventEnd | None = None
    error: AnyAgentError | None = None

    async def run(self, url: str, **options: Any) -> None:
        """`options` are those of `open_agent`."""
        try:
            async with (
                open_agent(url, **options) as agent,
                await agent.send_message(self.prompt) as response,
            ):
                async for event in response:
                    self.events.append(event)
                    if isinstance(event, OM.EventToolCall):
                        await response.send_tool_result(event.call_id, "two, three")
                self.end = response.end
        except AnyAgentError as exc:
            self.error = exc


def messages_in(data: bytes) -> list[OM.ServerMessage]:
    """The messages that are whole in what an agent has sent, of which none is long."""
    _, _, frames = data.partition(b"\r\n\r\n")
    messages = []
    while len(frames) >= 2 and len(frames) >= 2 + frames[1]:
        if frames[0] == 0x81:
            messages.append(OM.decode(frames[2 : 2 + frames[1]]))
        frames = frames[2 + frames[1] :]
    return messages


def check(exchange: Exchange, connection: Connection) -> None:
    """Hold how `exchange` ended against what has reached the client."""
    arrived = messages_in(connection.to_client.forwarded)
    error = exchange.error
    if not arrived:
        assert isinstance(error, ConnectError)
        return
    assert isinstance(arrived[0], OM.Status)
    events = [message for message in arrived if isinstance(message, OM.AgentEvent)]
    if events and isinstance(events[-1], OM.EventEnd):
        assert (error, exchange.end) == (None, events.pop())
    else:
        assert isinstance(error, Disconnected)
        assert (error.code, error.graceful) == (1006, False)
        assert error.phase in (["started"] if events else ["sent", "not_sent"])
    assert exchange.events == events


def whole_prompts_in(data: bytes) -> int:
    """How many prompts, of which there is one at most, are whole in what a client has sent."""
    _, _, frames = data.partition(b"\r\n\r\n")
    return int(len(frames) >= 2 and len(frames) >= 6 + (frames[1] & 0x7F))


async def kill_at_every_byte(
    proxy: Proxy, way: str, kill: type[Cut | Reset], **options: Any
) -> list[Exchange]:
    """Exchanges over one connection each, which is killed when n bytes have gone one `way`: for every n.

    They come in the order of n; `options` are those of `open_agent`.
    """
    undisturbed = Exchange("prompt 0000")
    await undisturbed.run(proxy.url, **options)
    assert undisturbed.error is None
    await anyio.to_thread.run_sync(proxy.wait_idle)
    exchanges = []
    for n in range(len(getattr(proxy.connections.pop(), way).forwarded) + 1):
        proxy.faults.append(Faults(**{way: (kill(n),)}))
        exchanges.append(Exchange(f"prompt {1 + n:04}"))
        await exchanges[-1].run(proxy.url, **options)
    await anyio.to_thread.run_sync(proxy.wait_idle)
    return exchanges


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True)
@pytest.mark.parametrize("way", ["to_agent", "to_client"])
@pytest.mark.parametrize("kill", [Cut, Reset])
async def test_a_connection_killed_after_any_byte_ends_its_request_and_no_prompt_is_seen_twice(
    way: str, kill: type[Cut | Reset], figure: Callable[[str], None]
) -> None:
    with embedded_agent(answer) as server, proxy_to(server.port) as proxy:
        exchanges = await kill_at_every_byte(proxy, way, kill)
    # The agent has stopped: it sees nothing more.
    seen = collections.Counter(each.text for each in server.received if isinstance(each, IM.UserMessage))
    assert len(exchanges) == len(proxy.connections)
    for exchange, connection in zip(exchanges, proxy.connections, strict=True):
        check(exchange, connection)
        assert seen[exchange.prompt] <= whole_prompts_in(connection.to_agent.forwarded)
        if exchange.events or exchange.end is not None:
            assert seen[exchange.prompt] == 1
        if isinstance(exchange.error, Disconnected) and exchange.error.phase == "not_sent":
            assert seen[exchange.prompt] == 0
    assert max(seen.values()) == 1
    endings = collections.Counter(ending(exchange) for exchange in exchanges)
    assert {"ConnectError", "sent", "started", "completed"} <= endings.keys()
    figure(", ".join(f"{count} {name}" for name, count in sorted(endings.items())))


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True)
@pytest.mark.parametrize("way", ["to_agent", "to_client"])
@pytest.mark.parametrize("kill", [Cut, Reset])
async def test_with_reconnect_no_prompt_is_seen_twice_either(
    way: str, kill: type[Cut | Reset], figure: Callable[[str], None]
) -> None:
    reconnect = Backoff(initial=0.001, maximum=0.002)
    with embedded_agent(answer) as server, proxy_to(server.port) as proxy:
        exchanges = await kill_at_every_byte(proxy, way, kill, reconnect=reconnect)
    seen = collections.Counter(each.text for each in server.received if isinstance(each, IM.UserMessage))
    assert set(seen.values()) == {1}
    for exchange in exchanges:
        if isinstance(exchange.error, Disconnected):
            assert exchange.error.phase in ("sent", "started")
        elif exchange.error is None:
            assert (seen[exchange.prompt], len(exchange.events)) == (1, 4)
        else:
            assert isinstance(exchange.error, ConnectError)
    endings = collections.Counter(ending(exchange) for exchange in exchanges)
    figure(", ".join(f"{count} {name}" for name, count in sorted(endings.items())))


def ending(exchange: Exchange) -> str:
    match exchange.error:
        case None:
            return "completed"
        case Disconnected(phase=phase):
            return phase
        case error:
            return type(error).__name__
