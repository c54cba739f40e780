"""Whatever a peer does while we connect, connecting ends in time, in little memory, and asks nobody else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from anyagent import ConnectError, Timeouts, open_agent

from ..misbehaviour import (
    endless_body,
    endless_continues,
    endless_header,
    endless_headers,
    endless_status_line,
    many_long_headers,
    no_status,
    pings_but_no_status,
    rejection,
    silence,
    silence_after_the_request,
)
from ..wire_server import Peer, serve
from .measuring import MEBIBYTE, SLACK, Growth, Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..wire_server import Script

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.sockets,
    pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True),
]

TIMEOUTS = Timeouts(connect=0.3)
BOUND = TIMEOUTS.connect + SLACK

ENDLESS = [endless_headers, endless_header, endless_status_line, endless_body, endless_continues]


def a_header_byte_every_50_ms(peer: Peer) -> None:
    peer.read_request()
    peer.dribble(peer.switching(extra=100 * "X-A: b\r\n"), pause=0.05)


def a_byte_of_the_status_every_50_ms(peer: Peer) -> None:
    peer.upgrade()
    peer.dribble(b"\x81\x7d" + 125 * b" ", pause=0.05)


@pytest.mark.parametrize(
    "script",
    [
        silence,
        silence_after_the_request,
        a_header_byte_every_50_ms,
        *ENDLESS,
        pytest.param(rejection("302 Found"), id="redirect"),
        no_status,
        pings_but_no_status,
        a_byte_of_the_status_every_50_ms,
    ],
)
async def test_connecting_fails_with_a_connect_error_in_time(
    script: Script, figure: Callable[[str], None]
) -> None:
    async with serve(script) as server:
        stopwatch = Stopwatch()
        with pytest.raises(ConnectError):
            async with open_agent(server.url, timeouts=TIMEOUTS):
                pass
        elapsed = stopwatch.elapsed
        figure(f"{elapsed:.2f} s, bound {BOUND} s")
        assert elapsed < BOUND


async def test_a_tls_handshake_that_is_not_answered_fails_with_a_connect_error_in_time(
    figure: Callable[[str], None],
) -> None:
    async with serve(silence) as server:
        stopwatch = Stopwatch()
        with pytest.raises(ConnectError):
            async with open_agent(f"wss://{server.authority}/", timeouts=TIMEOUTS):
                pass
        elapsed = stopwatch.elapsed
        figure(f"{elapsed:.2f} s, bound {BOUND} s")
        assert elapsed < BOUND


@pytest.mark.parametrize("status_line", ["302 Found", "307 Temporary Redirect"])
@pytest.mark.parametrize("scheme", ["ws", "http"])
async def test_the_target_of_a_redirect_is_not_connected_to(
    scheme: str, status_line: str, figure: Callable[[str], None]
) -> None:
    def redirect(peer: Peer) -> None:
        peer.read_request()
        location = f"Location: {scheme}://{target.authority}/"
        peer.send(f"HTTP/1.1 {status_line}\r\n{location}\r\nContent-Length: 0\r\n\r\n".encode())
        peer.wait_gone()

    async with serve(Peer.open) as target, serve(redirect) as server:
        with pytest.raises(ConnectError) as caught:
            async with open_agent(server.url, timeouts=TIMEOUTS):
                pass
        assert caught.value.status_code == int(status_line[:3])
        figure(f"{server.connections} connection to the agent, {target.connections} to the target")
        assert (server.connections, target.connections) == (1, 0)


@pytest.mark.parametrize("script", [*ENDLESS, many_long_headers])
async def test_little_is_kept_of_an_endless_answer_to_the_handshake(
    script: Script, figure: Callable[[str], None]
) -> None:
    async with serve(script) as server:
        with Growth.measured() as growth:
            with pytest.raises(ConnectError):
                async with open_agent(server.url):
                    pass
            peak = growth.peak
        figure(f"{peak / MEBIBYTE:.2f} MiB, bound 4 MiB")
        assert peak < 4 * MEBIBYTE
