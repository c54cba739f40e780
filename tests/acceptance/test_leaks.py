"""Nothing piles up: no file descriptor over many connects, no memory over a hundred thousand requests."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from anyagent import OM
from anyagent.testing import embedded_agent

from ..misbehaviour import rejection
from ..wire_server import Peer
from .processes import BACKENDS, ROOT, measured, playing, started
from .programs import PER_ROUND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def refused_port() -> Iterator[str]:
    """A URL that nobody listens at, or could begin to."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"ws://127.0.0.1:{sock.getsockname()[1]}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_good_and_a_thousand_failed_connects_leave_no_file_descriptor(
    backend: str, figure: Callable[[str], None]
) -> None:
    with (
        embedded_agent() as good,
        embedded_agent(status=OM.EventEnd(0)) as without_status,
        playing(rejection("403 Forbidden")) as forbidden,
        playing(Peer.reset) as resetting,
        refused_port() as refused,
    ):
        bad = [*[refused] * 7, forbidden.url, without_status.url, resetting.url]
        with started("connect_often", backend, good.url, *bad) as process:
            outcome = measured(process)
        assert (good.connections_total, outcome["refused"]) == (1_001, 1_000)
        assert (without_status.connections_total, forbidden.connections, resetting.connections) == (100,) * 3
    assert outcome["after"] <= outcome["before"]
    figure(f"{outcome['before']} file descriptors before, {outcome['after']} after")


@contextlib.contextmanager
def replay_server() -> Iterator[str]:
    """The URL of a server in a process of its own, which sends three chunks for every prompt."""
    command = [sys.executable, "-m", "benchmarks.server"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        yield f"ws://127.0.0.1:{port}/ids/round?requests={PER_ROUND}&chunks=3&size=26"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_thousand_requests_on_one_connection_take_no_more_memory(
    backend: str, figure: Callable[[str], None]
) -> None:
    with replay_server() as url, started("ask_often", backend, url) as process:
        outcome = measured(process)
    assert outcome["completed"] == 100_000
    first, second = outcome["grown"]
    assert (
        2 * min(first, second) <= 2**20
    )  # a leak grows in either half, an allocator's heap by chance in one
    assert outcome["blocks"] < 1_000
    figure(f"{(first + second) // 1024} KiB and {outcome['blocks']} objects more, bound 1 MiB")
