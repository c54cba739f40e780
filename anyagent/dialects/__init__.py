"""Dialects: how messages are spelled on a wire, and what lanes it has.

A lane is what a wire lets a request be told apart by. It is the one idea in which dialects differ: a
request holds a lane from before its message is written until its terminal has arrived or, where the
wire can cancel and no lane is used twice, until the cancel is queued.

`for_agent` chooses between `NATIVE` and `SINGLE` by the agent's first ``OM.Status``. Another wire is one
more file with a subclass of `Dialect`, whose instance is given to `open_agent` as ``dialect=``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._base import Dialect
from .native import NATIVE
from .single import SINGLE

if TYPE_CHECKING:
    from ..om import Status

__all__ = ["NATIVE", "SINGLE", "Dialect", "by_name", "for_agent"]


def for_agent(status: Status) -> Dialect:
    """The dialect that an agent negotiates with its first `status`: `NATIVE` if it lists ``"ids"``."""
    return NATIVE if "ids" in status.features else SINGLE


def by_name(name: str) -> Dialect:
    """The built-in dialect called `name`, ``"native"`` or ``"single"``; raises `ValueError` for any other."""
    for dialect in (NATIVE, SINGLE):
        if dialect.name == name:
            return dialect
    raise ValueError(f"dialect must be 'native', 'single' or a Dialect, not {name!r}")
