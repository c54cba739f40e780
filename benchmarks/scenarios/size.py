"""Size: what a chunk costs when it is larger."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._base import Variant
from ._rounds import RoundsScenario

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Size"]


def _variant(size: int, chunks: int, rounds: int) -> Variant:
    full = {"requests": 32, "chunks": chunks, "size": size, "warm": chunks, "rounds": rounds}
    quick = {**full, "chunks": 4, "warm": 2, "rounds": 1} if size == 65536 else None
    return Variant(str(size), full, quick, seconds=0.25)


class Size(RoundsScenario):
    name = "size"
    title = "32 requests in flight in bursts, chunks of 16 B to 64 KiB, streamed"
    shown: ClassVar[Mapping[str, str]] = {"mb_per_s": "MB/s"}
    variants: ClassVar[tuple[Variant, ...]] = (
        _variant(16, 200, 5),
        _variant(256, 200, 5),
        _variant(4096, 50, 5),
        _variant(65536, 4, 8),
    )
