"""Cancel: what it costs to open a request, read one event of it and leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import anyio

from .. import wire
from ._base import ConnectedScenario, Stopwatch, Variant
from ._rounds import SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..clients._base import Adapter, Client
    from ..results import Measurement
    from ._base import Job

__all__ = ["Cancel"]


async def _read_one(client: Client) -> None:
    async with await client.send_message(wire.PROMPT) as answer:
        async for _ in answer:
            return
    raise RuntimeError("an answer ended that should have gone on")


async def _storm(client: Client, requests: int) -> None:
    async with anyio.create_task_group() as tasks:
        for _ in range(requests):
            tasks.start_soon(_read_one, client)


class Cancel(ConnectedScenario):
    """The server answers each cancel with an end, as an agent does; its last one is awaited."""

    name = "cancel"
    title = "5,000 requests, 500 at a time, each left after its first chunk"
    unit = "µs CPU per request"
    needs_many = True
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant("storm", {"requests": 500, "rounds": 10}, {"requests": 50, "rounds": 1}, seconds=0.5),
    )

    async def measure(self, job: Job, adapter: Adapter, parameters: Mapping[str, int]) -> Measurement:
        requests, rounds = parameters["requests"], parameters["rounds"]
        async with self.connect(
            job, adapter, "round", requests=requests, chunks=1, size=SIZE, end=0
        ) as client:
            await _storm(client, requests)
            with Stopwatch(job) as watch:
                for _ in range(rounds):
                    await _storm(client, requests)
                await client.ask(wire.SYNC)
        return watch.measurement(watch.cpu / (rounds * requests) * 1e6, requests=rounds * requests)
