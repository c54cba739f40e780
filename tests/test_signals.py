"""Ctrl-C and SIGTERM in a program that has requests in flight."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from anyagent import IM
from anyagent.testing import AgentReply, embedded_agent

PROGRAM = """
import sys, anyio
from anyagent import open_agent

async def main(backend, url):
    async with open_agent(url) as agent:
        async with await agent.send_message("Count") as response:
            async for event in response:
                print("started", flush=True)

anyio.run(main, *sys.argv[1:], backend=sys.argv[1])
"""


async def begin(message: IM.UserMessage, reply: AgentReply) -> None:
    await reply.text("one ")
    await reply.hang()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_ctrl_c_tells_the_agent_closes_politely_and_comes_out_as_itself(backend: str) -> None:
    with embedded_agent(begin) as server:
        command = [sys.executable, "-W", "error", "-c", PROGRAM, backend, server.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == "started\n"
            program.send_signal(signal.SIGINT)
            _, stderr = program.communicate(timeout=30)
        assert server.wait_for(lambda message: isinstance(message, IM.Cancel)) == IM.Cancel("1")
        server.wait_for_connections(0)
    assert program.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert "ExceptionGroup" not in stderr
    assert "Warning" not in stderr
