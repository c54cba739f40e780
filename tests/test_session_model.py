"""Whatever an application and an agent do to a connection, every request has one outcome: the right one."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .model.exact import play
from .model.plans import WIRES, Plan, Wire, plans
from .model.races import race
from .properties import REPEATABLE, run

if TYPE_CHECKING:
    from collections.abc import Iterator

each_wire = pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
each_backend = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.fixture(autouse=True, scope="module")
def _quick_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@each_wire
@each_backend
@settings(REPEATABLE, max_examples=120)
@given(plan=plans, leave_at_once=st.booleans())
def test_the_session_does_what_its_model_does(
    backend: str, wire: Wire, plan: Plan, leave_at_once: bool
) -> None:
    async def main() -> None:
        await play(plan, wire, leave_at_once=leave_at_once)

    run(backend, main, afterwards=gc.collect)


@each_wire
@each_backend
@settings(REPEATABLE, max_examples=120)
@given(plan=plans, pauses=st.lists(st.integers(0, 3), max_size=40), leave_at_once=st.booleans())
def test_steps_that_race_give_every_request_one_outcome_and_its_own_events(
    backend: str, wire: Wire, plan: Plan, pauses: list[int], leave_at_once: bool
) -> None:
    async def main() -> None:
        await race(plan, pauses, wire, leave_at_once=leave_at_once)

    run(backend, main, afterwards=gc.collect)
