"""Memory: what an open request holds."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, ClassVar

import anyio
import psutil

from .. import wire
from ._base import ConnectedScenario, Stopwatch, Variant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..clients._base import Adapter, Answer, Client
    from ..results import Measurement
    from ._base import Job

__all__ = ["Memory"]


async def _wait(answer: Answer) -> None:
    async with answer:
        async for _ in answer:
            raise RuntimeError("an answer came that should not")


class Memory(ConnectedScenario):
    """Nothing answers: ``handles`` keeps what `send_message` returned, ``tasks`` has a task wait in each.

    Afterwards all of them are left, as they should be. The figure is the growth of the resident set.
    """

    name = "memory"
    title = "10,000 requests open: their handles, or a waiting task for each as well"
    unit = "bytes per request"
    needs_many = True
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant("handles", {"requests": 10_000}, None, seconds=0.8),
        Variant("tasks", {"requests": 10_000}, {"requests": 100}, seconds=1.2),
    )

    async def measure(self, job: Job, adapter: Adapter, parameters: Mapping[str, int]) -> Measurement:
        requests, process = parameters["requests"], psutil.Process()
        async with self.connect(job, adapter, "hold") as client:
            await client.ask(wire.SYNC)
            watch = Stopwatch(job)
            with watch:
                before = process.memory_info().rss
                if job.variant == "tasks":
                    growth = await self._with_tasks(client, requests, before, process)
                else:
                    growth = await self._handles(client, requests, before, process)
                await client.ask(wire.SYNC)  # the ends of all that was cancelled are through
        return watch.measurement(growth / requests, requests=requests)

    async def _handles(self, client: Client, requests: int, before: int, process: psutil.Process) -> int:
        answers = [await client.send_message(wire.PROMPT) for _ in range(requests)]
        await client.ask(wire.SYNC)
        growth = process.memory_info().rss - before
        async with AsyncExitStack() as stack:
            for answer in answers:
                await stack.enter_async_context(answer)
        return growth

    async def _with_tasks(self, client: Client, requests: int, before: int, process: psutil.Process) -> int:
        async with anyio.create_task_group() as tasks:
            for _ in range(requests):
                tasks.start_soon(_wait, await client.send_message(wire.PROMPT))
            await client.ask(wire.SYNC)
            growth = process.memory_info().rss - before
            tasks.cancel_scope.cancel()
        return growth
