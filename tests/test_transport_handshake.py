"""What is sent to connect, and how the agent's answer may arrive."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import pytest
from anyio.abc import ByteStream

import anyagent._transports.asyncio
import anyagent._transports.trio
from anyagent import open_agent

from .wire_server import PING, PONG, STATUS, Frame, Peer, frame, serve, text

Connect: TypeAlias = Callable[[str, int], Awaitable[ByteStream]]

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]

# What is sent


async def test_the_request_is_a_plain_websocket_handshake_with_the_users_headers() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        line, *_ = peer.head.split("\r\n")
        assert line == "GET /chat%20room?model=m&key=a%26b HTTP/1.1"
        names = sorted(field.partition(":")[0].lower() for field in peer.head.split("\r\n")[1:])
        assert names == [
            *("authorization", "connection", "cookie", "host", "sec-websocket-key"),
            *("sec-websocket-version", "upgrade", "x-many", "x-many"),
        ]
        assert peer.header("host") == [server.authority]
        assert peer.header("connection") == ["Upgrade"]
        assert peer.header("upgrade") == ["websocket"]
        assert peer.header("sec-websocket-version") == ["13"]
        assert len(peer.header("sec-websocket-key")[0]) == 24
        assert peer.header("authorization") == ["Bearer token"]
        assert peer.header("cookie") == ["a=1; b=2"]
        assert peer.header("x-many") == ["one", "two"]
        peer.finish()

    headers = [
        ("Authorization", "Bearer token"),
        ("Cookie", "a=1; b=2"),
        ("X-Many", "one"),
        ("X-Many", "two"),
    ]
    resource = "chat%20room?model=m&key=a%26b"
    async with serve(script) as server, open_agent(server.url + resource, headers=headers) as agent:
        assert agent.status.state == "ready"


async def test_userinfo_is_sent_as_basic_credentials() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        assert peer.header("authorization") == ["Basic dXNlcjpwQHNz"]
        assert peer.header("host") == [server.authority]
        assert "user" not in peer.head
        peer.finish()

    async with serve(script) as server, open_agent(f"ws://user:p%40ss@{server.authority}/"):
        pass


async def test_ipv6_addresses_work_and_stand_in_brackets_in_the_host_header() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        assert peer.header("host") == [f"[::1]:{server.port}"]
        peer.finish()

    async with serve(script, "::1") as server, open_agent(server.url):
        pass


async def test_a_host_name_is_resolved_and_stands_in_the_host_header() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        assert peer.header("host") == [f"localhost:{server.port}"]
        peer.finish()

    async with serve(script) as server, open_agent(f"ws://localhost:{server.port}"):
        pass


async def test_a_host_name_of_the_greatest_length_is_asked_for_at_any_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = 63 * "a"

    def script(peer: Peer) -> None:
        peer.open()
        assert peer.header("host") == [f"{host}:{server.port}"]
        peer.finish()

    for backend in (anyagent._transports.asyncio, anyagent._transports.trio):

        async def connect_tcp(host: str, port: int, real: Connect = backend.connect_tcp) -> ByteStream:
            return await real("127.0.0.1", port)

        monkeypatch.setattr(backend, "connect_tcp", connect_tcp)
    async with serve(script) as server, open_agent(f"ws://{host}:{server.port}/"):
        pass


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.finish()

    async with serve(Peer.wait_gone) as proxy, serve(script) as server:
        for name in ("http_proxy", "https_proxy", "ws_proxy", "wss_proxy", "all_proxy", "socks_proxy"):
            monkeypatch.setenv(name, f"http://{proxy.authority}")
            monkeypatch.setenv(name.upper(), f"http://{proxy.authority}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        async with open_agent(server.url):
            pass
        assert proxy.connections == 0


async def test_small_writes_are_not_held_back() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        with peer.client_socket() as client:
            assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        peer.finish()

    async with serve(script) as server, open_agent(server.url):
        pass


# How the agent's answer may arrive


async def test_the_status_may_come_in_one_segment_with_the_answer() -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(peer.switching() + text(STATUS))
        peer.finish()

    async with serve(script) as server, open_agent(server.url) as agent:
        assert agent.status.state == "ready"


async def test_the_answer_and_the_status_may_come_byte_by_byte() -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.dribble(peer.switching() + text(STATUS), pause=0.001)
        peer.finish()

    async with serve(script) as server, open_agent(server.url) as agent:
        assert agent.status.state == "ready"


async def test_the_status_may_be_fragmented_and_come_after_pings() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.send(frame(PING, b"first") + frame(1, STATUS[:9], fin=False))
        assert peer.receive() == Frame(PONG, b"first")
        peer.send(frame(PING, b"second"))
        assert peer.receive() == Frame(PONG, b"second")
        peer.send(frame(0, STATUS[9:]))
        peer.finish()

    async with serve(script) as server, open_agent(server.url) as agent:
        assert agent.status.state == "ready"


async def test_a_hundred_connections_in_a_row_all_see_the_status_however_the_segments_fall() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.send(frame(PING, b"here?"))  # so that the answer and the status arrive one after the other
        assert peer.receive() == Frame(PONG, b"here?")
        peer.send(text(STATUS))
        peer.finish()

    async with serve(script) as server:
        for _ in range(100):
            async with open_agent(server.url) as agent:
                assert agent.status.state == "ready"


@pytest.mark.parametrize(
    "extra", ["Server: x\r\nSet-Cookie: a=b\r\n", "X-Padding: " + 4_000 * "x" + "\r\n"], ids=["few", "long"]
)
async def test_further_headers_in_the_answer_do_no_harm(extra: str) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(peer.switching(extra=extra) + text(STATUS))
        peer.finish()

    async with serve(script) as server, open_agent(server.url):
        pass
