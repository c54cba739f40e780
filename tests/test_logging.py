"""What is logged, at which level, and that no record holds what an agent or an application has said."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import traceback
from typing import TYPE_CHECKING, Final, TypeAlias

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
    SlowConsumerError,
    Timeouts,
    open_agent,
)
from anyagent.testing import memory_agent

from .misbehaviour import (
    echo,
    endless_continues,
    fin_in_the_answer,
    garbage,
    half_a_status,
    rejection,
    reset_before_the_status,
    silence,
    wrong_accept_key,
)
from .peers import Peers
from .wire_server import BINARY, CLOSE, PING, PONG, TEXT, Peer, chunk, close_frame, end, frame, serve, text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from .wire_server import Script

    Logged: TypeAlias = Callable[[], list[tuple[int, str]]]

pytestmark = pytest.mark.anyio

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR
OPENED: Final = (DEBUG, "connection to memory:0 opened")
CLOSED: Final = (DEBUG, "connection to memory:0 closed")
LOST: Final = (WARNING, "connection to memory:0 lost (code 1006)")


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(DEBUG)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Logged:
    """The level and the text of what the logger "anyagent" has recorded since the last call."""

    def take() -> list[tuple[int, str]]:
        records = [record for record in caplog.records if record.name.split(".")[0] == "anyagent"]
        assert all(record.name == "anyagent" and record.exc_info is None for record in records)
        taken = [(record.levelno, record.getMessage()) for record in records]
        caplog.clear()
        return taken

    return take


# Which records, at which level


async def test_a_normal_exchange_logs_that_the_connection_was_opened_and_closed_and_nothing_else(
    logged: Logged,
) -> None:
    ends: list[Callable[[str], OM.ServerMessage | bytes]] = [
        lambda lane: OM.EventEnd(1, id=lane),
        lambda lane: OM.Error("busy", "later", id=lane),
        lambda lane: b'{"type":"AGENT_EVENT_END","tokens_used":"","id":"%s"}' % lane.encode(),
    ]
    async with memory_agent() as (agent, peer):
        assert logged() == [OPENED]
        for number in range(10):
            async with await agent.send_message("hello") as response:
                await peer.receive()
                if number % 2:
                    await response.send_tool_result("1", "2")
                peer.send(
                    *(OM.EventTextChunk("chunk", id=response.id) for _ in range(10)),
                    OM.EventToolCall("1", "add", "[]", id=response.id),
                    OM.EventTextChunk("whose?", id="none"),
                    ends[number % 3](response.id),
                    OM.Status("ready"),
                    OM.Error("busy", ""),
                    b'{"type":"NEW"}',
                )
                with contextlib.suppress(AnyAgentError):
                    async for _ in response:
                        pass
        assert logged() == []
    assert logged() == [CLOSED]


@pytest.mark.parametrize(("code", "violation"), [(1000, False), (1006, False), (1011, False), (1009, True)])
async def test_a_lost_connection_is_a_warning_with_its_code(
    logged: Logged, code: int, violation: bool
) -> None:
    async with memory_agent() as (_, peer):
        logged()
        peer.close(code, "why", violation=violation)
        await anyio.wait_all_tasks_blocked()
        assert logged() == [(WARNING, f"connection to memory:0 lost (code {code})"), CLOSED]
    assert logged() == []


async def test_a_message_that_fails_the_connection_is_one_warning(
    logged: Logged,
) -> None:
    async with memory_agent() as (_, peer):
        logged()
        peer.send(b"no JSON", b"no JSON")
        await anyio.wait_all_tasks_blocked()
        assert logged() == [(WARNING, "connection to memory:0 lost (code 1002)"), CLOSED]


async def test_an_announced_disconnect_is_no_warning(logged: Logged) -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        logged()
        peer.send(OM.GracefulDisconnect("deploying", deadline=10), OM.GracefulDisconnect("deploying"))
        await anyio.wait_all_tasks_blocked()
        announced = (INFO, "the agent announced that it will disconnect; 1 requests in flight")
        assert logged() == [announced]
        peer.send(OM.EventEnd(1, id=response.id))
        await response.collect()
        await anyio.wait_all_tasks_blocked()
        assert logged() == [CLOSED]


async def test_a_slow_consumer_is_one_warning(logged: Logged) -> None:
    async with memory_agent(limits=Limits(response_events=2)) as (agent, peer):
        response = await agent.send_message("hello")
        await peer.receive()
        logged()
        for number in range(10):
            peer.send(OM.EventToolCall(str(number), "add", "[]", id=response.id))
        await anyio.wait_all_tasks_blocked()
        slow = f"request {response.id} failed: its consumer is slow (Limits.response_events)"
        assert logged() == [(WARNING, slow)]
        with pytest.raises(SlowConsumerError):
            await response.collect()


async def test_with_block_a_full_response_is_not_logged(
    logged: Logged,
) -> None:
    limits = Limits(response_events=2, overflow="block")
    async with memory_agent(limits=limits) as (agent, peer), await agent.send_message("hello") as response:
        logged()
        await peer.receive()
        peer.send(*(OM.EventToolCall(str(number), "add", "[]", id=response.id) for number in range(10)))
        await anyio.wait_all_tasks_blocked()
        assert logged() == []


async def test_reconnecting_warns_of_each_failure_and_says_when_it_has_succeeded(
    logged: Logged,
) -> None:
    peers = Peers()
    async with peers.agent(reconnect=Backoff(initial=1, maximum=1)):
        logged()
        peers.down = True
        peers.made[0].close(1006)
        await anyio.sleep(10)
        in_vain = len(peers.attempts) - 1
        assert in_vain > 3
        refused = (WARNING, "could not connect to memory:0 again")
        assert sorted(logged()) == sorted([LOST, CLOSED] + [refused] * in_vain)
        peers.down = False
        await peers.connected(2)
        assert logged() == [OPENED, (INFO, "connection to memory:0 replaced")]
    assert logged() == [CLOSED]


async def test_giving_up_is_an_error(logged: Logged) -> None:
    peers = Peers()
    async with peers.agent(reconnect=Backoff(attempts=2)) as agent:
        logged()
        peers.down = True
        peers.made[0].close(1006)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(Disconnected):
            await agent.ask("hello")
        refused = (WARNING, "could not connect to memory:0 again")
        given_up = (ERROR, "no connection to memory:0 after 2 attempts")
        assert sorted(logged()) == sorted([LOST, CLOSED, refused, refused, given_up])
        with pytest.raises(Disconnected):
            await agent.ask("hello")
    assert logged() == []


async def test_connections_that_only_add_to_a_pool_or_are_left_with_it_are_no_more_than_debugging(
    logged: Logged,
) -> None:
    peers = Peers(OM.Status("ready"))
    async with peers.agent(connections=2) as agent:
        responses = [await agent.send_message("hello") for _ in range(2)]
    assert logged() == [OPENED, OPENED, CLOSED, CLOSED]
    for response in responses:
        await response.aclose()


async def test_what_comes_out_of_the_block_is_not_logged_as_well(
    logged: Logged,
) -> None:
    def crash(notice: OM.ServerMessage) -> None:
        raise ZeroDivisionError

    async def provoke() -> None:
        async with memory_agent(on_notice=crash) as (_, peer):
            peer.send(OM.Status("busy"))
            await anyio.sleep_forever()

    with pytest.raises(ZeroDivisionError):
        await provoke()
    with pytest.raises(ConnectError):
        async with memory_agent():
            raise ConnectError("the block's own")
    assert logged() == [OPENED, CLOSED, OPENED, CLOSED]


async def test_a_connection_that_does_not_come_about_is_raised_and_not_logged(
    logged: Logged,
) -> None:
    peers = Peers()
    peers.down = True
    with pytest.raises(ConnectError):
        async with peers.agent():
            pass
    assert logged() == []


# No secrets

SECRET: Final = "s3cr3t"
BASIC: Final = "czNjcjN0OnMzY3IzdA=="  # as userinfo in the Authorization header
HIDDEN: Final = (SECRET, BASIC, SECRET.encode().hex())


def shown_by(record: logging.LogRecord) -> str:
    """Everything that a handler can find in `record`."""
    parts = [record.getMessage(), repr(vars(record))]
    if isinstance(record.args, tuple):
        parts += [
            f"{arg!r} {arg} {vars(arg) if isinstance(arg, BaseException) else ''}" for arg in record.args
        ]
    if record.exc_info:
        parts += traceback.format_exception(record.exc_info[1])
    return "\n".join(parts)


@pytest.fixture
def _no_secret(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No record of any logger shows a secret; and there are records."""
    yield
    records = caplog.get_records("call")
    assert records
    assert [record for record in records if any(hidden in shown_by(record) for hidden in HIDDEN)] == []


