"""Connecting over real sockets: what is sent, what is refused, and that a failure leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import threading
import traceback
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from anyagent import ConnectError, Timeouts, open_agent

from .wire_server import (
    CLOSE,
    DEADLINE,
    PING,
    PONG,
    STATUS,
    Frame,
    Peer,
    chunk,
    close_frame,
    end,
    frame,
    serve,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]

SHORT = Timeouts(connect=0.3)
SECRET = "s3cr3t"


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

    connect_tcp = anyio.connect_tcp
    monkeypatch.setattr(anyio, "connect_tcp", lambda host, port: connect_tcp("127.0.0.1", port))
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


# Failures


def rejection(status_line: str) -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(f"HTTP/1.1 {status_line}\r\nLocation: /elsewhere\r\nContent-Length: 3\r\n\r\nno!".encode())
        peer.wait_gone()

    return script


@pytest.mark.parametrize(
    "status_line",
    [
        "200 OK",
        "204 No Content",
        "302 Found",
        "307 Temporary Redirect",
        "401 Unauthorized",
        "404",
        "503 Busy",
    ],
)
async def test_a_rejection_gives_its_status_and_no_redirect_is_followed(status_line: str) -> None:
    async with serve(rejection(status_line)) as server:
        with pytest.raises(ConnectError, match="rejected") as caught:
            async with open_agent(server.url):
                pass
        assert caught.value.status_code == int(status_line[:3])
        assert server.connections == 1


async def test_a_status_line_that_comes_byte_by_byte_is_read_to_its_end() -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.dribble(b"HTTP/1.1 403 Forbidden\r\n", pause=0.001)

    async with serve(script) as server:
        with pytest.raises(ConnectError) as caught:
            async with open_agent(server.url):
                pass
        assert caught.value.status_code == 403


def endless_body(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\n")
    peer.send_until_gone(b"1000\r\n" + 0x1000 * b"x" + b"\r\n")


def endless_continues(peer: Peer) -> None:
    peer.read_request()
    peer.send_until_gone(b"HTTP/1.1 100 Continue\r\n\r\n")


def early_hints(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" + peer.switching() + text(STATUS))
    peer.wait_gone()


@pytest.mark.parametrize(
    ("script", "status_code"), [(endless_body, 500), (endless_continues, 100), (early_hints, 103)]
)
async def test_nothing_is_read_after_a_status_line_that_is_not_101(
    script: Callable[[Peer], None], status_code: int
) -> None:
    async with serve(script) as server:
        with pytest.raises(ConnectError, match="rejected") as caught:
            async with open_agent(server.url):
                pass
        assert caught.value.status_code == status_code


def endless_headers(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 101 Switching Protocols\r\n")
    peer.send_until_gone(b"X-Header: " + 100 * b"x" + b"\r\n")


def endless_header(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 101 Switching Protocols\r\nX-Header: ")
    peer.send_until_gone(1_000 * b"x")


def endless_status_line(peer: Peer) -> None:
    peer.read_request()
    peer.send_until_gone(1_000 * b"HTTP")


def answer(**changes: str) -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        peer.read_request()
        response = peer.switching().decode()
        for name, value in changes.items():
            response = response.replace(name, value)
        peer.send(response.encode() + text(STATUS))
        peer.wait_gone()

    return script


def wrong_accept_key(peer: Peer) -> None:
    peer.read_request()
    peer.send(peer.switching(accept="dGhlIHNhbXBsZSBub25jZQ==") + text(STATUS))
    peer.wait_gone()


def unasked_extension(peer: Peer) -> None:
    peer.read_request()
    peer.send(peer.switching(extra="Sec-WebSocket-Extensions: permessage-deflate\r\n") + text(STATUS))
    peer.wait_gone()


def unasked_subprotocol(peer: Peer) -> None:
    peer.read_request()
    peer.send(peer.switching(extra="Sec-WebSocket-Protocol: chat\r\n") + text(STATUS))
    peer.wait_gone()


def garbage(peer: Peer) -> None:
    peer.read_request()
    peer.send(bytes(range(256)) + b"\r\n\r\n")
    peer.wait_gone()


def echo(peer: Peer) -> None:
    peer.send(peer.read_request().encode() + b"\r\n\r\n")
    peer.wait_gone()


@pytest.mark.parametrize(
    "script",
    [
        endless_headers,
        endless_header,
        endless_status_line,
        wrong_accept_key,
        unasked_extension,
        unasked_subprotocol,
        garbage,
        echo,
        pytest.param(answer(Accept="Ignored"), id="no accept key"),
        pytest.param(answer(websocket="h2c"), id="other upgrade"),
        pytest.param(answer(Upgrade="X-Nothing"), id="no upgrade"),
        pytest.param(answer(HTTP="ICY"), id="no HTTP"),
    ],
)
async def test_an_invalid_answer_to_the_handshake_is_a_connect_error(script: Callable[[Peer], None]) -> None:
    async with serve(script) as server:
        with pytest.raises(ConnectError, match="answer to the WebSocket handshake is invalid") as caught:
            async with open_agent(server.url):
                pass
        assert caught.value.status_code is None


def fin_before_the_answer(peer: Peer) -> None:
    peer.read_request()


def fin_in_the_answer(peer: Peer) -> None:
    peer.read_request()
    peer.send(peer.switching()[:40])


def reset_in_the_answer(peer: Peer) -> None:
    peer.read_request()
    peer.send(peer.switching()[:40])
    peer.reset()


@pytest.mark.parametrize("script", [fin_before_the_answer, fin_in_the_answer, reset_in_the_answer])
async def test_an_agent_that_is_gone_during_the_handshake_is_a_connect_error(
    script: Callable[[Peer], None],
) -> None:
    async with serve(script) as server:
        with pytest.raises(ConnectError, match="closed the connection during") as caught:
            async with open_agent(server.url):
                pass
        assert caught.value.__cause__ is not None


async def test_an_agent_that_resets_at_once_is_a_connect_error() -> None:
    async with serve(Peer.reset) as server:
        with pytest.raises(ConnectError) as caught:
            async with open_agent(server.url):
                pass
        assert caught.value.__cause__ is not None


def silence(peer: Peer) -> None:
    peer.wait_gone()


def silence_after_the_request(peer: Peer) -> None:
    peer.read_request()
    peer.wait_gone()


def a_byte_every_so_often(peer: Peer) -> None:
    peer.read_request()
    peer.dribble(b"HTTP/1.1 101 Switching Protocols\r\n" + 10_000 * b"X-A: b\r\n", pause=0.02)


@pytest.mark.parametrize("script", [silence, silence_after_the_request, a_byte_every_so_often])
async def test_a_handshake_that_takes_too_long_is_a_connect_error(script: Callable[[Peer], None]) -> None:
    async with serve(script) as server:
        with pytest.raises(ConnectError, match=r"no connection within 0\.3 s") as caught:
            async with open_agent(server.url, timeouts=SHORT):
                pass
        assert isinstance(caught.value.__cause__, TimeoutError)


def no_status(peer: Peer) -> None:
    peer.upgrade()
    peer.wait_gone()


def pings_but_no_status(peer: Peer) -> None:
    peer.upgrade()
    peer.send_until_gone(frame(PING, b"x"))


def half_a_status(peer: Peer) -> None:
    peer.upgrade()
    peer.send(text(STATUS)[:-1])
    peer.wait_gone()


@pytest.mark.parametrize("script", [no_status, pings_but_no_status, half_a_status])
async def test_an_agent_that_sends_no_status_in_time_is_a_connect_error(
    script: Callable[[Peer], None],
) -> None:
    async with serve(script) as server:
        with pytest.raises(ConnectError, match=r"no status from the agent within 0\.3 s") as caught:
            async with open_agent(server.url, timeouts=SHORT):
                pass
        assert isinstance(caught.value.__cause__, TimeoutError)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(
            text(b'{"type":"AGENT_EVENT_END","tokens_used":1}'), "EventEnd first", id="other message"
        ),
        pytest.param(text(b'{"type":"SOMETHING"}'), "Unknown first", id="unknown message"),
        pytest.param(text(b"hello"), "is no Status", id="no JSON"),
        pytest.param(text(b""), "is no Status", id="empty message"),
        pytest.param(close_frame(1013, b"try later"), "code 1013, try later", id="close frame"),
        pytest.param(frame(CLOSE), "code 1005", id="close frame without a code"),
        pytest.param(frame(2, STATUS), "binary message", id="binary message"),
        pytest.param(text(b"\xff"), "not valid UTF-8|is no Status", id="bad UTF-8"),
        pytest.param(frame(1, STATUS, rsv=4), "protocol was broken", id="reserved bit"),
        pytest.param(frame(1, STATUS, masked=True), "protocol was broken", id="masked"),
        pytest.param(frame(1, length=2**31) + bytes(2**24), "larger than", id="too large"),
    ],
)
async def test_anything_but_a_status_first_is_a_connect_error(data: bytes, reason: str) -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        try:
            peer.send(data)
        except ConnectionError:
            return
        peer.wait_gone()

    async with serve(script) as server:
        with pytest.raises(ConnectError, match=reason):
            async with open_agent(server.url):
                pass


def reset_before_the_status(peer: Peer) -> None:
    peer.upgrade()
    peer.reset()


@pytest.mark.parametrize("script", [Peer.upgrade, reset_before_the_status])
async def test_an_agent_that_is_gone_before_its_status_is_a_connect_error(
    script: Callable[[Peer], None],
) -> None:
    async with serve(script) as server:
        with pytest.raises(ConnectError, match="closed the connection before its first status") as caught:
            async with open_agent(server.url):
                pass
        assert caught.value.__cause__ is not None


async def test_a_refused_connection_is_a_connect_error_with_its_cause() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectError, match=f"could not connect to 127.0.0.1:{port}: ") as caught:
        async with open_agent(f"ws://127.0.0.1:{port}/"):
            pass
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_host_that_is_not_found_is_a_connect_error_with_its_cause() -> None:
    host = ".".join(5 * ["a" * 60])  # longer than any name, so no name server is asked
    with pytest.raises(ConnectError, match="could not connect") as caught:
        async with open_agent(f"ws://{host}/"):
            pass
    assert isinstance(caught.value.__cause__, socket.gaierror)


# Secrets


@pytest.mark.parametrize(
    "script",
    [
        fin_in_the_answer,
        echo,
        garbage,
        wrong_accept_key,
        no_status,
        silence,
        rejection("302 Found"),
        Peer.upgrade,
        Peer.reset,
    ],
)
async def test_no_exception_and_no_log_record_shows_a_secret(
    script: Callable[[Peer], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serve(script) as server:
        url = f"ws://{SECRET}:{SECRET}@{server.authority}/{SECRET}?{SECRET}={SECRET}"
        with pytest.raises(ConnectError) as caught:
            async with open_agent(url, headers={"X-Token": SECRET}, timeouts=SHORT):
                pass
    shown = [caplog.text, *traceback.format_exception(caught.value)]
    chain: list[BaseException] = [caught.value]
    for each in chain:
        chain += [other for other in (each.__cause__, each.__context__) if other is not None]
        chain += each.exceptions if isinstance(each, BaseExceptionGroup) else []
        shown.append(f"{each!r} {vars(each)}")
    basic = "czNjcjN0OnMzY3IzdA=="
    # The test's own source line of `open_agent(url, ...)` names the variable, not its value.
    assert [line for line in shown if SECRET in line or basic in line] == []


async def test_no_log_record_shows_what_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        request_id = peer.receive_prompt()
        peer.send(frame(PING, b"p") + text(chunk(request_id, SECRET)) + text(end(request_id)))
        assert peer.receive() == Frame(PONG, b"p")
        peer.finish()

    caplog.set_level(logging.DEBUG)
    async with serve(script) as server, open_agent(server.url) as agent:
        assert (await agent.ask(SECRET)).text == SECRET
    assert SECRET not in caplog.text


# Nothing is left behind


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()  # a socket that was not closed would warn now, and warnings are errors


async def test_two_hundred_connections_leave_no_socket_behind_even_without_garbage_collection() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.finish()

    with no_garbage_collection():
        async with serve(script) as server:
            for _ in range(200):
                async with open_agent(server.url):
                    pass
        assert server.connections == 200


@pytest.mark.parametrize("script", [rejection("302 Found"), wrong_accept_key, fin_in_the_answer, Peer.reset])
async def test_two_hundred_failures_leave_no_socket_behind_even_without_garbage_collection(
    script: Callable[[Peer], None],
) -> None:
    with no_garbage_collection():
        async with serve(script) as server:
            for _ in range(200):
                with pytest.raises(ConnectError):
                    async with open_agent(server.url):
                        pass
        assert server.connections == 200


class Stage:
    """Tells a test that the agent's script has come to the stage at which the opening is to be cancelled."""

    def __init__(self) -> None:
        self._reached = threading.Event()

    def reach(self, peer: Peer) -> None:
        self._reached.set()
        peer.wait_gone()

    async def wait(self) -> None:
        assert await anyio.to_thread.run_sync(self._reached.wait, DEADLINE)
        await anyio.wait_all_tasks_blocked()


