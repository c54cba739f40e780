"""The servers' side of the protocol that `tests.servers.running` starts them by."""

from __future__ import annotations

import logging
import os
import sys
import threading

__all__ = ["begin", "ready"]


def begin() -> None:
    """Log warnings to stderr, and end this process as soon as its stdin is closed, whatever it is doing."""
    logging.basicConfig()
    threading.Thread(target=_exit_at_end_of_stdin, daemon=True).start()


def _exit_at_end_of_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def ready(port: int) -> None:
    """Say that connections to `port` are accepted from now on."""
    print(f"PORT {port}", flush=True)