def secret_event(request_id: str) -> bytes:
    return text(chunk(request_id, SECRET))


def see_off(peer: Peer) -> None:
    """Answer the client's close frame, if one comes, and wait until it is gone."""
    with contextlib.suppress(AssertionError, ConnectionError):
        while peer.receive().opcode != CLOSE:
            pass
        peer.send(close_frame(1000))
    peer.wait_gone()


def after_an_answer(*what: bytes) -> Script:
    """Answers a request in part, sends the frames `what`, and waits for the client to go."""

    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.send(text(STATUS))
        request_id = peer.receive_prompt()
        peer.send(secret_event(request_id) + b"".join(what))
        see_off(peer)

    return script


def then_reset(peer: Peer) -> None:
    peer.upgrade()
    peer.send(text(STATUS))
    peer.send(secret_event(peer.receive_prompt()))
    peer.reset()


def normally(peer: Peer) -> None:
    peer.upgrade()
    peer.send(text(STATUS))
    request_id = peer.receive_prompt()
    peer.send(frame(PING, SECRET.encode()) + secret_event(request_id) + text(end(request_id)))
    assert peer.receive() == (PONG, SECRET.encode())
    see_off(peer)


STATUS: Final = (
    b'{"type":"STATUS","state":"s3cr3t","features":["ids","cancel"],"session":"s3cr3t","s3cr3t":"s3cr3t"}'
)
WHEN_CONNECTING: Final = {
    "302": rejection(f"302 {SECRET}"),
    "401": rejection(f"401 {SECRET}"),
    "echo": echo,
    "endless 100": endless_continues,
    "FIN": fin_in_the_answer,
    "garbage": garbage,
    "half a status": half_a_status,
    "reset": reset_before_the_status,
    "silence": silence,
    "wrong key": wrong_accept_key,
}
WHEN_CONNECTED: Final = {
    "all is well": normally,
    "reset": then_reset,
    "FIN": lambda peer: peer.open(),
    "close": after_an_answer(close_frame(1011, SECRET.encode())),
    "close, private code": after_an_answer(close_frame(4000, SECRET.encode())),
    "close, invalid code": after_an_answer(close_frame(1005, SECRET.encode())),
    "close, no UTF-8": after_an_answer(close_frame(1011, SECRET.encode() + b"\xff")),
    "binary": after_an_answer(frame(BINARY, SECRET.encode())),
    "no UTF-8": after_an_answer(frame(TEXT, SECRET.encode() + b"\xff")),
    "no UTF-8, in fragments": after_an_answer(
        frame(TEXT, SECRET.encode(), fin=False), frame(TEXT, SECRET.encode() + b"\xff")
    ),
    "reserved bits": after_an_answer(frame(TEXT, SECRET.encode(), rsv=7)),
    "unknown opcode": after_an_answer(frame(0x5, SECRET.encode())),
    "masked": after_an_answer(frame(TEXT, SECRET.encode(), masked=True)),
    "long ping": after_an_answer(frame(PING, SECRET.encode() * 100)),
    "too large": after_an_answer(text(SECRET.encode() * 100_000)),
    "no JSON": after_an_answer(text(SECRET.encode())),
    "half a JSON": after_an_answer(text(b'{"type":"s3cr3t')),
    "no object": after_an_answer(text(b'["s3cr3t"]')),
    "wrong field": after_an_answer(text(b'{"type":"AGENT_EVENT_END","tokens_used":"s3cr3t","id":"1"}')),
    "wrong field, nobody's": after_an_answer(text(b'{"type":"AGENT_EVENT_END","tokens_used":"s3cr3t"}')),
    "unknown type, then close": after_an_answer(
        text(b'{"type":"s3cr3t","id":"s3cr3t","s3cr3t":1}'), text(b'{"type":"s3cr3t"}'), close_frame(1000)
    ),
    "error": after_an_answer(text(b'{"type":"ERROR","code":"s3cr3t","details":"s3cr3t","id":"1"}')),
    "error of the agent, then close": after_an_answer(
        text(b'{"type":"ERROR","code":"s3cr3t","details":"s3cr3t"}'), close_frame(1011, SECRET.encode())
    ),
    "graceful": after_an_answer(text(b'{"type":"GRACEFUL_DISCONNECT","reason":"s3cr3t","deadline":0}')),
    "slow consumer": after_an_answer(
        *[text(b'{"type":"AGENT_EVENT_TOOL_CALL","call_id":"","name":"s3cr3t","arguments":"","id":"1"}')]
        * 20,
        close_frame(1000),
    ),
}


