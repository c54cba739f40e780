"""Connect: what a connection costs that is made for one question."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, ClassVar

from .. import wire
from ._base import ConnectedScenario, Stopwatch, Variant
from ._rounds import SIZE, check

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..clients._base import Adapter
    from ..results import Measurement
    from ._base import Job

__all__ = ["Connect"]


class Connect(ConnectedScenario):
    """Open, first status, a question with an answer of one chunk, close; one cycle after the other.

    Extra: ``cpu``, in µs per cycle.
    """

    name = "connect"
    title = "open a connection, ask for one chunk, close"
    unit = "µs per cycle (median)"
    shown: ClassVar[Mapping[str, str]] = {"cpu": "µs CPU"}
    variants: ClassVar[tuple[Variant, ...]] = (Variant("cycle", {"cycles": 100}, {"cycles": 5}, seconds=0.2),)

    async def measure(self, job: Job, adapter: Adapter, parameters: Mapping[str, int]) -> Measurement:
        taken: list[float] = []
        await self._cycle(job, adapter)
        with Stopwatch(job) as watch:
            for _ in range(parameters["cycles"]):
                start = time.perf_counter()
                await self._cycle(job, adapter)
                taken.append(time.perf_counter() - start)
        return watch.measurement(median(taken) * 1e6, cpu=watch.cpu / parameters["cycles"] * 1e6)

    async def _cycle(self, job: Job, adapter: Adapter) -> None:
        async with self.connect(job, adapter, "round", requests=1, chunks=1, size=SIZE) as client:
            check(len((await client.ask(wire.PROMPT)).text), SIZE)
