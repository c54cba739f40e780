"""Agents for the tests of applications.

* `embedded_agent` serves an `EmbeddedAgent` on a loopback port, from a thread of its own.
* `memory_agent` gives an agent without socket or thread, whose `MemoryPeer` a test plays by hand.
* A `Handler` answers its requests, by means of an `AgentReply`. `echo` is one; those in `faults` misbehave.

The pytest fixture ``embedded_agent`` needs no import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from . import faults
    from ._embedded import EmbeddedAgent, embedded_agent
    from ._handlers import echo
    from ._memory import MemoryPeer, memory_agent
    from ._reply import AgentReply, Handler

__all__ = [
    "AgentReply",
    "EmbeddedAgent",
    "Handler",
    "MemoryPeer",
    "echo",
    "embedded_agent",
    "faults",
    "memory_agent",
]

_MODULES: Final = {
    "AgentReply": "_reply",
    "EmbeddedAgent": "_embedded",
    "Handler": "_reply",
    "MemoryPeer": "_memory",
    "echo": "_handlers",
    "embedded_agent": "_embedded",
    "faults": "faults",
    "memory_agent": "_memory",
}


def __getattr__(name: str) -> object:  # the pytest plugin is in this package and loaded in every test run
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_MODULES[name]}", __name__)
    return module if name == "faults" else getattr(module, name)