@contextlib.asynccontextmanager
async def secret_agent(
    authority: str,
    *,
    timeouts: Timeouts = Timeouts(),  # noqa: B008 - immutable
    reconnect: Backoff | None = None,
    on_notice: Callable[[OM.ServerMessage], object] = str,
) -> AsyncIterator[Agent]:
    """Connect with nothing but secrets."""
    url = f"ws://{SECRET}:{SECRET}@{authority}/{SECRET}?{SECRET}={SECRET}"
    limits = Limits(response_events=10, message_size=100_000)
    async with open_agent(
        url,
        headers={"X-Token": SECRET},
        limits=limits,
        timeouts=timeouts,
        reconnect=reconnect,
        on_notice=on_notice,
    ) as agent:
        yield agent


async def ask(agent: Agent) -> None:
    metadata = {SECRET: SECRET}
    async with await agent.send_message(SECRET, conversation=SECRET, metadata=metadata) as response:
        async for _ in response:
            pass


@pytest.mark.sockets
@pytest.mark.usefixtures("_no_secret")
@pytest.mark.parametrize("script", WHEN_CONNECTING.values(), ids=WHEN_CONNECTING)
async def test_no_record_of_a_failed_attempt_shows_a_secret(script: Script) -> None:
    async with serve(script) as server:
        logging.getLogger("the test").info("begins")
        with pytest.raises(ConnectError):
            async with secret_agent(server.authority, timeouts=Timeouts(connect=0.2)):
                pass


