"""The data model of a run: what a worker answers, what is kept, and how it is written down.

Rows are named by scenario, variant and client:

* ``burst``: ``streamed``; CPU µs per chunk
* ``interleaved``: ``streamed-N`` and ``collected-N`` with N of 1, 32, 1000, 10000; CPU µs per chunk
* ``paced``: ``1000``; CPU µs per chunk; extra ``cpu_share`` and ``wall_over_nominal``
* ``latency``: ``idle`` and ``load``; µs, the median; extra ``p99``
* ``cancel``: ``storm``; CPU µs per request
* ``memory``: ``handles`` and ``tasks``; bytes per request
* ``connect``: ``cycle``; µs, the median
* ``import``: ``cpu``; ms of CPU
* ``batch``: ``long`` and ``short``; CPU µs per prompt; extra ``prompts_per_s``
* ``size``: ``16``, ``256``, ``4096``, ``65536`` (bytes of text in a chunk); CPU µs per chunk; extra
  ``mb_per_s``
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FORMAT", "Measurement", "Results", "ResultsError", "Row", "WorkerAnswer", "read", "write"]

FORMAT: Final = 1
"""The version of the JSON format; a file of another one is refused."""


class ResultsError(Exception):
    """A file holds no results, or results of another format."""


class Measurement(msgspec.Struct, frozen=True, omit_defaults=True):
    """One repetition of one row.

    `server_share` is the server's CPU time by the wall time of the measured part; `None` where no server
    takes part.
    """

    value: float
    server_share: float | None = None
    extra: dict[str, float] = {}


class WorkerAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker prints: a measurement, perhaps with a `remark`, or why there is none."""

    label: str
    versions: dict[str, str] = {}
    measurement: Measurement | None = None
    remark: str | None = None
    not_applicable: str | None = None


class Row(msgspec.Struct, omit_defaults=True):
    """All repetitions of one client in one variant of a scenario, in the order in which they ran.

    `extra` has further figures by name, a list as long as `values` each; `remark` says what was different
    for this client. A row without values says why:
    `not_applicable`, or `errors`, one line for each worker that failed.
    """

    scenario: str
    variant: str
    client: str
    unit: str
    values: list[float] = []
    server_share: list[float] = []
    extra: dict[str, list[float]] = {}
    remark: str | None = None
    not_applicable: str | None = None
    errors: list[str] = []

    @property
    def key(self) -> tuple[str, str, str]:
        return self.scenario, self.variant, self.client

    @property
    def median(self) -> float:
        """The median of the values; there must be one."""
        return median(self.values)

    @property
    def spread(self) -> float:
        """The largest value less the smallest, in the row's unit."""
        return max(self.values) - min(self.values)

    def add(self, measurement: Measurement) -> None:
        """Append one repetition."""
        self.values.append(measurement.value)
        if measurement.server_share is not None:
            self.server_share.append(measurement.server_share)
        for name, value in measurement.extra.items():
            self.extra.setdefault(name, []).append(value)


class Results(msgspec.Struct):
    """One run of the suite.

    `date` is ISO 8601, `machine` and `versions` say where it ran, `options` how, `labels` how a client is
    called in tables and plots.
    """

    format: int
    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    options: dict[str, str]
    labels: dict[str, str] = {}
    rows: list[Row] = []

    def row(self, scenario: str, variant: str, client: str) -> Row | None:
        """The row of that name, if it has values."""
        for row in self.rows:
            if row.key == (scenario, variant, client) and row.values:
                return row
        return None

    def label(self, client: str) -> str:
        return self.labels.get(client, client)


class _Header(msgspec.Struct):
    format: int | None = None


def read(path: Path) -> Results:
    """Read what `write` wrote; raises `ResultsError` for anything else, `OSError` if it cannot."""
    data = path.read_bytes()
    try:
        header = msgspec.json.decode(data, type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ResultsError(f"{path} holds no results of this suite") from None
    if header.format is None:
        raise ResultsError(f"{path} holds no results of this suite")
    if header.format != FORMAT:
        raise ResultsError(f"{path} is of format {header.format}; this version reads format {FORMAT}")
    try:
        return msgspec.json.decode(data, type=Results)
    except msgspec.DecodeError as exc:
        raise ResultsError(f"{path} is damaged: {exc}") from None


def write(results: Results, path: Path) -> None:
    """Write `results` as JSON, indented."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
