"""The command ``anyagent``: ask an agent, chat with it, ask it a file of prompts, or serve one to try."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_EXTRA: Final = ("prompt_toolkit", "rich", "typer")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and raise `SystemExit` with its exit code; ``--help`` lists those.

    `arguments` are by default those of the process.
    """
    if any(importlib.util.find_spec(package) is None for package in _EXTRA):
        sys.exit("anyagent: the command needs more packages: pip install 'anyagent[cli]'")
    from ._app import app

    app(arguments, prog_name="anyagent")