def accepted(peer: Peer) -> None:
    peer.sock.recv(1, socket.MSG_PEEK)


def half_answered(peer: Peer) -> None:
    peer.read_request()
    peer.send(peer.switching()[:40])


def waiting_for_the_status(peer: Peer) -> None:
    peer.upgrade()
    peer.send(frame(PING))
    assert peer.receive() == Frame(PONG, b"")


STAGES = [accepted, Peer.read_request, half_answered, waiting_for_the_status]


@pytest.mark.parametrize("until", STAGES)
async def test_cancelling_the_opening_leaves_nothing_behind(until: Callable[[Peer], object]) -> None:
    stage = Stage()

    def script(peer: Peer) -> None:
        until(peer)
        stage.reach(peer)

    async def connect() -> None:
        async with open_agent(server.url):
            raise AssertionError("this agent cannot be opened")

    async with serve(script) as server:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connect)
            await stage.wait()
            tasks.cancel_scope.cancel()
        assert server.connections == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)
@pytest.mark.parametrize("until", STAGES)
async def test_cancelling_the_opening_natively_leaves_nothing_behind(until: Callable[[Peer], object]) -> None:
    stage = Stage()

    def script(peer: Peer) -> None:
        until(peer)
        stage.reach(peer)

    async def connect() -> None:
        async with open_agent(server.url):
            raise AssertionError("this agent cannot be opened")

    async with serve(script) as server:
        task = asyncio.ensure_future(connect())
        await stage.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_cancelling_the_tcp_connect_leaves_nothing_behind() -> None:
    async def connect(port: int) -> None:
        async with open_agent(f"ws://127.0.0.1:{port}"):
            raise AssertionError("nobody accepts this connection")

    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener, socket.socket() as first:
        listener.listen(0)
        first.connect(listener.getsockname())  # and the backlog is full
        # `serve` sees to what is left over.
        async with serve(Peer.wait_gone), anyio.create_task_group() as tasks:
            tasks.start_soon(connect, listener.getsockname()[1])
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()


async def test_a_tcp_connect_that_takes_too_long_is_a_connect_error() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener, socket.socket() as first:
        listener.listen(0)
        first.connect(listener.getsockname())
        async with serve(Peer.wait_gone):
            with pytest.raises(ConnectError, match=r"no connection within 0\.3 s"):
                async with open_agent(f"ws://127.0.0.1:{listener.getsockname()[1]}", timeouts=SHORT):
                    pass
