"""What a scenario is, and what the scenarios share: the stopwatch, the rounds."""

from __future__ import annotations

import gc
import importlib.metadata
import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final
from urllib.parse import urlencode

import anyio
import msgspec
import psutil

from .. import clients
from ..results import Measurement, WorkerAnswer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractAsyncContextManager

    from ..clients._base import Adapter, Client

__all__ = ["FLOOR", "ConnectedScenario", "Job", "Scenario", "Stopwatch", "Variant"]

_SHORTEST: Final = 0.1  # seconds; the system counts a process's CPU time in steps of 0.01
FLOOR: Final = "floor"
"""The client that is none: msgspec decodes the messages, and nothing else happens."""


class Job(msgspec.Struct, frozen=True):
    """What a worker is told: one repetition, and where the server is."""

    scenario: str
    variant: str
    client: str
    quick: bool
    port: int
    server_pid: int
    cpu: int | None = None


@dataclass(frozen=True)
class Variant:
    """One row of a scenario.

    * `full`, `quick`: its parameters, in full and for ``--quick`` (`None`: left out there).
    * `seconds`: what a client needs on average, after it has started; for estimates.
    * `central`: gets all repetitions, others three of five.
    """

    name: str
    full: Mapping[str, int]
    quick: Mapping[str, int] | None = None
    seconds: float = 0.4
    central: bool = False

    def repetitions(self, wanted: int) -> int:
        """How many of `wanted` repetitions it gets."""
        return wanted if self.central else math.ceil(wanted * 3 / 5)


class Stopwatch:
    """Measures ``with`` blocks, in seconds: CPU and wall time of this process, CPU time of the server.

    Entered again, or started again, it goes on.
    """

    def __init__(self, job: Job) -> None:
        self._server = psutil.Process(job.server_pid)
        self.cpu = self.wall = self.server_cpu = 0.0

    def start(self) -> None:
        if not self.wall:
            gc.collect()
        self.server_cpu -= self._server_time()
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()

    def stop(self) -> None:
        self.cpu += time.process_time()
        self.wall += time.perf_counter()
        self.server_cpu += self._server_time()

    def __enter__(self) -> Stopwatch:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _server_time(self) -> float:
        times = self._server.cpu_times()
        return times.user + times.system

    def measurement(self, value: float, **extra: float) -> Measurement:
        """What was measured; `value` is the scenario's own figure."""
        share = self.server_cpu / self.wall if self.wall > _SHORTEST else None
        return Measurement(value, share, {**extra, "wall": self.wall})


class Scenario(ABC):
    """One thing that is measured, in a few variants.

    * `name`, `title`: for rows and for headings.
    * `unit`: of the figure.
    * `variants`: by name, in the order of the tables.
    * `pseudo_clients`: what is measured here besides the clients, with labels.
    * `shown`: which of the extra figures belong in a table, with headings.
    * `needs_many`: a client that has one request at a time on a connection cannot take part.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str]
    variants: ClassVar[tuple[Variant, ...]]
    pseudo_clients: ClassVar[Mapping[str, str]] = {}
    shown: ClassVar[Mapping[str, str]] = {}
    needs_many: ClassVar[bool] = False

    def clients(self) -> tuple[str, ...]:
        """Everything that has a row here."""
        return (*clients.NAMES, *self.pseudo_clients)

    def variant(self, name: str) -> Variant:
        """The variant `name`; raises `StopIteration` if there is none."""
        return next(variant for variant in self.variants if variant.name == name)

    def run(self, job: Job) -> WorkerAnswer:
        """One repetition, in a worker; an exception is a failure of the worker."""
        variant = self.variant(job.variant)
        parameters = (variant.quick or variant.full) if job.quick else variant.full
        if job.client in self.pseudo_clients:
            return WorkerAnswer(
                self.pseudo_clients[job.client], measurement=self.measure_pseudo(job, parameters)
            )
        adapter = clients.load(job.client)
        versions = {name: importlib.metadata.version(name) for name in adapter.distributions}
        answer = WorkerAnswer(adapter.label, versions)
        remark = None
        if parameters.get("requests", 1) > 1 and not adapter.multiplexes:
            if self.needs_many:
                reason = "one request at a time on a connection"
                return msgspec.structs.replace(answer, not_applicable=reason)
            remark = "one request after the other"
        measurement = self.measure_client(job, adapter, parameters)
        return msgspec.structs.replace(answer, measurement=measurement, remark=remark)

    @abstractmethod
    def measure_client(self, job: Job, adapter: Adapter, parameters: Mapping[str, int]) -> Measurement:
        """Measure a client."""

    def measure_pseudo(self, job: Job, parameters: Mapping[str, int]) -> Measurement:
        """Measure one of `pseudo_clients`."""
        raise NotImplementedError


class ConnectedScenario(Scenario):
    """A scenario in which clients connect to the replay server."""

    def measure_client(self, job: Job, adapter: Adapter, parameters: Mapping[str, int]) -> Measurement:
        """Run `measure` on the adapter's backend."""
        uvloop = adapter.backend == "uvloop"
        options: dict[str, Any] = {"use_uvloop": True} if uvloop else {}

        async def main() -> Measurement:
            return await self.measure(job, adapter, parameters)

        return anyio.run(main, backend="asyncio" if uvloop else adapter.backend, backend_options=options)

    @abstractmethod
    async def measure(self, job: Job, adapter: Adapter, parameters: Mapping[str, int]) -> Measurement:
        """Measure a client."""

    def connect(
        self, job: Job, adapter: Adapter, plan: str, **options: int | str
    ) -> AbstractAsyncContextManager[Client]:
        """Connect to the replay server, which is to follow `plan`."""
        kind = "ids" if adapter.multiplexes else "single"
        return adapter.connect(f"ws://127.0.0.1:{job.port}/{kind}/{plan}?{urlencode(options)}")
