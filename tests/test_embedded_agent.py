"""The embedded agent, seen from clients that speak the wire by hand: how it starts, and what it tells of."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import threading
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trustme
from websockets.exceptions import ConnectionClosed

import anyagent.testing
from anyagent import im, om
from anyagent.testing import AgentReply, EmbeddedAgent, Handler, echo, embedded_agent
from anyagent.testing import _embedded as embedded_module
from anyagent.testing._connection import Connection

from .raw_client import DEADLINE, connect, connect_before_status, connect_raw, end, text_chunk


def agent_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "anyagent embedded agent"]


async def hang(message: im.UserMessage, reply: AgentReply) -> None:
    await reply.hang()


# The first message of a connection.


def test_the_native_wire_opens_with_the_features_ids_and_cancel() -> None:
    with embedded_agent() as agent, connect_before_status(agent.url) as client:
        assert client.receive() == {"type": "STATUS", "state": "ready", "features": ["ids", "cancel"]}


def test_the_single_wire_opens_with_a_status_without_features() -> None:
    with embedded_agent(wire="single") as agent, connect_before_status(agent.url) as client:
        assert client.receive() == {"type": "STATUS", "state": "ready"}


def test_the_status_names_the_limit_and_the_overridden_features() -> None:
    with (
        embedded_agent(max_in_flight=3, features=["ids"]) as agent,
        connect_before_status(agent.url) as client,
    ):
        assert client.receive() == {
            "type": "STATUS",
            "state": "ready",
            "features": ["ids"],
            "max_in_flight": 3,
        }


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (om.Status("busy", session="s"), '{"type":"STATUS","state":"busy","session":"s"}'),
        (om.Status("ready"), '{"type":"STATUS","state":"ready"}'),
        (om.Error(code=1, details="no"), '{"type":"ERROR","code":1,"details":"no"}'),
        ("no JSON", "no JSON"),
        (b"binary", b"binary"),
    ],
)
def test_the_first_message_can_be_anything(
    status: om.ServerMessage | str | bytes, expected: str | bytes
) -> None:
    with embedded_agent(status=status) as agent, connect_before_status(agent.url) as client:
        assert client.websocket.recv(timeout=DEADLINE) == expected


def test_the_first_message_can_be_left_out() -> None:
    with embedded_agent(status=None) as agent, connect_before_status(agent.url) as client:
        client.prompt("Hello", id="a")
        assert client.receive() == text_chunk("Hello", id="a")


# Starting.


def test_a_port_in_use_is_an_oserror() -> None:
    before = agent_threads()
    with (
        embedded_agent() as agent,
        pytest.raises(OSError, match="in use") as caught,
        embedded_agent(port=agent.port),
    ):
        pass
    assert caught.value.errno == errno.EADDRINUSE
    assert agent_threads() == before


def test_a_start_that_fails_in_the_thread_comes_out_as_itself() -> None:
    before = agent_threads()
    not_a_context: Any = True
    with pytest.raises(TypeError, match="ssl argument"), embedded_agent(ssl_context=not_a_context):
        pass
    assert agent_threads() == before


def test_an_unknown_wire_is_a_value_error() -> None:
    telegraph: Any = "telegraph"
    with pytest.raises(ValueError, match="'telegraph'"), embedded_agent(wire=telegraph):
        pass


def test_agents_are_independent_of_each_other() -> None:
    with embedded_agent(hang) as first, embedded_agent() as second:
        assert first.port != second.port
        with connect(first.url) as client, connect(second.url) as other:
            client.prompt("one", id="a")
            other.prompt("two", id="a")
            assert other.receive_answer() == [text_chunk("two", id="a"), end(1, id="a")]
            first.wait_for(lambda message: message.id == "a")
        assert [message.text for message in first.received if isinstance(message, im.UserMessage)] == ["one"]


def test_an_agent_can_listen_on_all_interfaces_and_its_url_leads_to_loopback() -> None:
    with embedded_agent(host="0.0.0.0") as agent, connect(agent.url) as client:
        assert agent.url == f"ws://127.0.0.1:{agent.port}"
        client.prompt("Hello", id="a")
        assert client.receive_answer() == [text_chunk("Hello", id="a"), end(1, id="a")]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "ws://127.0.0.1:80"),
        ("0.0.0.0", "ws://127.0.0.1:80"),
        ("::1", "ws://[::1]:80"),
        ("::", "ws://[::1]:80"),
    ],
)
def test_a_url_is_one_to_connect_to(host: str, url: str) -> None:
    assert embedded_module._url("ws", host, 80) == url


def test_an_agent_can_be_served_over_tls() -> None:
    authority = trustme.CA()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)
    with (
        embedded_agent(ssl_context=server_context) as agent,
        connect_raw(agent.url, client_context) as client,
    ):
        assert agent.url == f"wss://127.0.0.1:{agent.port}"
        client.send_frame(0x81, b'{"type":"USER_MESSAGE","text":"Hello"}')
        assert client.receive_until(b"}")[2:] == b'{"type":"AGENT_EVENT_TEXT_CHUNK","text":"Hello"}'
        assert client.receive_until(b"}")[2:] == b'{"type":"AGENT_EVENT_END","tokens_used":1}'


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_agent_can_be_used_from_any_event_loop(backend: str) -> None:
    def talk(agent: EmbeddedAgent) -> list[dict[str, Any]]:
        with connect(agent.url) as client:
            client.prompt("Hello", id="a")
            agent.wait_for(lambda message: message.id == "a")
            return client.receive_answer()

    async def main() -> list[dict[str, Any]]:
        with anyio.fail_after(DEADLINE), embedded_agent() as agent:
            return await anyio.to_thread.run_sync(talk, agent)

    assert anyio.run(main, backend=backend) == [text_chunk("Hello", id="a"), end(1, id="a")]


def test_an_agent_uses_an_event_loop_of_its_own_whatever_the_application_has_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asyncio, "new_event_loop", None)
    loops: list[asyncio.AbstractEventLoop] = []

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        loops.append(asyncio.get_running_loop())

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        client.receive_answer()
    assert [type(loop) for loop in loops] == [asyncio.SelectorEventLoop]
    assert loops[0].is_closed()


def test_small_messages_are_not_held_back_by_nagles_algorithm() -> None:
    options: list[int] = []

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        sock = reply._link.websocket.transport.get_extra_info("socket")
        options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    with embedded_agent(handler) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        client.receive_answer()
    assert options == [1]


def test_compression_is_not_negotiated_and_large_prompts_are_taken() -> None:
    prompt = "x" * 3_000_000
    with embedded_agent() as agent, connect(agent.url, compression="deflate") as client:
        assert client.websocket.response is not None
        assert "Sec-WebSocket-Extensions" not in client.websocket.response.headers
        client.prompt(prompt, id="a")
        assert client.receive_answer() == [text_chunk(prompt, id="a"), end(1, id="a")]


# What the agent tells of.


def test_received_messages_are_kept_in_order_of_arrival() -> None:
    with embedded_agent() as agent, connect(agent.url) as one, connect(agent.url) as two:
        one.prompt("first", id="a", conversation="c", metadata={"n": 1})
        agent.wait_for(lambda message: message.id == "a")
        two.send(type="CANCEL", id="b")
        agent.wait_for(lambda message: isinstance(message, im.Cancel))
        one.send(type="TOOL_RESULT", id="a", call_id="x", output="y")
        agent.wait_for(lambda message: isinstance(message, im.ToolResult))
        assert list(agent.received) == [
            im.UserMessage(id="a", text="first", conversation="c", metadata={"n": 1}),
            im.Cancel(id="b"),
            im.ToolResult(id="a", call_id="x", output="y"),
        ]


def test_wait_for_returns_the_oldest_message_that_fits() -> None:
    with embedded_agent() as agent, connect(agent.url) as client:
        for name in ("a", "b", "c"):
            client.prompt(name, id=name)
        assert agent.wait_for(lambda message: message.id == "c").id == "c"
        assert agent.wait_for(lambda message: message.id != "a").id == "b"


def test_waiting_threads_are_woken_by_what_they_wait_for() -> None:
    waiting = threading.Event()

    def is_b(message: im.ClientMessage) -> bool:
        waiting.set()  # what comes now finds the thread asleep
        return message.id == "b"

    with embedded_agent() as agent:
        with connect(agent.url) as client:
            client.prompt("Hello", id="a")
            client.receive_answer()
            waiter = threading.Thread(target=agent.wait_for, args=(is_b, 600), daemon=True)
            waiter.start()
            assert waiting.wait(DEADLINE)
            client.prompt("Hello", id="b")
            waiter.join(DEADLINE)
            assert not waiter.is_alive()
            waiter = threading.Thread(target=agent.wait_for_connections, args=(0, 600), daemon=True)
            waiter.start()
        waiter.join(DEADLINE)
        assert not waiter.is_alive()
        waiter = threading.Thread(target=agent.wait_for_connections, args=(1, 600), daemon=True)
        waiter.start()
        with connect(agent.url):
            waiter.join(DEADLINE)
            assert not waiter.is_alive()


def test_wait_for_gives_up_after_its_timeout() -> None:
    with embedded_agent() as agent, connect(agent.url) as client:
        client.prompt("Hello", id="a")
        client.receive_answer()
        with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
            agent.wait_for(lambda message: message.id == "b", timeout=0.01)
        with pytest.raises(TimeoutError):
            agent.wait_for_connections(2, timeout=0.01)


def test_connections_are_counted() -> None:
    with embedded_agent() as agent:
        assert (agent.connections, agent.connections_total) == (0, 0)
        with connect(agent.url), connect(agent.url):
            assert (agent.connections, agent.connections_total) == (2, 2)
        agent.wait_for_connections(0)
        with connect(agent.url):
            assert (agent.connections, agent.connections_total) == (1, 3)


def test_a_broadcast_reaches_every_connection_whose_status_has_arrived() -> None:
    with embedded_agent() as agent, connect(agent.url) as one, connect(agent.url) as two:
        agent.broadcast(om.GracefulDisconnect(reason="maintenance", deadline=2.5))
        for client in (one, two):
            assert client.receive() == {
                "type": "GRACEFUL_DISCONNECT",
                "reason": "maintenance",
                "deadline": 2.5,
            }


def test_a_broadcast_to_a_new_connection_comes_after_its_status() -> None:
    class Connections(set[Connection]):
        def add(self, connection: Connection) -> None:
            super().add(connection)
            agent.broadcast(om.GracefulDisconnect())

    with embedded_agent() as agent:
        agent._connections = Connections()
        with connect_before_status(agent.url) as client:
            assert client.receive()["type"] == "STATUS"
            assert client.receive()["type"] == "GRACEFUL_DISCONNECT"


def test_a_handler_can_broadcast() -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        agent.broadcast(om.Status("busy"))
        await reply.hang()

    with embedded_agent(handler) as agent, connect(agent.url) as one, connect(agent.url) as two:
        one.prompt("?", id="a")
        assert two.receive() == {"type": "STATUS", "state": "busy"}


def test_a_stopped_agent_cannot_broadcast() -> None:
    with embedded_agent() as agent:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        agent.broadcast(om.Status("busy"))


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        raise ValueError(message.text)

    caplog.set_level(logging.DEBUG)
    with embedded_agent(handler) as agent:
        with connect(f"{agent.url}/?token=secret") as client:
            client.prompt("a prompt", id="a")
            assert client.receive()["type"] == "ERROR"
            client.websocket.send("no JSON")
            with pytest.raises(ConnectionClosed):
                client.receive()
        with socket.create_connection(("127.0.0.1", agent.port), DEADLINE) as sock:
            sock.sendall(b"GET /?token=secret HTTP/1.1\r\n\r\n")
            assert b"426 Upgrade Required" in sock.recv(65_536)
    assert [record for record in caplog.records if record.name != "asyncio"] == []
    assert "secret" not in caplog.text
    assert "prompt" not in caplog.text


# The module.


def test_every_public_name_of_the_module_can_be_imported() -> None:
    for name in anyagent.testing.__all__:
        assert getattr(anyagent.testing, name) is not None
    handler: Handler = echo
    assert anyagent.testing.echo is handler


def test_the_module_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = anyagent.testing.no_such_name
