"""One batch without end, in a thread of its own, that the calls of a predictor share.

Its event loop is not the one that Ray runs the calls on, because Ray blocks that one while nobody takes what
comes out of a predictor: heartbeats would stop, and agents take the predictor for dead.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import TYPE_CHECKING, TypeAlias

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from ..batch import Prompt, Result

    OpenBatch: TypeAlias = Callable[
        [AsyncIterable[Prompt]], AbstractAsyncContextManager[AsyncIterator[Result]]
    ]

__all__ = ["Call", "Pool"]


class Call:
    """The prompts of one call, on the event loop that makes it, and their results as they come."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._finished: list[tuple[int, Result]] = []
        self._failure: BaseException | None = None
        self._left = False
        self._news = asyncio.Event()

    @property
    def left(self) -> bool:
        """Nobody waits for the results any more."""
        return self._left

    def leave(self) -> None:
        with self._lock:
            self._left = True

    async def take(self) -> list[tuple[int, Result]]:
        """Wait until there are results, and return them, each with the place of its prompt.

        Raises what ended the batch, once everything before has been taken.
        """
        await self._news.wait()
        with self._lock:
            finished, self._finished = self._finished, []
            if self._failure is None:
                self._news.clear()
        if not finished and self._failure is not None:
            raise self._failure
        return finished

    def finish(self, place: int, result: Result) -> None:
        """Called from another thread."""
        with self._lock:
            self._finished.append((place, result))
            self._notify(first=len(self._finished) == 1)

    def fail(self, failure: BaseException) -> None:
        """Called from another thread."""
        with self._lock:
            self._failure = failure
            self._notify(first=True)

    def _notify(self, *, first: bool) -> None:
        if first and not self._left:
            self._loop.call_soon_threadsafe(self._news.set)


class Pool:
    """Runs the batch that `open_batch` opens, from the start on until it fails or `close` is called."""

    def __init__(self, open_batch: OpenBatch, close_timeout: float) -> None:
        self._open_batch = open_batch
        self._close_timeout = close_timeout
        self._lock = threading.Lock()
        self._calls: set[Call] = set()
        self._failure: BaseException | None = None
        self._scope = anyio.CancelScope()
        self._loop = asyncio.new_event_loop()
        self._prompts = _Prompts()
        self._thread = threading.Thread(target=self._run, name="anyagent", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """It takes no more calls."""
        return self._failure is not None

    def ask(self, call: Call) -> None:
        """Have the prompts of `call` answered."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._calls.add(call)
            self._loop.call_soon_threadsafe(self._prompts.add, call)

    def leave(self, call: Call) -> None:
        """What is left of `call` is of no interest."""
        call.leave()
        with self._lock:
            self._calls.discard(call)

    def close(self) -> None:
        """Cancel what is in flight, and close the connections, within their timeout. Blocks."""
        with self._lock:
            if self._failure is None:
                self._loop.call_soon_threadsafe(self._scope.cancel)
        if threading.current_thread() is not self._thread:
            self._thread.join(self._close_timeout)

    def _run(self) -> None:
        anyio.run(self._serve, backend_options={"loop_factory": lambda: self._loop})

    async def _serve(self) -> None:
        failure: BaseException = RuntimeError("the predictor was closed")
        try:
            with self._scope:
                async with self._open_batch(self._prompts) as results:
                    async for result in results:
                        call, place = self._prompts.asked.pop(result.index)
                        call.finish(place, result)
        except BaseException as exc:
            failure = exc
        with self._lock:
            self._failure = failure
            calls, self._calls = self._calls, set()
        for call in calls:
            call.fail(failure)


class _Prompts:
    """All calls' prompts, one call's after the other's; `asked`: whose they are, by their place among all."""

    def __init__(self) -> None:
        self.asked: dict[int, tuple[Call, int]] = {}
        self._waiting: deque[tuple[Call, int]] = deque()
        self._index = 0
        self._arrival = asyncio.Event()

    def add(self, call: Call) -> None:
        self._waiting.extend((call, place) for place in range(len(call.prompts)))
        self._arrival.set()

    def __aiter__(self) -> _Prompts:
        return self

    async def __anext__(self) -> Prompt:
        while True:
            while not self._waiting:
                self._arrival.clear()
                await self._arrival.wait()
            call, place = self._waiting.popleft()
            if not call.left:
                self.asked[self._index] = (call, place)
                self._index += 1
                return call.prompts[place]
