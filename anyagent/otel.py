"""OpenTelemetry: a span and metrics for every request (needs the extra ``otel``).

::

    from anyagent import otel

    otel.instrument()

The data follow the semantic conventions for generative AI, version 1.41 (which are still in development),
for the invocation of a remote agent. A span is of kind ``CLIENT``. Its parent is the span that is current
where the request is made; it becomes nobody's current span itself, and ends when the request is settled.

Attributes of the span ``invoke_agent``, or ``invoke_agent {agent_name}``:

* ``gen_ai.operation.name``: ``"invoke_agent"``.
* ``gen_ai.provider.name``, ``gen_ai.agent.name``: as given to `instrument`.
* ``gen_ai.conversation.id``: the `conversation` of `Agent.send_message`, if there is one.
* ``server.address``, ``server.port``: of the agent's URL.
* ``gen_ai.response.finish_reasons``: the status of the ``OM.EventEnd``, ``"_OTHER"`` for one that is not in
  its documentation.
* ``anyagent.tokens_used``: of the ``OM.EventEnd``, which does not say whether they went in or came out.
* ``error.type``: the class of the exception that the request failed with (``anyagent.errors.AgentError``,
  ``Disconnected``, ``ProtocolError`` or ``SlowConsumerError``, as a rule). The span's status is an error.
* ``anyagent.cancelled``: true if the request was cancelled or left by its caller. That is no error.

Histograms, with the operation, the provider and the server as attributes:

* ``gen_ai.client.operation.duration`` (seconds): how long a request took, from the call on; as long as its
  span. Also has ``error.type`` and ``anyagent.cancelled``.
* ``gen_ai.client.operation.time_to_first_chunk`` (seconds): from the call to the first event.
* ``gen_ai.client.token.usage`` (tokens): ``anyagent.tokens_used``; ``gen_ai.token.type`` is ``"total"``.

No prompt, no text of an answer or of an error, no header and nothing else of the URL is exported.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from typing import TYPE_CHECKING, Final

from opentelemetry import metrics, trace

from . import _observation

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.context import Context
    from opentelemetry.util.types import AttributeValue

    from ._observation import ObservedRequest, RequestOutcome

__all__ = ["instrument", "uninstrument"]

_SCOPE: Final = "anyagent"
_SCHEMA: Final = "https://opentelemetry.io/schemas/1.41.0"
_OPERATION: Final = "invoke_agent"
_SECONDS_BUCKETS: Final = [0.01 * 2**power for power in range(14)]
_TOKENS_BUCKETS: Final = [4**power for power in range(14)]
_STATUSES: Final = frozenset(("completed", "cancelled", "incomplete"))
_MOST_TOKENS: Final = 2**63 - 1  # an attribute is a signed 64-bit integer; a larger one fails a whole export

_logger: Final = logging.getLogger("anyagent.otel")


def instrument(
    *,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
    provider_name: str = "anyagent",
    agent_name: str | None = None,
) -> None:
    """Observe every request that this process makes from now on.

    * `tracer_provider`, `meter_provider`: where to; by default the global ones.
    * `provider_name`: who provides the agents, best by a name that the conventions know.
    * `agent_name`: what the agents are called, if one name fits all; by default the attribute is left out.

    Spans are ended on the task that settles the request: a span processor must not block there. One that
    raises is logged, and harms no request.

    Raises `RuntimeError` if the process is instrumented already.
    """
    if _observation.observer is not None:
        raise RuntimeError("anyagent is instrumented already: call uninstrument() first")
    version = importlib.metadata.version("anyagent")
    _observation.observer = _Telemetry(
        trace.get_tracer(_SCOPE, version, tracer_provider, _SCHEMA),
        metrics.get_meter(_SCOPE, version, meter_provider, _SCHEMA),
        provider_name,
        agent_name,
    ).observe


def uninstrument() -> None:
    """Observe no further request; those in flight are observed to their end. Idempotent."""
    _observation.observer = None


class _Telemetry:
    def __init__(
        self, tracer: trace.Tracer, meter: metrics.Meter, provider_name: str, agent_name: str | None
    ) -> None:
        self._provider_name = provider_name
        self._agent_name = agent_name
        self._tracer = tracer
        self._duration = meter.create_histogram(
            "gen_ai.client.operation.duration",
            "s",
            "How long a request took.",
            explicit_bucket_boundaries_advisory=_SECONDS_BUCKETS,
        )
        self._first_chunk = meter.create_histogram(
            "gen_ai.client.operation.time_to_first_chunk",
            "s",
            "How long after a request was made its first event arrived.",
            explicit_bucket_boundaries_advisory=_SECONDS_BUCKETS,
        )
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "How many tokens the agent says it used for a request.",
            explicit_bucket_boundaries_advisory=_TOKENS_BUCKETS,
        )

    def observe(self, request: ObservedRequest) -> Callable[[RequestOutcome], None]:
        """Start the span of `request`; return what is to be called with its outcome. Neither raises."""
        server: dict[str, AttributeValue] = {
            "gen_ai.operation.name": _OPERATION,
            "gen_ai.provider.name": self._provider_name,
            "server.address": request.host,
            "server.port": request.port,
        }
        start = time.time_ns()
        try:
            span = self._start_span(request.conversation, server, start)
        except Exception:
            _logger.exception("the span of a request could not be started")
            return _ignore
        context = trace.set_span_in_context(span)

        def ended(outcome: RequestOutcome) -> None:
            try:
                _end_span(span, start, outcome)
                self._measure(outcome, server, context)
            except Exception:
                _logger.exception("the outcome of a request could not be recorded")

        return ended

    def _start_span(
        self, conversation: str | None, server: dict[str, AttributeValue], start: int
    ) -> trace.Span:
        name, attributes = _OPERATION, dict(server)
        if self._agent_name is not None:
            name = f"{_OPERATION} {self._agent_name}"
            attributes["gen_ai.agent.name"] = self._agent_name
        if conversation is not None:
            # A lone surrogate fails the request; it must not fail the export of other spans, too.
            attributes["gen_ai.conversation.id"] = conversation.encode(errors="replace").decode()
        return self._tracer.start_span(
            name, kind=trace.SpanKind.CLIENT, attributes=attributes, start_time=start
        )

    def _measure(self, outcome: RequestOutcome, server: dict[str, AttributeValue], context: Context) -> None:
        self._duration.record(_lasted(outcome), server | _how_it_failed(outcome), context)
        if outcome.stats.first_event is not None:
            self._first_chunk.record(outcome.stats.first_event - outcome.started, server, context)
        tokens = _tokens_used(outcome)
        if tokens is not None:
            self._tokens.record(tokens, server | {"gen_ai.token.type": "total"}, context)


def _end_span(span: trace.Span, start: int, outcome: RequestOutcome) -> None:
    span.set_attributes(_how_it_failed(outcome))
    if outcome.error is not None:
        span.set_status(trace.StatusCode.ERROR)  # without a description: the agent's may quote the prompt
    if outcome.end is not None:
        status = outcome.end.status if outcome.end.status in _STATUSES else "_OTHER"
        span.set_attribute("gen_ai.response.finish_reasons", [status])
    tokens = _tokens_used(outcome)
    if tokens is not None:
        span.set_attribute("anyagent.tokens_used", tokens)
    # By the clock of the metric: that of the system may be set in between.
    span.end(start + round(_lasted(outcome) * 1e9))


def _lasted(outcome: RequestOutcome) -> float:
    assert outcome.stats.end is not None  # settled
    return outcome.stats.end - outcome.started


def _tokens_used(outcome: RequestOutcome) -> int | None:
    """How many tokens the agent counted, where that is a number that can be exported."""
    if outcome.end is None or not 0 <= outcome.end.tokens_used <= _MOST_TOKENS:
        return None
    return outcome.end.tokens_used


def _how_it_failed(outcome: RequestOutcome) -> dict[str, AttributeValue]:
    if outcome.error is not None:
        kind = type(outcome.error)
        module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        return {"error.type": module + kind.__qualname__}
    return {"anyagent.cancelled": True} if outcome.end is None else {}


def _ignore(outcome: RequestOutcome) -> None:
    """What ends a request whose span did not start."""
