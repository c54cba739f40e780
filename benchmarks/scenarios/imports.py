"""Import: what a program pays before it can connect."""

from __future__ import annotations

import subprocess
import sys
from statistics import median
from typing import TYPE_CHECKING, ClassVar, Final

from ..results import Measurement
from ._base import Scenario, Variant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..clients._base import Adapter
    from ._base import Job

__all__ = ["Imports"]

# In an interpreter of its own, which has imported nothing else; `time` and `sys` are part of the executable.
_PROGRAM: Final = """
import sys, time
start = time.process_time()
for name in sys.argv[1:]:
    __import__(name)
print(time.process_time() - start)
"""
_LIBRARIES: Final = {
    "libraries-asyncio": (
        "anyio",
        "msgspec",
        "asyncio",
        "anyio._backends._asyncio",
        "websockets.client",
        "websockets.protocol",
        "websockets.uri",
    ),
    "libraries-trio": ("anyio", "msgspec", "trio", "anyio._backends._trio", "trio_websocket"),
}


class Imports(Scenario):
    """Imports a client's modules; the ``libraries`` are what anyagent imports, without anyagent."""

    name = "import"
    title = "import what the client needs before it can connect"
    unit = "ms CPU"
    pseudo_clients: ClassVar[Mapping[str, str]] = {
        "libraries-asyncio": "libraries (asyncio)",
        "libraries-trio": "libraries (trio)",
    }
    variants: ClassVar[tuple[Variant, ...]] = (Variant("cpu", {}, {}),)

    def measure_client(self, job: Job, adapter: Adapter, parameters: Mapping[str, int]) -> Measurement:
        return _import(adapter.modules)

    def measure_pseudo(self, job: Job, parameters: Mapping[str, int]) -> Measurement:
        return _import(_LIBRARIES[job.client])


def _import(modules: tuple[str, ...]) -> Measurement:
    command = [sys.executable, "-c", _PROGRAM, *modules]
    seconds = []
    for _ in range(8):
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds.append(float(answer.stdout))
    # The first one may compile, and fills the system's caches.
    return Measurement(median(seconds[1:]) * 1e3, None, {"modules": len(modules)})
