"""Latency: how long it takes from the server's write to the consumer's next line."""

from __future__ import annotations

import time
from statistics import quantiles
from typing import TYPE_CHECKING, ClassVar, Final

import anyio

from .. import wire
from ._base import ConnectedScenario, Stopwatch, Variant
from ._rounds import SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..clients._base import Adapter, Client
    from ..results import Measurement
    from ._base import Job

__all__ = ["Latency"]

_DIGITS: Final = 20  # of the time at the beginning of a probe's chunk
_UNMEASURED: Final = 0.1  # of the probe's chunks, at the beginning


async def _probe(client: Client) -> list[int]:
    """Nanoseconds that each chunk took."""
    taken = []
    async with await client.send_message(wire.PROBE) as answer:
        async for event in answer:
            taken.append(time.monotonic_ns() - int(event.text[:_DIGITS]))
    return taken


async def _consume(client: Client) -> None:
    async with await client.send_message(wire.PROMPT) as answer:
        async for _ in answer:
            pass


class Latency(ConnectedScenario):
    """One request gets a chunk every 2 ms, with nothing else (``idle``) or among others (``load``).

    Both processes read the same clock, as they do on Linux. Extra: ``p99``.
    """

    name = "latency"
    title = (
        "from the server's write to the consumer's line: a chunk every 2 ms, alone or while 100 other "
        "requests get 100 chunks a second each"
    )
    unit = "µs (median)"
    needs_many = True
    shown: ClassVar[Mapping[str, str]] = {"p99": "p99"}
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant("idle", {"requests": 1, "chunks": 500, "rate": 100}, None, seconds=1.2, central=True),
        Variant(
            "load",
            {"requests": 101, "chunks": 500, "rate": 100},
            {"requests": 11, "chunks": 20, "rate": 100},
            seconds=1.3,
        ),
    )

    async def measure(self, job: Job, adapter: Adapter, parameters: Mapping[str, int]) -> Measurement:
        chunks, load = parameters["chunks"], parameters["requests"] - 1
        async with self.connect(
            job, adapter, "probe", chunks=chunks, load=load, rate=parameters["rate"], size=SIZE
        ) as client:
            with Stopwatch(job) as watch:
                async with anyio.create_task_group() as tasks:
                    for _ in range(load):
                        tasks.start_soon(_consume, client)
                    taken = await _probe(client)
        if len(taken) != chunks:
            raise RuntimeError(f"{len(taken)} chunks of the probe arrived instead of {chunks}")
        measured = taken[int(chunks * _UNMEASURED) :]
        cuts = quantiles(measured, n=100, method="inclusive")
        return watch.measurement(cuts[49] / 1e3, p99=cuts[98] / 1e3, samples=len(measured))
