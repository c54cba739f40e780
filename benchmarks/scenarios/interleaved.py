"""Interleaved: what a chunk costs when those of many requests come in turn."""

from __future__ import annotations

from typing import ClassVar

from ._base import Variant
from ._rounds import SIZE, RoundsScenario

__all__ = ["Interleaved"]


_CHUNKS = 32
"""For each request, however many there are: what a chunk costs can then be compared."""
_ROUNDS = {1: 500, 32: 40, 1000: 2, 10_000: 1}
_SECONDS = {1: 0.4, 32: 0.4, 1000: 0.6, 10_000: 6.0}


def _variant(way: str, requests: int) -> Variant:
    full = {
        "requests": requests,
        "chunks": _CHUNKS,
        "size": SIZE,
        "warm": _CHUNKS,
        "rounds": _ROUNDS[requests],
    }
    quick = {**full, "rounds": 1} if requests == 32 else None
    return Variant(f"{way}-{requests}", full, quick, _SECONDS[requests], central=requests == 1000)


class Interleaved(RoundsScenario):
    """From the moment on at which all requests are in flight, to the end of the last one."""

    name = "interleaved"
    title = "requests in flight get 32 chunks each, in turn; streamed, or collected with ask()"
    order = "interleaved"
    held = True
    needs_many = True
    variants: ClassVar[tuple[Variant, ...]] = tuple(
        _variant(way, requests) for way in ("streamed", "collected") for requests in _ROUNDS
    )

    def collects(self, variant: str) -> bool:
        return variant.startswith("collected")
