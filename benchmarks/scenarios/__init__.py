"""The scenarios, in the order of the tables."""

from __future__ import annotations

from typing import Final

from ._base import FLOOR, Job, Scenario, Variant
from .batch import Batch
from .burst import Burst
from .cancel import Cancel
from .connect import Connect
from .imports import Imports
from .interleaved import Interleaved
from .latency import Latency
from .memory import Memory
from .paced import Paced
from .size import Size

__all__ = ["ALL", "FLOOR", "Job", "Scenario", "Variant", "find"]

ALL: Final[tuple[Scenario, ...]] = (
    Burst(),
    Interleaved(),
    Size(),
    Paced(),
    Latency(),
    Cancel(),
    Memory(),
    Batch(),
    Connect(),
    Imports(),
)


def find(name: str) -> Scenario:
    """The scenario `name`; raises `KeyError`."""
    for scenario in ALL:
        if scenario.name == name:
            return scenario
    raise KeyError(name)
