"""What a run must show: ratios between rows of one run, and limits of single rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .results import Results

__all__ = ["AIMS", "FLOORS", "Floor", "Judgement", "judge"]

RowKey = tuple[str, str, str]


@dataclass(frozen=True)
class Floor:
    """The median of `row`, by that of `baseline` if there is one, is at most `limit` (`None`: an aim)."""

    row: RowKey
    baseline: RowKey | None
    limit: float | None

    @property
    def name(self) -> str:
        scenario, variant, client = self.row
        if self.baseline is None:
            return f"{scenario}/{variant} {client}"
        _, other_variant, other_client = self.baseline
        if other_client == client:
            return f"{scenario}/{variant} / {other_variant} {client}"
        return f"{scenario}/{variant} {client} / {other_client}"


@dataclass(frozen=True)
class Judgement:
    """A floor, and what a run says of it; `value` is `None` where the run has not measured it."""

    floor: Floor
    value: float | None

    @property
    def passed(self) -> bool | None:
        """`None` where nothing can be said, or where there is no limit."""
        if self.value is None or self.floor.limit is None:
            return None
        return self.value <= self.floor.limit


def _against(scenario: str, variant: str, client: str, baseline: str, limit: float | None = None) -> Floor:
    return Floor((scenario, variant, client), (scenario, variant, baseline), limit)


_ASYNCIO, _TRIO = "anyagent-asyncio", "anyagent-trio"
_BURST = ("burst", "streamed")
_STREAMED = ("interleaved", "streamed-1000")
_COLLECTED = ("interleaved", "collected-1000")
_IDLE = ("latency", "idle")

FLOORS: Final = (
    _against(*_BURST, _ASYNCIO, "aiohttp", 0.65),
    _against(*_BURST, _TRIO, "aiohttp", 0.85),
    _against(*_BURST, _ASYNCIO, "replaced", 0.35),
    _against(*_BURST, _TRIO, "replaced", 0.45),
    _against(*_BURST, _TRIO, "trio-websocket", 0.07),
    _against(*_COLLECTED, _ASYNCIO, "aiohttp", 0.75),
    _against(*_COLLECTED, _TRIO, "aiohttp", 0.85),
    _against(*_STREAMED, _ASYNCIO, "aiohttp", 1.0),
    _against(*_STREAMED, _TRIO, "aiohttp", 1.0),
    _against(*_STREAMED, _TRIO, "trio-websocket", 0.1),
    _against(*_IDLE, _ASYNCIO, "aiohttp", 1.2),
    _against(*_IDLE, _ASYNCIO, "websockets", 1.2),
    _against(*_IDLE, _TRIO, "trio-websocket", 1.0),
    *(
        Floor(("interleaved", "collected-10000", client), ("interleaved", "collected-32", client), 2.0)
        for client in (_ASYNCIO, _TRIO)
    ),
    *(Floor(("memory", "handles", client), None, 4096.0) for client in (_ASYNCIO, _TRIO)),
    *(_against("batch", "long", _ASYNCIO, peer, 1 / 3) for peer in ("replaced", "aiohttp")),
    _against("import", "cpu", _ASYNCIO, "libraries-asyncio", 1.3),
    _against("import", "cpu", _TRIO, "libraries-trio", 1.3),
)
"""What must hold."""

AIMS: Final = (
    _against(*_BURST, _ASYNCIO, "picows"),
    *(_against(*_BURST, _TRIO, peer) for peer in ("aiohttp", "websockets", "picows", "httpx-ws")),
    *(_against(*_BURST, client, "floor") for client in (_ASYNCIO, _TRIO)),
    _against("batch", "long", _TRIO, "aiohttp"),
    *(_against("batch", "short", _ASYNCIO, peer) for peer in ("replaced", "replaced-16", "aiohttp")),
)
"""What is worth knowing."""


def judge(results: Results, floors: tuple[Floor, ...] = FLOORS) -> list[Judgement]:
    """What `results` says of each of `floors`."""
    return [Judgement(floor, _value(results, floor)) for floor in floors]


def _value(results: Results, floor: Floor) -> float | None:
    row = results.row(*floor.row)
    if row is None or floor.baseline is None:
        return None if row is None else row.median
    baseline = results.row(*floor.baseline)
    return None if baseline is None or not baseline.median else row.median / baseline.median