@pytest.mark.sockets
@pytest.mark.usefixtures("_no_secret")
@pytest.mark.parametrize("script", WHEN_CONNECTED.values(), ids=WHEN_CONNECTED)
async def test_no_record_of_what_an_agent_does_shows_a_secret(script: Script) -> None:
    async with serve(script) as server, secret_agent(server.authority) as agent:
        with contextlib.suppress(AnyAgentError):
            await ask(agent)


@pytest.mark.sockets
@pytest.mark.usefixtures("_no_secret")
async def test_no_record_of_reconnecting_shows_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    scripts = iter([then_reset, rejection(f"503 {SECRET}"), normally])
    reconnect = Backoff(initial=0.01, attempts=3)
    async with (
        serve(lambda peer: next(scripts)(peer)) as server,
        secret_agent(server.authority, reconnect=reconnect) as agent,
    ):
        with pytest.raises(Disconnected):
            await ask(agent)
        await ask(agent)
        assert (agent.stats.reconnects, agent.stats.reconnect_attempts) == (1, 2)
    assert [record.levelno for record in caplog.records if record.name == "anyagent"].count(WARNING) == 2


@pytest.mark.sockets
@pytest.mark.usefixtures("_no_secret")
async def test_no_record_of_giving_up_shows_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    scripts = iter([then_reset, *[rejection(f"302 {SECRET}")] * 2])
    reconnect = Backoff(initial=0.01, attempts=2)
    async with (
        serve(lambda peer: next(scripts)(peer)) as server,
        secret_agent(server.authority, reconnect=reconnect) as agent,
    ):
        for _ in range(2):
            with pytest.raises(Disconnected):
                await ask(agent)
    assert ERROR in [record.levelno for record in caplog.records if record.name == "anyagent"]


