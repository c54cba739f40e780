"""Runs the applications of `tests.acceptance.programs`, and plays agents for them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..wire_server import WireServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..wire_server import Script

__all__ = ["BACKENDS", "DEADLINE", "ROOT", "measured", "playing", "started"]

BACKENDS: Final = ("asyncio", "trio")

DEADLINE: Final = 120.0
"""Seconds. Nothing waits for so long unless a test fails."""

ROOT: Final = Path(__file__).parents[2]
"""Where ``python -m`` finds the programs."""


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The process of one program, with pipes. It is killed if the block leaves it behind."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.acceptance.programs", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def measured(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a program says; it may have said nothing else."""
    out, err = process.communicate(timeout=DEADLINE)
    assert err == ""
    found: dict[str, Any] = json.loads(out)
    return found


@contextlib.contextmanager
def playing(script: Script) -> Iterator[WireServer]:
    """Play `script` for whoever connects; what it raises comes out."""
    server = WireServer(script, "127.0.0.1")
    try:
        yield server
    except BaseException:
        server.abort()
        raise
    finally:
        server.stop()
    for error in server.errors:
        raise error
