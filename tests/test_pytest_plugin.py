"""The pytest plugin, in the test runs of others and in this one."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from anyagent.testing import AgentReply, EmbeddedAgent

from .raw_client import connect

if TYPE_CHECKING:
    from pathlib import Path

    from anyagent import im
    from anyagent.testing.pytest_plugin import EmbeddedAgentFactory


def run(*arguments: str, cwd: Path) -> str:
    """Run this Python and return what it writes, whatever becomes of it."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        timeout=60,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ).stdout


def test_the_fixture_makes_agents(embedded_agent: EmbeddedAgentFactory) -> None:
    async def shout(message: im.UserMessage, reply: AgentReply) -> None:
        await reply.text(message.text.upper())

    echoing = embedded_agent()
    shouting = embedded_agent(shout, wire="single")
    assert isinstance(echoing, EmbeddedAgent)
    with connect(echoing.url) as client, connect(shouting.url) as other:
        client.prompt("hello", id="a")
        other.prompt("hello")
        assert client.receive()["text"] == "hello"
        assert other.receive()["text"] == "HELLO"


def test_the_fixture_is_there_without_an_import_and_closes_its_agents_after_each_test(tmp_path: Path) -> None:
    (tmp_path / "test_application.py").write_text("""
import socket

import pytest

agents = []


def test_one(embedded_agent):
    agents.extend([embedded_agent(), embedded_agent(max_in_flight=1)])
    for agent in agents:
        socket.create_connection(("127.0.0.1", agent.port), timeout=10).close()


def test_two():
    assert len(agents) == 2
    for agent in agents:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", agent.port), timeout=10)
""")
    output = run("-m", "pytest", "-W", "error", "-p", "no:cacheprovider", cwd=tmp_path)
    assert "2 passed" in output, output


def test_the_fixture_is_documented_in_the_list_of_fixtures(tmp_path: Path) -> None:
    output = run("-m", "pytest", "--fixtures", "-p", "no:cacheprovider", cwd=tmp_path)
    assert "A factory of embedded agents" in output, output


def test_loading_the_plugin_imports_neither_the_agent_nor_its_server(tmp_path: Path) -> None:
    program = """
import sys
import anyagent.testing.pytest_plugin
print(sorted(name for name in sys.modules if name.startswith(("anyagent.testing", "websockets"))))
"""
    assert run("-c", program, cwd=tmp_path) == "['anyagent.testing', 'anyagent.testing.pytest_plugin']\n"


@pytest.mark.parametrize(
    "name", ["embedded_agent", "EmbeddedAgent", "AgentReply", "Handler", "echo", "faults"]
)
def test_the_names_of_the_testing_module_can_be_imported_first_of_all(name: str, tmp_path: Path) -> None:
    program = f"from anyagent.testing import {name}; print({name}.__class__.__name__ != '')"
    assert run("-W", "error", "-c", program, cwd=tmp_path) == "True\n"
