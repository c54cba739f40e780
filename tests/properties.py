"""What the property tests share: their settings, messages of every kind, an event loop for each example."""

from __future__ import annotations

import asyncio
import warnings
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel
from hypothesis import Phase, settings
from hypothesis import strategies as st

from anyagent import IM, OM

from .clocks import jumping

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["CLIENT_MESSAGES", "REPEATABLE", "SERVER_MESSAGES", "TEXTS", "chain", "run", "settle"]

REPEATABLE: Final = settings(
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
"""The same examples in every run; a failure prints how to reproduce it."""

TEXTS: Final = st.text(max_size=20)
"""Any text that UTF-8 can encode."""

_numbers = st.floats(allow_nan=False, allow_infinity=False)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | _numbers | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
_ids = st.none() | TEXTS
_sequence_numbers = st.none() | st.integers()

CLIENT_MESSAGES: Final[st.SearchStrategy[IM.ClientMessage]] = st.one_of(
    st.builds(
        IM.UserMessage,
        id=_ids,
        text=TEXTS,
        conversation=st.none() | TEXTS,
        metadata=st.none() | st.dictionaries(TEXTS, _json, max_size=3),
    ),
    st.builds(IM.Cancel, id=_ids),
    st.builds(IM.ToolResult, id=_ids, call_id=TEXTS, output=TEXTS),
)

SERVER_MESSAGES: Final[st.SearchStrategy[OM.ServerMessage]] = st.one_of(
    st.builds(
        OM.Status,
        state=TEXTS,
        features=st.lists(TEXTS, max_size=3).map(tuple),
        max_in_flight=st.none() | st.integers(min_value=1),
        session=st.none() | TEXTS,
        id=_ids,
    ),
    st.builds(OM.EventTextChunk, text=TEXTS, id=_ids, seq=_sequence_numbers),
    st.builds(OM.EventReasoningChunk, text=TEXTS, id=_ids, seq=_sequence_numbers),
    st.builds(OM.EventToolCall, call_id=TEXTS, name=TEXTS, arguments=TEXTS, id=_ids, seq=_sequence_numbers),
    st.builds(OM.EventEnd, tokens_used=st.integers(), status=TEXTS, id=_ids, seq=_sequence_numbers),
    st.builds(
        OM.Error,
        code=st.integers() | TEXTS,
        details=TEXTS,
        retry_after=st.none() | _numbers,
        id=_ids,
        seq=_sequence_numbers,
    ),
    st.builds(OM.GracefulDisconnect, reason=TEXTS, deadline=st.none() | _numbers),
)


def chain(exc: BaseException) -> list[BaseException]:
    """`exc` and everything that it refers to as a cause or a context, shown or not."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [exc]
    while waiting:
        each = waiting.pop()
        if each is not None and each not in found:
            found.append(each)
            waiting += [each.__cause__, each.__context__]
    return found


def run(
    backend: str, function: Callable[[], Awaitable[None]], afterwards: Callable[[], object] = lambda: None
) -> None:
    """Run `function` in an event loop of its own, in virtual time, and then `afterwards`.

    A deadlock, a task that is left behind or a warning is an error.
    """

    async def under_deadline() -> None:
        with anyio.fail_after(1_000_000):
            await function()
        if backend == "asyncio":
            assert asyncio.all_tasks() == {asyncio.current_task()}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        anyio.run(under_deadline, backend=backend, backend_options=jumping(backend))
        afterwards()
    assert [str(warning.message) for warning in caught] == []


async def settle() -> None:
    """Wait until nothing more happens by itself."""
    for _ in range(3):  # what a finalizer has handed to the event loop belongs to no task yet
        await anyio.lowlevel.checkpoint()
    await anyio.wait_all_tasks_blocked()
