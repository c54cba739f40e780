"""Paced: what it costs to keep up with many agents that write at their own speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .. import wire
from ._base import ConnectedScenario, Stopwatch, Variant
from ._rounds import SIZE, play_round

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..clients._base import Adapter
    from ..results import Measurement
    from ._base import Job

__all__ = ["Paced"]


class Paced(ConnectedScenario):
    """`requests` in flight get `rate` chunks a second each, `chunks` in all.

    Extra: ``cpu_share`` (CPU seconds per second), and ``wall_over_nominal``, which is well over 1 for a
    client that did not keep up.
    """

    name = "paced"
    title = "1,000 requests in flight, 50 chunks a second each, streamed"
    unit = "µs CPU per chunk"
    needs_many = True
    shown: ClassVar[Mapping[str, str]] = {"cpu_share": "CPU s/s", "wall_over_nominal": "wall / nominal"}
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant(
            "1000",
            {"requests": 1000, "rate": 50, "chunks": 150},
            {"requests": 100, "rate": 50, "chunks": 5},
            seconds=3.7,
        ),
    )

    async def measure(self, job: Job, adapter: Adapter, parameters: Mapping[str, int]) -> Measurement:
        requests, chunks, rate = parameters["requests"], parameters["chunks"], parameters["rate"]
        async with self.connect(
            job, adapter, "round", requests=requests, chunks=5, size=SIZE, order="interleaved"
        ) as client:
            await play_round(client, adapter, requests, 5 * SIZE, prompt=wire.WARM_UP)
        async with self.connect(job, adapter, "paced", size=SIZE, **parameters) as client:
            with Stopwatch(job) as watch:
                await play_round(client, adapter, requests, chunks * SIZE)
        total = requests * chunks
        return watch.measurement(
            watch.cpu / total * 1e6,
            chunks=total,
            cpu_share=watch.cpu / watch.wall,
            wall_over_nominal=watch.wall / (chunks / rate),
        )
