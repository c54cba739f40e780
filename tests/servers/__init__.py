"""Agents on WebSocket servers that this project did not write, each run in a process of its own.

`running` starts one, `on_demand` each of them when it is first asked for. The process binds a free port of
127.0.0.1, prints ``PORT n`` once it accepts connections, and exits when its stdin is closed, so that it
cannot outlive the tests, however those end. What the agents answer is said in `tests.servers.agent`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["ENDPOINTS", "NAMES", "on_demand", "running"]

_ROOT = Path(__file__).parents[2]
_NODE = Path(__file__).parent / "node"
_START_TIMEOUT = 20  # seconds, as the two below
_STOP_TIMEOUT = 20
_INSTALL_TIMEOUT = 120

_MODULES = {
    "websockets": ("websockets_agent",),
    "aiohttp": ("aiohttp_agent",),
    "uvicorn-websockets": ("starlette_agent", "websockets-sansio"),
    "uvicorn-wsproto": ("starlette_agent", "wsproto"),
    "raw": ("raw",),
}

NAMES = (*_MODULES, "node")
"""What `running` can start."""

ENDPOINTS = tuple(
    f"{name}/{wire}{framing}"
    for name in NAMES
    for wire in ("native", "single")
    for framing in (("/fragmented", "/coalesced", "/dribbled") if name == "raw" else ("",))
)
"""Every server with every path that it serves: ``name/wire``, or ``raw/wire/framing``."""


@contextlib.contextmanager
def running(name: str) -> Iterator[str]:
    """Start the server `name` and yield its base URL (``ws://127.0.0.1:PORT``); end it on leaving.

    Raises `RuntimeError`, with all that the server wrote to its stderr, if it is not ready in time, or if it
    has written anything there by the time it is ended: a server that complains has met a fault.
    """
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            _command(name), cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with _at_most(_START_TIMEOUT, process):
                word, _, port = process.stdout.readline().decode().strip().partition(" ")
            if word == "PORT":
                yield f"ws://127.0.0.1:{port}"
        finally:
            with _at_most(_STOP_TIMEOUT, process):
                process.stdin.close()
                process.wait()
        errors.seek(0)
        complaint = errors.read().decode(errors="replace")
        if word != "PORT" or complaint or process.returncode:
            failure = "complained" if word == "PORT" else "did not get ready"
            raise RuntimeError(f"server {name!r} {failure} (exit status {process.returncode}):\n{complaint}")


@contextlib.contextmanager
def on_demand() -> Iterator[Callable[[str], str]]:
    """Yield a function from ``name/path`` to its URL, which starts each server once; end them on leaving."""
    with contextlib.ExitStack() as servers:
        base_url = functools.cache(lambda name: servers.enter_context(running(name)))

        def url(endpoint: str) -> str:
            name, _, path = endpoint.partition("/")
            return f"{base_url(name)}/{path}"

        yield url


@contextlib.contextmanager
def _at_most(seconds: float, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill `process` if the block takes longer: whatever waits for it there is then woken."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _command(name: str) -> list[str]:
    if name == "node":
        return _node_command()
    module, *arguments = _MODULES[name]
    return [sys.executable, "-W", "error", "-m", f"tests.servers.{module}", *arguments]


def _node_command() -> list[str]:
    """The command of the Node server; installs what it needs (``ws``) where that has not been done."""
    if not (_NODE / "node_modules" / "ws").exists():
        npm = [_program("npm"), "install", "--no-audit", "--no-fund", "--no-package-lock"]
        subprocess.run(npm, cwd=_NODE, check=True, stdout=subprocess.DEVNULL, timeout=_INSTALL_TIMEOUT)
    return [_program("node"), str(_NODE / "server.mjs")]


def _program(name: str) -> str:
    # The extra `test` brings both, beside the interpreter, which need not be on the PATH.
    path = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    if path is None:
        raise RuntimeError(f"the tests need {name!r}: install Node.js 20 or newer, or the extra 'test'")
    return path