@pytest.mark.sockets
@pytest.mark.usefixtures("_no_secret")
async def test_no_record_of_an_exception_in_on_notice_shows_a_secret() -> None:
    def crash(notice: OM.ServerMessage) -> None:
        raise ZeroDivisionError(SECRET, notice)

    async with serve(after_an_answer(text(STATUS))) as server:
        with pytest.raises(ZeroDivisionError):
            async with secret_agent(server.authority, on_notice=crash) as agent:
                await ask(agent)


@pytest.mark.sockets
@pytest.mark.usefixtures("_no_secret")
async def test_no_record_of_a_refused_connection_shows_a_secret() -> None:
    async with serve(silence) as server:
        port = server.port
    logging.getLogger("the test").info("begins")
    with pytest.raises(ConnectError):
        async with secret_agent(f"127.0.0.1:{port}"):
            pass


@pytest.mark.usefixtures("_no_secret")
async def test_no_record_of_anything_that_happens_in_memory_shows_a_secret() -> None:
    misdeeds: list[OM.ServerMessage | bytes] = [
        b'{"type":"AGENT_EVENT_END","tokens_used":"s3cr3t"}',
        b"s3cr3t",
        b"s3cr3t\xff",
        OM.GracefulDisconnect(SECRET, deadline=1),
    ]
    peers = Peers(OM.Status(SECRET, ("ids", "cancel"), session=SECRET))
    async with peers.agent(reconnect=Backoff(initial=1), limits=Limits(response_events=2)) as agent:
        for number, misdeed in enumerate(misdeeds, start=1):
            peer = await peers.connected(number)
            slow, response = [await agent.send_message(SECRET) for _ in range(2)]
            for _ in range(2):
                await peer.receive()
            peer.send(*(OM.EventToolCall(SECRET, SECRET, SECRET, id=slow.id) for _ in range(5)))
            peer.send(OM.EventTextChunk(SECRET, id=response.id), OM.Error(SECRET, SECRET), misdeed)
            await anyio.wait_all_tasks_blocked()
            for each, error in ((slow, SlowConsumerError), (response, AnyAgentError)):
                with pytest.raises(error):
                    await each.collect()
        peer = await peers.connected(len(misdeeds) + 1)
        peers.down = True
        peer.close(1011, SECRET)
        with anyio.move_on_after(5):
            await agent.ask(SECRET)


# An application that does not log

QUIET_PROGRAM: Final = """
import anyio
from anyagent import OM, Backoff, Disconnected, Limits
from anyagent.testing import memory_agent

async def main():
    async with memory_agent(limits=Limits(response_events=1)) as (agent, peer):
        response = await agent.send_message("slow")
        await peer.receive()
        for _ in range(5):
            peer.send(OM.EventToolCall("1", "n", "{}", id=response.id))
        await anyio.wait_all_tasks_blocked()
        peer.send(OM.GracefulDisconnect("bye"))
        await response.aclose()
    async with memory_agent() as (agent, peer):
        peer.close(1006, "lost")
        try:
            await agent.ask("hello")
        except Disconnected:
            print("disconnected")

anyio.run(main, backend="{backend}")
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_application_without_logging_sees_nothing_on_stderr(backend: str) -> None:
    program = QUIET_PROGRAM.replace("{backend}", backend)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("disconnected\n", "", 0)
