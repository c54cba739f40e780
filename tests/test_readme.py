"""Every code block of the README runs, and its tables name what is there."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import anyagent
from anyagent import IM, OM, Backoff, Heartbeat, Limits, Timeouts

README: Final = Path(__file__).parents[1].joinpath("README.md").read_text()
BLOCKS: Final = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROGRAMS: Final = [block for language, block in BLOCKS if language == "python" and "def test_" not in block]
TESTS: Final = [block for language, block in BLOCKS if language == "python" and "def test_" in block]
SHELL: Final = [
    line.split("  #")[0].strip()
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
]


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "sh", "json", ""}
    assert (len(PROGRAMS), len(TESTS)) == (6, 1)


@pytest.mark.parametrize(
    ("program", "output"),
    [
        (PROGRAMS[0], "Hello, agent! [2 tokens]\nAnd in one go?\n"),
        (PROGRAMS[1], "['Question 0', 'Question 1', 'Question 2']\n"),
        (PROGRAMS[2], "took too long\n2 requests were cancelled\n"),
        (PROGRAMS[4], "1000 answered, 0 failed\n"),
    ],
    ids=["trio", "asyncio", "time limit", "batch"],
)
def test_the_programs_run(program: str, output: str) -> None:
    assert run(sys.executable, "-W", "error", "-c", program) == output


def test_the_program_for_ray_runs() -> None:
    # Ray warns of things of its own.
    rows = run(sys.executable, "-c", PROGRAMS[5]).splitlines()
    assert rows[-2:] == ["Question 0 2 1 None", "Question 1 2 1 None"]


def test_the_example_of_a_test_passes(tmp_path: Path) -> None:
    tmp_path.joinpath("test_example.py").write_text(TESTS[0])
    assert "1 passed" in run(sys.executable, "-m", "pytest", "-q", cwd=tmp_path)


@pytest.mark.parametrize("command", [line for line in SHELL if not line.startswith("pip")])
def test_the_commands_run(command: str, tmp_path: Path) -> None:
    bin_folder = str(Path(sys.executable).parent)
    run("sh", "-c", f'PATH="{bin_folder}:$PATH"; {command}', cwd=tmp_path)


def test_the_two_set_up_commands_install_and_then_run() -> None:
    set_up = [line for line in SHELL if line.startswith("pip install")]
    assert [line.split("&&")[1].split()[:2] for line in set_up] == [["anyagent", "ask"], ["coverage", "run"]]
    bin_folder = str(Path(sys.executable).parent)
    main_job = set_up[0].split("&&")[1]
    assert run("sh", "-c", f'PATH="{bin_folder}:$PATH"; {main_job}').strip() == "Hello, agent!"


def test_the_messages_of_the_wire_are_what_the_package_speaks() -> None:
    outgoing, incoming = (block.splitlines() for language, block in BLOCKS if language == "json")
    for line in outgoing:
        message = OM.decode(line.encode())
        assert not isinstance(message, OM.Unknown)
        assert OM.decode(OM.encode(message)) == message
    for line in incoming:
        client_message = IM.decode(line)
        assert IM.decode(IM.encode(client_message)) == client_message
    assert {type(OM.decode(line.encode())).__name__ for line in outgoing} == {
        "Status",
        "EventTextChunk",
        "EventReasoningChunk",
        "EventToolCall",
        "EventEnd",
        "Error",
        "GracefulDisconnect",
    }


def test_the_settings_table_gives_every_field_and_its_default() -> None:
    table = dict(re.findall(r"^\| `([A-Z]\w+\.\w+)` \| ([\d,.]+ \w+|`?\w+`?)", README, re.MULTILINE))
    expected = {}
    for config in (Limits(), Timeouts(), Heartbeat(), Backoff()):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            match value:
                case str():
                    shown = f"`{value}`"
                case None:
                    shown = "none"
                case _:
                    shown = f"{value // 2**20} MiB" if value == 16 * 2**20 else f"{value:,}"
            expected[f"{type(config).__name__}.{field.name}"] = shown
    assert table.keys() == expected.keys()
    for name, shown in expected.items():
        assert table[name].startswith(shown), name


def test_every_promise_names_a_test_that_is_there() -> None:
    promised = re.findall(r"^\| .* \| `(test_\w+)` \|$", README, re.MULTILINE)
    tests = {
        name
        for path in Path(__file__).parent.rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }
    assert len(promised) > 30
    assert set(promised) - tests == set()


def test_the_error_tree_names_every_error() -> None:
    names = {
        name
        for name in anyagent.__all__
        if isinstance(getattr(anyagent, name), type)
        and issubclass(getattr(anyagent, name), anyagent.AnyAgentError)
    }
    assert set(re.findall(r"(?:^|── )(\w+Error|Disconnected)\b", README, re.MULTILINE)) >= names
