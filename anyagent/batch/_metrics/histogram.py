"""Durations in a fixed amount of memory: how many fell into each of some hundred buckets."""

from __future__ import annotations

import itertools
import math
from math import log10
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BUCKETS_PER_DECADE", "SHORTEST", "Histogram", "Percentiles", "lower_edge", "quantile"]

SHORTEST: Final = 1e-6  # seconds; durations below are not told apart
_LONGEST: Final = 86_400.0  # seconds; neither are those above

BUCKETS_PER_DECADE: Final = 60  # so the middle of a bucket is at most 1.94 % away from what is in it
_SCALE: Final = float(BUCKETS_PER_DECADE)
_OFFSET: Final = -_SCALE * log10(SHORTEST)
_BUCKETS: Final = int(log10(_LONGEST) * _SCALE + _OFFSET) + 1


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """What is said of `count` durations, in seconds. The percentiles are within 2 %, the rest is exact."""

    count: int
    p50: float
    p90: float
    p99: float
    mean: float
    min: float
    max: float


class Histogram:
    """Durations in seconds, told apart from a microsecond to a day. `counts`: how many are in each bucket."""

    __slots__ = ("_total", "counts", "max", "min")

    def __init__(self) -> None:
        self.counts = [0] * _BUCKETS
        self.min = math.inf
        self.max = -math.inf
        self._total = 0.0

    def record(self, seconds: float) -> None:
        """Add one."""
        self._total += seconds
        if seconds < self.min:
            self.min = seconds
        if seconds > self.max:
            self.max = seconds
        try:
            self.counts[int(log10(seconds) * _SCALE + _OFFSET) if seconds > SHORTEST else 0] += 1
        except IndexError:
            self.counts[-1] += 1

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self.counts)

    def filled(self) -> dict[int, int]:
        """The counts of the buckets that are not empty."""
        return {bucket: count for bucket, count in enumerate(self.counts) if count}

    def since(self, earlier: list[int]) -> dict[int, int]:
        """How many have come into which bucket since `counts` was `earlier`."""
        return {
            bucket: count - before
            for bucket, (count, before) in enumerate(zip(self.counts, earlier, strict=True))
            if count != before
        }

    def percentiles(self) -> Percentiles | None:
        """What is said of them; ``None`` if there are none."""
        filled = self.filled()
        if not filled:
            return None
        count = self.count
        p50, p90, p99, mean = (
            min(max(figure, self.min), self.max)  # neither a bucket's middle nor a rounded sum goes beyond
            for figure in (*(quantile(filled, share) for share in (0.5, 0.9, 0.99)), self._total / count)
        )
        return Percentiles(count=count, p50=p50, p90=p90, p99=p99, mean=mean, min=self.min, max=self.max)


def lower_edge(bucket: int) -> float:
    """The shortest duration of `bucket`, in seconds; bucket 0 has all that are shorter, too."""
    return SHORTEST * 10.0 ** (bucket / BUCKETS_PER_DECADE)  # type: ignore[no-any-return]  # int ** may be either


def quantile(counts: Mapping[int, int], share: float) -> float:
    """The shortest duration that is not exceeded by `share` of those in `counts`, by bucket; 0 in bucket 0.

    There must be one.
    """
    rank = math.ceil(share * sum(counts.values()))
    buckets = sorted(counts)
    reached = itertools.accumulate(counts[bucket] for bucket in buckets)
    bucket = next(bucket for bucket, number in zip(buckets, reached, strict=True) if number >= rank)
    return lower_edge(bucket) * 10.0 ** (0.5 / BUCKETS_PER_DECADE) if bucket else 0.0
