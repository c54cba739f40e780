"""`open_batch` and `run_batch`: the lifetime of a batch."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from ._config import Rates
from ._engine import Engine
from ._rates import RateGate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ._config import BatchConfig
    from ._metrics.metrics import Summary
    from ._rates import Gate
    from ._result import Result
    from ._source import Prompts

__all__ = ["Batch", "open_batch", "run_batch", "run_engine"]


class Batch:
    """A batch that runs: an async iterator of one `Result` for each prompt.

    The results come as they finish or, with ``BatchConfig.ordered``, in the order of the prompts. Behind the
    last one iterating raises what ended the batch early: `TooManyErrors`; `ConnectError`, if no agent can be
    reached any more; or the exception that the prompts' own iterator raised, once what it gave before is
    answered. Cancelled while waiting: no result is lost. There is one consumer at a time.

    Once the block is left, what was there can still be taken; `anyio.ClosedResourceError` is behind it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __aiter__(self) -> Batch:
        return self

    async def __anext__(self) -> Result:
        return await self._engine.take()

    @property
    def done(self) -> int:
        """How many prompts were answered."""
        return self._engine.metrics.done

    @property
    def failed(self) -> int:
        """How many prompts have failed."""
        return self._engine.metrics.failed

    @property
    def retried(self) -> int:
        """How often a prompt was tried again, that an agent may have seen."""
        return self._engine.metrics.retries

    @property
    def in_flight(self) -> int:
        """How many attempts are under way."""
        return self._engine.in_flight

    @property
    def limit(self) -> int:
        """How many may be at present."""
        return self._engine.limit

    def summary(self) -> Summary:
        """The figures of the batch so far."""
        now = anyio.current_time()
        self._engine.sample(now)
        return self._engine.metrics.summary(now)

    def stop(self) -> None:
        """Begin with no further prompt; the iteration ends when those in flight have.

        A prompt that would be tried again is left without a result.
        """
        self._engine.stop()


@asynccontextmanager
async def open_batch(prompts: Prompts, config: BatchConfig) -> AsyncIterator[Batch]:
    """Ask all `prompts`; an async context manager that gives a `Batch`, which is iterated for the results.

    `prompts` is any iterable or asynchronous iterable of `Prompt` or strings. It is read as prompts are
    needed, so it may be without end; it is read on the event loop, so one that blocks for long should be an
    asynchronous one. A generator that may not be read to its end is the caller's to close.

    A prompt that fails is a result, too. When the block is left, for whatever reason, what is in flight is
    cancelled, the agents are told so, and the connections are closed, all within
    ``config.connection_timeouts.close``. What comes out is the block's own exception, as itself.
    """
    async with run_engine(prompts, config) as engine:
        yield Batch(engine)


def run_batch(prompts: Prompts, config: BatchConfig) -> list[Result]:
    """Ask all `prompts` and return their results, in the order of the prompts: for synchronous code.

    It runs an event loop (asyncio) in the calling thread until all are answered, so it is for scripts, and
    for engines that call plain functions, but not for code that an event loop runs already (`RuntimeError`).
    Raises what iterating over a `Batch` raises.
    """
    if _in_event_loop():
        raise RuntimeError("run_batch runs an event loop, and here is one already: use open_batch")

    async def run() -> list[Result]:
        async with open_batch(prompts, config) as batch:
            return sorted([result async for result in batch], key=lambda result: result.index)

    return anyio.run(run)


def _in_event_loop() -> bool:
    try:
        anyio.current_time()
    except RuntimeError:
        return False
    return True


@asynccontextmanager
async def run_engine(
    prompts: Prompts,
    config: BatchConfig,
    *,
    skip: Callable[[str, int], int | None] | None = None,
    gate: Gate | None = None,
) -> AsyncIterator[Engine]:
    """An engine at work while the block runs.

    `skip` is asked, by key and index, for the index of the row that a prompt has already, or ``None``;
    `gate` replaces that of ``config.rates``.
    """
    if gate is None and config.rates != Rates():
        gate = RateGate(config.rates)
    outcome: BaseException | None = None
    engine: Engine | None = None
    async with anyio.create_task_group() as task_group:
        # The block's exception must not pass through the task group, which would wrap it.
        block = anyio.CancelScope()
        try:
            engine = Engine(
                prompts, config, task_group, skip=skip, gate=gate, on_crash=lambda: block.cancel()
            )
            engine.start()
            with block:
                yield engine
        except BaseException as exc:
            outcome = exc
        if engine is not None:
            engine.end()
        task_group.cancel_scope.cancel()
    crash = None if engine is None else engine.crash
    if crash is not None and (outcome is None or not isinstance(crash, Exception)):
        outcome = crash
    try:
        if outcome is not None:
            raise outcome
    finally:
        del outcome, crash, engine  # an exception must not refer to a frame that refers to it
