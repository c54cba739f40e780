"""An agent that is there no more, and says nothing: noticed in time, by the heartbeat alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from ..cli_runner import BACKENDS, DEADLINE, started
from .pending import AGENT, BEGUN, FAIL_BOUND, LEAVE_BOUND, LOST, Silence, go_silent

if TYPE_CHECKING:
    from collections.abc import Callable

_ROOT = Path(__file__).parents[2]
_TOOLS = ("ip", "nsenter", "unshare")


def check(silence: Silence, figure: Callable[[str], None]) -> None:
    figure(
        f"{len(silence.codes)} requests failed within {silence.failed:.2f} s, bound {FAIL_BOUND} s; "
        f"left in {silence.left:.2f} s, bound {LEAVE_BOUND} s"
    )
    assert silence.codes == (BEGUN + LOST) * [1006]
    assert silence.phases.count("started") == BEGUN
    assert silence.failed < FAIL_BOUND
    assert silence.left < LEAVE_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_agent_fails_all_requests_in_time(backend: str, figure: Callable[[str], None]) -> None:
    with started("serve", AGENT, "--port", "0") as agent:
        assert agent.stdout is not None
        url = agent.stdout.readline().decode().strip()

        async def freeze() -> None:
            agent.send_signal(signal.SIGSTOP)

        check(anyio.run(go_silent, url, freeze, backend=backend), figure)


def skip_without_namespaces() -> None:
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and {', '.join(_TOOLS)} for a network namespace")
    probe = ["unshare", "--net", "ip", "link", "add", "client", "type", "veth", "peer", "name", "agent"]
    refused = subprocess.run(probe, capture_output=True, text=True, timeout=DEADLINE)
    if refused.returncode != 0:
        pytest.skip(f"network namespaces are refused here: {refused.stderr.strip()}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["client", "agent"])
def test_a_partition_without_rst_fails_all_requests_in_time(
    backend: str, side: str, figure: Callable[[str], None]
) -> None:
    skip_without_namespaces()
    command = ["unshare", "--net", sys.executable, "-W", "error", "-m", "tests.acceptance.partition"]
    with subprocess.Popen(
        [*command, backend, side],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as client:
        try:
            output, complaint = client.communicate(timeout=DEADLINE)
        finally:
            if client.poll() is None:
                os.killpg(client.pid, signal.SIGKILL)
    assert (client.returncode, complaint) == (0, b"")
    check(Silence(**json.loads(output)), figure)
