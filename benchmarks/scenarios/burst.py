"""Burst: what a chunk costs when many arrive together."""

from __future__ import annotations

from typing import ClassVar

from ._base import Variant
from ._rounds import SIZE, RoundsScenario

__all__ = ["Burst"]


class Burst(RoundsScenario):
    name = "burst"
    title = "32 requests in flight, 200 chunks each, all chunks of one after the other, streamed"
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant(
            "streamed",
            {"requests": 32, "chunks": 200, "size": SIZE, "warm": 200, "rounds": 10},
            {"requests": 32, "chunks": 20, "size": SIZE, "warm": 20, "rounds": 1},
            central=True,
        ),
    )
