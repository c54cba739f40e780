"""Settings of a batch: small immutable values, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from .._target import Target
from ..config import Backoff, Heartbeat, Limits, Timeouts, check_positive_integer, check_positive_number
from ..dialects import Dialect, by_name

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable

    from .._open import OnReconnect
    from .._target import HeadersLike

__all__ = ["BUSY_CODES", "Adaptive", "AttemptTimeouts", "BatchConfig", "Rates", "Retry", "Safety"]

Safety: TypeAlias = Literal["safe", "idempotent"]
"""Whether a prompt that an agent may have begun with may be sent again; see `Retry`."""

BUSY_CODES: Final[frozenset[str | int]] = frozenset(
    {"busy", "overloaded", "rate_limited", "rate_limit_exceeded", "too_many_requests", "429", 429, "503", 503}
)
"""What agents say that are asked too much, and have not begun."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Adaptive:
    """How many requests are in flight to each agent, found out as the batch goes on.

    It grows while that helps, and is cut when an agent answers that it is busy (`BUSY_CODES`) or takes longer
    and longer to begin. Positive integers, `minimum` <= `initial` <= `maximum`, else `ValueError`.

    * `initial` (default 16): what to begin with.
    * `minimum`, `maximum` (defaults 1 and 1,000): between which it stays.
    """

    initial: int = 16
    minimum: int = 1
    maximum: int = 1_000

    def __post_init__(self) -> None:
        for name in ("initial", "minimum", "maximum"):
            check_positive_integer(f"Adaptive.{name}", getattr(self, name))
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError("Adaptive needs minimum <= initial <= maximum")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """How much may be asked in a minute, of all agents together; ``None`` (the default): any number.

    * `requests_per_minute`: attempts.
    * `tokens_per_minute`: tokens as the agents count them. What an answer will use is estimated from those
      before it, and set right when it has ended.

    Both are token buckets that hold a second's worth, and no less than one request or two answers, so that
    the load is even. A value that is not positive and finite is a `ValueError`.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise ValueError(f"Rates.{field.name} must be a positive, finite number, not {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """When a prompt that failed is tried again. A wrong value is a `ValueError`.

    A prompt of which nothing was written when its connection was lost is tried again always, without that
    being counted: no agent has seen it. One that an agent may have begun with is tried again only

    * if the agent answered with an error whose code is one of `codes` (default `BUSY_CODES`), or
    * with `safety` ``"idempotent"`` (default ``"safe"``), which says that asking twice does no harm: after a
      lost connection, a timeout, or what is no answer. Other errors that an agent answered with are final.

    Before the n-th try again a random time between 0 and the smaller of `maximum` and
    ``initial * 2 ** (n - 1)`` is waited ("full jitter"), after what the agent asked for as `retry_after`.

    * `attempts` (default 5): how often a prompt is tried in all.
    * `initial`, `maximum` (seconds, defaults 0.5 and 30).
    """

    safety: Safety = "safe"
    codes: Collection[str | int] = BUSY_CODES
    attempts: int = 5
    initial: float = 0.5
    maximum: float = 30

    def __post_init__(self) -> None:
        if self.safety not in ("safe", "idempotent"):
            raise ValueError(f"Retry.safety must be 'safe' or 'idempotent', not {self.safety!r}")
        if isinstance(self.codes, str | bytes) or not isinstance(self.codes, Collection):
            raise ValueError(f"Retry.codes must be a collection of codes, not {type(self.codes).__name__}")
        check_positive_integer("Retry.attempts", self.attempts)
        for name in ("initial", "maximum"):
            check_positive_number(f"Retry.{name}", getattr(self, name))

    def bound(self, number: int) -> float:
        """The longest time, in seconds, that is waited before the try again `number`, counted from 1."""
        return min(self.maximum, self.initial * 2.0 ** min(number - 1, 64))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttemptTimeouts:
    """How long one attempt may take, in seconds from when it was sent; ``None``: as long as it likes.

    * `total` (default ``None``): to its end.
    * `first_event` (default ``None``): to its first event.
    * `idle` (default 600): between two events, and to the first.

    An attempt that takes longer is cancelled, and has failed with a ``TimeoutError``. A value that is not
    positive and finite is a `ValueError`.
    """

    total: float | None = None
    first_event: float | None = None
    idle: float | None = 600

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                check_positive_number(f"AttemptTimeouts.{field.name}", value)


@dataclasses.dataclass(frozen=True, slots=True)
class BatchConfig:
    """Which agents to ask, and how. A wrong value is a `ValueError`.

    Agents:

    * `url`: the agent's ``ws://`` or ``wss://`` address, or several of them, each once, which share the work.
    * `connections` (default 1): how many to each. More than one helps where a connection takes one request at
      a time, or few.
    * `agent` (default: the addresses, without userinfo and query): a name for the agents. It is a part of the
      digest that stands for a prompt without id, so answers are looked for under the same name when a batch
      goes on.
    * `dialect`, `headers`, `ssl_context`, `limits`, `connection_timeouts`, `heartbeat`, `on_reconnect`: of
      each connection, as in `open_agent`. An `ssl_context` is for ``wss://`` addresses; there must be one.
    * `reconnect` (default: 10 attempts in a row): how a connection that is lost, or did not come about, is
      replaced. When none is left to any agent, the batch ends with `ConnectError`.

    Pace:

    * `in_flight` (default `Adaptive`): how many requests at once. A number is fixed, for all agents together.
    * `rates`: see `Rates`.

    Failures:

    * `retry` (default `Retry`): see there; ``"safe"`` and ``"idempotent"`` stand for ``Retry(safety=...)``.
    * `timeouts`: see `AttemptTimeouts`.
    * `max_errors` (default ``None``): the batch ends with `TooManyErrors` once more prompts than this have
      failed.
    * `max_error_rate` (default ``None``): the same, for the share of failed ones, from the 100th result on;
      at least 0 and less than 1.

    Results:

    * `ordered` (default false): in the order of the input, and not as they finish. A prompt that takes long
      holds the others up then, once `window` results wait behind it.
    * `window` (default 10,000): how many results may wait to be taken at most; beyond it, no prompt is sent.
    """

    url: str | Iterable[str] = dataclasses.field(repr=False)
    _: dataclasses.KW_ONLY
    connections: int = 1
    agent: str | None = None
    dialect: Dialect | str | None = None
    headers: HeadersLike | None = dataclasses.field(default=None, repr=False)
    ssl_context: ssl.SSLContext | None = None
    limits: Limits = Limits()  # noqa: RUF009 - immutable
    connection_timeouts: Timeouts = Timeouts()  # noqa: RUF009
    heartbeat: Heartbeat | None = Heartbeat()  # noqa: RUF009
    reconnect: Backoff = Backoff(attempts=10)  # noqa: RUF009
    on_reconnect: OnReconnect | None = None
    in_flight: int | Adaptive = Adaptive()
    rates: Rates = Rates()
    retry: Retry | Safety = Retry()
    timeouts: AttemptTimeouts = AttemptTimeouts()
    max_errors: int | None = None
    max_error_rate: float | None = None
    ordered: bool = False
    window: int = 10_000

    def __post_init__(self) -> None:
        if not isinstance(self.url, str):
            object.__setattr__(self, "url", tuple(self.url))
        if self.headers is not None:
            object.__setattr__(self, "headers", kept(self.headers))
        self._check_agents()
        for name, kind in _KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, not {getattr(self, name)!r}")
        for name in ("connections", "window"):
            check_positive_integer(name, getattr(self, name))
        if not isinstance(self.in_flight, Adaptive):
            check_positive_integer("in_flight", self.in_flight)
        if not isinstance(self.retry, Retry):
            Retry(safety=self.retry)
        most, rate = self.max_errors, self.max_error_rate
        if most is not None and (type(most) is not int or most < 0):
            raise ValueError(f"max_errors must be an integer of at least 0, not {most!r}")
        if rate is not None and not (_is_number(rate) and 0 <= rate < 1):
            raise ValueError(f"max_error_rate must be at least 0 and less than 1, not {rate!r}")

    def _check_agents(self) -> None:
        if not self.urls:
            raise ValueError("a batch needs the URL of an agent")
        for url in self.urls:
            Target.parse(url, self.headers, self.ssl_context_of(url))
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("an agent's URL is there twice; `connections` gives it more connections")
        if self.ssl_context is not None and not any(map(self.ssl_context_of, self.urls)):
            raise ValueError("an ssl_context needs a wss:// URL")
        if isinstance(self.dialect, str):
            by_name(self.dialect)
        elif self.dialect is not None and not isinstance(self.dialect, Dialect):
            raise ValueError(f"dialect must be a Dialect or the name of one, not {self.dialect!r}")
        if self.heartbeat is not None and not isinstance(self.heartbeat, Heartbeat):
            raise ValueError(f"heartbeat must be a Heartbeat, not {self.heartbeat!r}")
        if self.on_reconnect is not None and not callable(self.on_reconnect):
            raise ValueError("on_reconnect must be an async function")
        if self.agent is not None and not isinstance(self.agent, str):
            raise ValueError(f"agent must be a name, not {self.agent!r}")

    @property
    def urls(self) -> tuple[str, ...]:
        """All agents' addresses."""
        return (self.url,) if isinstance(self.url, str) else tuple(self.url)

    @property
    def agent_name(self) -> str:
        """`agent`, or what stands for it."""
        return self.agent or " ".join(sorted(map(label_of, self.urls)))

    @property
    def retries(self) -> Retry:
        """`retry`, spelled out."""
        return Retry(safety=self.retry) if isinstance(self.retry, str) else self.retry

    def ssl_context_of(self, url: str) -> ssl.SSLContext | None:
        """`ssl_context`, where `url` asks for TLS."""
        return self.ssl_context if url[:4].lower() == "wss:" else None


_KINDS: Final = {
    "limits": Limits,
    "connection_timeouts": Timeouts,
    "reconnect": Backoff,
    "rates": Rates,
    "timeouts": AttemptTimeouts,
    "ordered": bool,
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def kept(headers: HeadersLike) -> HeadersLike:
    """`headers`, which may be an iterator, to be read for each connection."""
    return headers if isinstance(headers, Mapping) else tuple(headers)


def label_of(url: str) -> str:
    """Host, port and path of an agent: what may be shown of its address."""
    target = Target.parse(url)
    host = f"[{target.host}]" if ":" in target.host else target.host
    return f"{host}:{target.port}{target.resource.partition('?')[0]}"
