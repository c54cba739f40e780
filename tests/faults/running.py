"""An event loop for each example of a property test, in real time, because there are sockets in it."""

from __future__ import annotations

import asyncio
import gc
import warnings
from typing import TYPE_CHECKING

import anyio

from .proxy import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

__all__ = ["quick_garbage_collection", "run"]


def run(backend: str, function: Callable[[], Awaitable[None]], *, collect_garbage: bool) -> None:
    """Run `function` in an event loop of its own. A hang, a task that is left or a warning is an error.

    What was not closed warns when it is collected as garbage, which takes some time.
    """

    async def under_deadline() -> None:
        with anyio.fail_after(DEADLINE):
            await function()
        if backend == "asyncio":
            assert asyncio.all_tasks() == {asyncio.current_task()}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        anyio.run(under_deadline, backend=backend)
        if collect_garbage:
            gc.collect()
    assert [str(warning.message) for warning in caught] == []


def quick_garbage_collection() -> Iterator[None]:
    """For a fixture: what there is before the tests is left out of every collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
