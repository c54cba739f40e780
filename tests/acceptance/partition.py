"""An agent in a network namespace of its own, beyond a link that is taken down: no FIN, no RST, no ICMP.

``unshare --net python -m tests.acceptance.partition BACKEND SIDE`` takes the end of SIDE ("client" or
"agent") down, and prints what it measured as JSON. The namespaces, and the link with them, end with the
processes in them, however those end.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Final
from urllib.parse import urlsplit

import anyio

from .pending import AGENT, Silence, go_silent

_CLIENT_ADDRESS: Final = "192.0.2.1"  # of the documentation's network: RFC 5737
_AGENT_ADDRESS: Final = "192.0.2.2"


def _link(agent: int) -> dict[str, list[str]]:
    """Connect this namespace to that of process `agent`; return what takes either end down."""
    sides = {"client": ["ip"], "agent": ["nsenter", f"--net=/proc/{agent}/ns/net", "ip"]}
    _run("ip", "link", "add", "client", "type", "veth", "peer", "name", "agent", "netns", str(agent))
    for side, address in (("client", _CLIENT_ADDRESS), ("agent", _AGENT_ADDRESS)):
        _run(*sides[side], "address", "add", f"{address}/24", "dev", side)
        _run(*sides[side], "link", "set", side, "up")
    return {side: [*ip, "link", "set", side, "down"] for side, ip in sides.items()}


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def measure(backend: str, side: str) -> Silence:
    with subprocess.Popen(
        [
            "unshare",
            "--net",
            sys.executable,
            "-m",
            "anyagent",
            "serve",
            AGENT,
            "--host",
            "0.0.0.0",
            "--port",
            "0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as agent:
        try:
            assert agent.stdout is not None
            port = urlsplit(agent.stdout.readline().decode().strip()).port
            down = _link(agent.pid)[side]
            url = f"ws://{_AGENT_ADDRESS}:{port}/"
            return anyio.run(go_silent, url, lambda: anyio.run_process(down), backend=backend)
        finally:
            agent.kill()


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measure(*sys.argv[1:]))))
