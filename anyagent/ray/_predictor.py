"""`AgentPredictor`: what Ray makes actors of."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import anyio
import msgspec

from ..batch import ErrorRecord, Prompt, Rates
from ..batch._batch import Batch, run_engine
from ..config import check_positive_integer
from ._gate import GovernedGate
from ._governor import Governor
from ._pool import Call, Pool

try:
    import numpy as np
    import pyarrow as pa
    import ray
    from ray.exceptions import ActorDiedError
except ImportError as exc:
    raise ImportError("anyagent.ray needs Ray Data: pip install 'anyagent[ray]'") from exc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from ..batch import BatchConfig, Result
    from ._governor import Told

__all__ = ["AgentPredictor", "OnError", "PredictorConfig", "PromptFailed"]

OnError: TypeAlias = Literal["column", "raise"]
"""What a row that failed becomes; see `PredictorConfig`."""

_NAMESPACE: Final = "anyagent"
_COLUMNS: Final = {
    "response": pa.string(),
    "tokens_used": pa.int64(),
    "ttft_ms": pa.float64(),
    "attempts": pa.int64(),
    "error": pa.string(),
}
_CALLS: Final = 10_000  # of the governor's methods at once; three of each predictor wait there
_PAUSES: Final = (0.1, 0.3, 1.0, 3.0)  # seconds, until the name of a governor that ends is free
_PARTING: Final = 1.0  # seconds, to tell the governor that one leaves


class PromptFailed(Exception):
    """A row got no answer, and ``PredictorConfig.on_error`` is ``"raise"``.

    * `id`: of the row, by ``PredictorConfig.id_column``; ``None`` without.
    * `error`: why; the `ErrorRecord` of the last attempt.
    """

    def __init__(self, id: str | None, error: ErrorRecord) -> None:
        self.id = id
        self.error = error
        super().__init__(id, error)

    def __str__(self) -> str:
        row = "a row" if self.id is None else f"the row {self.id!r}"
        code = "" if self.error.code is None else f" {self.error.code}"
        return f"{row} failed with {self.error.type}{code}: {self.error.details}"


@dataclasses.dataclass(frozen=True, slots=True)
class PredictorConfig:
    """What an `AgentPredictor` does; can be pickled. A wrong value is a `ValueError`.

    * `batch`: which agents to ask, and how; it holds for each actor by itself. Its ``rates`` belong into
      `total_rates`, its ``ordered`` has no meaning here, and an ``ssl_context`` cannot be pickled (a private
      authority can be named in the actors' environment, as ``SSL_CERT_FILE``).
    * `text_column` (default ``"text"``): the prompts.
    * `id_column` (default ``None``): what a `PromptFailed` calls a row by.
    * `on_error`: ``"column"`` (the default): a row that failed has an `error` in place of a `response`.
      ``"raise"``: the first one ends the dataset; see `AgentPredictor`.
    * `total_in_flight` (default ``None``, no limit): how many prompts all actors together have in flight. If
      that is fewer than there are actors, some wait until others have nothing to do.
    * `total_rates` (default ``None``, no limit): what all actors together may ask in a minute.
    * `governor` (default: a new name for each configuration): the name of the actor that keeps the totals.
      Datasets, also those of several drivers on a cluster, share the totals if it is the same; the totals
      have to be the same then, too.
    """

    batch: BatchConfig
    _: dataclasses.KW_ONLY
    text_column: str = "text"
    id_column: str | None = None
    on_error: OnError = "column"
    total_in_flight: int | None = None
    total_rates: Rates | None = None
    governor: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        if self.on_error not in ("column", "raise"):
            raise ValueError(f"on_error must be 'column' or 'raise', not {self.on_error!r}")
        if self.total_in_flight is not None:
            check_positive_integer("total_in_flight", self.total_in_flight)
        if self.batch.rates != Rates():
            raise ValueError("rates of a batch would hold for each actor: use total_rates")
        if self.batch.ordered:
            raise ValueError("a batch with ordered=True holds up rows of other calls: leave it out")
        if self.batch.ssl_context is not None:
            raise ValueError(
                "an ssl_context cannot be sent to an actor: set SSL_CERT_FILE in its environment"
            )


class AgentPredictor:
    """Adds the agents' answers to the rows of a dataset: a callable class for `ray.data.Dataset.map_batches`.

    Each actor has connections of its own, which are opened at the first call and shared by all. They are
    closed when the actor ends. When it is killed instead, the agents see the connections end; see the
    module's documentation for what Ray makes of its rows.

    A call yields rows in groups, as they finish, each group as a dictionary of columns: the input's own, and

    * `response` (string): the answer.
    * `tokens_used` (int64): what it used, by the agent.
    * `ttft_ms` (float64): milliseconds from when the prompt was sent to the first event of its answer; of the
      last attempt.
    * `attempts` (int64): how often the row was given to an agent.
    * `error` (string): null, or why there is no answer: ``{"type": ..., "code": ..., "details": ...}`` in
      JSON, as in `ErrorRecord`. A value that is no string is not asked, and has failed with ``ValueError``.

    All but `attempts` may be null, and have the same Arrow type in every block, also where all are.

    Raises `ValueError` if the input has a column of such a name, or none for the prompts; what ends a batch:
    `ConnectError`, if no agent can be reached any more, and `TooManyErrors`; and, with ``on_error="raise"``,
    `PromptFailed`. Out of Ray all of them come as a ``ray.exceptions.RayTaskError`` that is a
    ``ray.exceptions.UserCodeException`` as well and has this exception in its text; with Ray's
    ``DataContext.raise_original_map_exception`` it can be caught as what it is.
    """

    def __init__(self, config: PredictorConfig) -> None:
        self._config = config
        self._pool: Pool | None = None

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Ask the prompts of `batch`, columns as NumPy arrays or lists (Ray's ``batch_format="numpy"``).

        Left early, or cancelled: no further prompt is asked, but for some that the batch has read ahead.
        """
        prompts = self._prompts_of(batch)
        rows = [place for place, prompt in enumerate(prompts) if prompt is not None]
        unasked = [(place, _UNASKED) for place, prompt in enumerate(prompts) if prompt is None]
        if unasked or not rows:
            yield self._columns(batch, unasked)
        if not rows:
            return
        call = Call([prompt for prompt in prompts if prompt is not None])
        pool = self._open_pool()
        pool.ask(call)
        try:
            left = len(rows)
            while left:
                finished = await call.take()
                left -= len(finished)
                yield self._columns(batch, [(rows[place], _Row.of(result)) for place, result in finished])
        finally:
            pool.leave(call)

    def close(self) -> None:
        """Cancel what is in flight and close the connections, within their timeout. Blocks."""
        if self._pool is not None:
            self._pool.close()

    def __del__(self) -> None:
        pool = getattr(self, "_pool", None)
        if pool is not None:
            pool.close()

    def _open_pool(self) -> Pool:
        if self._pool is None or self._pool.failed:
            config = self._config

            @contextlib.asynccontextmanager
            async def open_batch(prompts: AsyncIterable[Prompt]) -> AsyncIterator[Batch]:
                async with _gate_of(config) as gate, run_engine(prompts, config.batch, gate=gate) as engine:
                    yield Batch(engine)

            self._pool = Pool(open_batch, config.batch.connection_timeouts.close + _PARTING)
        return self._pool

    def _prompts_of(self, batch: Mapping[str, Any]) -> list[Prompt | None]:
        """A prompt for each row; ``None`` where there is no text."""
        config = self._config
        if not isinstance(batch, Mapping):
            raise TypeError(f"AgentPredictor needs batch_format='numpy', not {type(batch).__name__}")
        taken = sorted(_COLUMNS.keys() & batch.keys())
        if taken:
            raise ValueError(f"the input has columns of the output's names: {', '.join(taken)}; rename them")
        for column in (config.text_column, config.id_column):
            if column is not None and column not in batch:
                raise ValueError(f"no column {column!r} in the input, which has: {', '.join(batch)}")
        # The id keeps a digest from being made, which nobody would see.
        return [
            Prompt(str(text), id="") if isinstance(text, str) else None for text in batch[config.text_column]
        ]

    def _columns(self, batch: Mapping[str, Any], rows: Sequence[tuple[int, _Row]]) -> dict[str, Any]:
        """The rows of `batch` at these places, with what came of them. Raises `PromptFailed`."""
        for place, row in rows:
            if row.failure is not None and self._config.on_error == "raise":
                column = self._config.id_column
                raise PromptFailed(None if column is None else str(batch[column][place]), row.failure)
        places = [place for place, _ in rows]
        columns: dict[str, Any] = {
            name: values[places] if isinstance(values, np.ndarray) else [values[place] for place in places]
            for name, values in batch.items()
        }
        for name, arrow_type in _COLUMNS.items():
            columns[name] = pa.array([getattr(row, name) for _, row in rows], arrow_type)
        return columns


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    """What the columns say of a row, and its `failure`."""

    response: str | None
    tokens_used: int | None
    ttft_ms: float | None
    attempts: int
    failure: ErrorRecord | None

    @classmethod
    def of(cls, result: Result) -> _Row:
        timings = result.timings
        return cls(
            result.text,
            result.tokens_used,
            None
            if timings.sent is None or timings.first_event is None
            else (timings.first_event - timings.sent) * 1_000,
            len(result.attempts),
            result.error,
        )

    @property
    def error(self) -> str | None:
        return None if self.failure is None else msgspec.json.encode(self.failure).decode()


_UNASKED: Final = _Row(None, None, None, 0, ErrorRecord("ValueError", None, "the prompt is not a string"))


def _gate_of(config: PredictorConfig) -> AbstractAsyncContextManager[GovernedGate | None]:
    """The gate by which the totals hold, if there are any."""
    totals = config.total_in_flight, config.total_rates
    return contextlib.nullcontext() if totals == (None, None) else _governed(config.governor, *totals)


@contextlib.asynccontextmanager
async def _governed(name: str, in_flight: int | None, rates: Rates | None) -> AsyncIterator[GovernedGate]:
    governor = await _RemoteGovernor.join(name, in_flight, rates)
    gate = GovernedGate(governor, rated=rates is not None)
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(gate.run)
            # The block's exception must not pass through the task group, which would wrap it.
            try:
                yield gate
            except BaseException as exc:
                failure = exc
            task_group.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        failure = group
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
    with anyio.move_on_after(_PARTING, shield=True), contextlib.suppress(ray.exceptions.RayError):
        await governor.leave()
    if failure is not None:
        raise failure


class _RemoteGovernor:
    """The governor's actor, as the member of this name calls it."""

    def __init__(self, actor: Any, member: str, presence: object) -> None:
        self._actor = actor
        self._member = member
        self._presence = presence  # when its owner, this process, dies, Ray says so to the governor

    @classmethod
    async def join(cls, name: str, in_flight: int | None, rates: Rates | None) -> _RemoteGovernor:
        """Join the governor of this name, which is started if there is none."""
        member = uuid.uuid4().hex
        actor_class = ray.remote(Governor).options(
            name=name,
            namespace=_NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_concurrency=_CALLS,
            max_task_retries=-1,
        )
        pauses = iter(_PAUSES)
        while True:
            actor: Any = actor_class.remote(in_flight, rates, end_actor)
            presence = actor.stay.remote(member)
            try:
                await actor.join.remote(member, in_flight, rates, [presence])
                return cls(actor, member, presence)
            except ActorDiedError:  # it was about to end
                pause = next(pauses, None)
                if pause is None:
                    raise
                await anyio.sleep(pause)
            except BaseException:
                actor.leave.remote(member)
                raise

    async def tell(self, number: int, returned: int, wanted: int, ended: Sequence[int | None], /) -> None:
        await self._actor.tell.remote(self._member, number, returned, wanted, ended)

    async def listen(self, version: int, /) -> Told:
        told: Told = await self._actor.listen.remote(self._member, version)
        return told

    async def take(self, wanted: int, /) -> int:
        count: int = await self._actor.take.remote(self._member, wanted)
        return count

    async def leave(self) -> None:
        await self._actor.leave.remote(self._member)


def end_actor() -> None:
    """End the actor that this runs in."""
    ray.kill(ray.get_runtime_context().current_actor)
