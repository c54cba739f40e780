"""Every way in which connecting can fail is a `ConnectError`, in time."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from anyagent import ConnectError, Timeouts, open_agent

from .misbehaviour import (
    a_byte_every_so_often,
    answer,
    early_hints,
    echo,
    endless_body,
    endless_continues,
    endless_header,
    endless_headers,
    endless_status_line,
    fin_before_the_answer,
    fin_in_the_answer,
    garbage,
    half_a_status,
    many_long_headers,
    no_status,
    pings_but_no_status,
    rejection,
    reset_before_the_status,
    reset_in_the_answer,
    silence,
    silence_after_the_request,
    unasked_extension,
    unasked_subprotocol,
    wrong_accept_key,
)
from .wire_server import CLOSE, STATUS, Peer, close_frame, frame, serve, text

if TYPE_CHECKING:
    from .wire_server import Script

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]

SHORT = Timeouts(connect=1)


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


@pytest.mark.parametrize(
    ("script", "status_code"), [(endless_body, 500), (endless_continues, 100), (early_hints, 103)]
)
async def test_nothing_is_read_after_a_status_line_that_is_not_101(script: Script, status_code: int) -> None:
    async with serve(script) as server:
        with pytest.raises(ConnectError, match="rejected") as caught:
            async with open_agent(server.url):
                pass
        assert caught.value.status_code == status_code


@pytest.mark.parametrize(
    "script",
    [
        endless_headers,
        endless_header,
        endless_status_line,
        many_long_headers,
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
async def test_an_invalid_answer_to_the_handshake_is_a_connect_error(script: Script) -> None:
    async with serve(script) as server:
        with pytest.raises(ConnectError, match="answer to the WebSocket handshake is invalid") as caught:
            async with open_agent(server.url):
                pass
        assert caught.value.status_code is None


@pytest.mark.parametrize("script", [fin_before_the_answer, fin_in_the_answer, reset_in_the_answer])
async def test_an_agent_that_is_gone_during_the_handshake_is_a_connect_error(
    script: Script,
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


@pytest.mark.parametrize("script", [silence, silence_after_the_request, a_byte_every_so_often])
async def test_a_handshake_that_takes_too_long_is_a_connect_error(script: Script) -> None:
    async with serve(script) as server:
        with pytest.raises(ConnectError, match=r"no connection within 1 s") as caught:
            async with open_agent(server.url, timeouts=SHORT):
                pass
        assert isinstance(caught.value.__cause__, TimeoutError)


async def test_a_tcp_connect_that_takes_too_long_is_a_connect_error() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener, socket.socket() as first:
        listener.listen(0)
        first.connect(listener.getsockname())
        async with serve(Peer.wait_gone):
            with pytest.raises(ConnectError, match=r"no connection within 1 s"):
                async with open_agent(f"ws://127.0.0.1:{listener.getsockname()[1]}", timeouts=SHORT):
                    pass


@pytest.mark.parametrize("script", [no_status, pings_but_no_status, half_a_status])
async def test_an_agent_that_sends_no_status_in_time_is_a_connect_error(
    script: Script,
) -> None:
    async with serve(script) as server:
        with pytest.raises(ConnectError, match=r"no status from the agent within 1 s") as caught:
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


@pytest.mark.parametrize("script", [Peer.upgrade, reset_before_the_status])
async def test_an_agent_that_is_gone_before_its_status_is_a_connect_error(
    script: Script,
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
