"""The prompts of a batch, read as they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, Iterable
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio

from ._prompt import Prompt, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._result import Attempt

__all__ = ["Job", "Prompts", "Source"]

Prompts: TypeAlias = Iterable[Prompt | str] | AsyncIterable[Prompt | str]

_READ_AHEAD: Final = 64  # prompts of an asynchronous source
_SKIPPED_AT_ONCE: Final = 1_000


class Job:
    """A prompt on its way to its result.

    `index` is its place among all prompts, `order` among those that are asked; `attempts` are those that are
    over, `tries` how many of them count; it was `queued` at that time, and its newest attempt had `begun` at
    that, at the latest (``None``: not known).
    """

    __slots__ = ("attempts", "begun", "index", "key", "order", "prompt", "queued", "tries")

    def __init__(self, prompt: Prompt, key: str, index: int, order: int, queued: float) -> None:
        self.prompt = prompt
        self.key = key
        self.index = index
        self.order = order
        self.queued = queued
        self.begun: float | None = None
        self.attempts: tuple[Attempt, ...] = ()
        self.tries = 0


class Source:
    """Reads `prompts`, and leaves out those that have a row: `skip` says by key and index which row that is.

    Where it is the row of another prompt of the same key, that one is asked as if it were the first, when it
    comes: so each prompt has a row of its own in the end, whichever of equal ones were answered before.
    `exhausted` once there are no more, also because reading them or `skip` failed, with `failure`. An
    asynchronous source is read ahead, by `run`; `on_change` is called then when there is something new. While
    `skipping`, it has left out so many that others should have a turn.
    """

    def __init__(
        self,
        prompts: Prompts,
        agent: str,
        skip: Callable[[str, int], int | None] | None,
        on_change: Callable[[], object],
    ) -> None:
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable | AsyncIterable):
            raise TypeError(f"prompts must be an iterable of prompts, not {type(prompts).__name__}")
        self.exhausted = False
        self.failure: Exception | None = None
        self.skipping = False
        self._prompts = prompts
        self._iterator: Iterator[Prompt | str] | None = (
            iter(prompts) if isinstance(prompts, Iterable) else None
        )
        self._agent = agent
        self._skip = skip
        self._on_change = on_change
        self._index = 0
        self._stood_in: dict[tuple[str, int], tuple[Prompt, int]] = {}  # whose row was taken, for whom
        self._order = 0
        self._ahead: deque[Prompt | str] = deque()
        self._room = anyio.Event()

    def take(self, now: float) -> Job | None:
        """The next prompt; ``None`` if there is none yet, or after many that were left out, or at the end."""
        self.skipping = False
        try:
            for _ in range(_SKIPPED_AT_ONCE):
                prompt = self._next()
                if prompt is None:
                    return None
                key = key_of(prompt, self._agent)
                index = self._index
                self._index += 1
                if self._skip is not None:
                    if (first := self._stood_in.pop((key, index), None)) is not None:
                        prompt, index = first
                    elif (taken := self._skip(key, index)) is not None:
                        if taken > index:
                            self._stood_in[key, taken] = prompt, index
                        continue
                self._order += 1
                return Job(prompt, key, index, self._order - 1, now)
        except Exception as exc:
            self.exhausted = True
            self.failure = exc
            return None
        self.skipping = True
        return None

    async def run(self) -> None:
        """Read an asynchronous source ahead, to its end."""
        if self._iterator is not None:
            return
        try:
            assert isinstance(self._prompts, AsyncIterable)
            async for prompt in self._prompts:
                self._ahead.append(prompt)
                self._on_change()
                if len(self._ahead) >= _READ_AHEAD:
                    self._room = anyio.Event()
                    await self._room.wait()
        except Exception as exc:
            self.failure = exc
        self._prompts = ()
        self._iterator = iter(())
        self._on_change()

    def _next(self) -> Prompt | None:
        try:
            if self._ahead:
                prompt = self._ahead.popleft()
                self._room.set()
            elif self._iterator is None:
                return None
            else:
                prompt = next(self._iterator)
            if isinstance(prompt, Prompt):
                return prompt
            if isinstance(prompt, str):
                return Prompt(prompt)
            raise TypeError(f"a prompt must be a Prompt or a string, not {type(prompt).__name__}")
        except StopIteration:
            self.exhausted = True
        return None
