"""Requests as OpenTelemetry sees them: one span each, three histograms, and nothing that was said."""

from __future__ import annotations

import functools
import gc
import json
import logging
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Decision, Sampler, SamplingResult
from opentelemetry.trace import SpanKind, StatusCode

from anyagent import (
    IM,
    OM,
    Agent,
    AgentError,
    Backoff,
    Disconnected,
    Limits,
    ProtocolError,
    SlowConsumerError,
    open_agent,
    otel,
)
from anyagent.testing import embedded_agent, memory_agent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from typing import Any

    from opentelemetry.context import Context
    from opentelemetry.sdk.metrics.export import MetricsData

    from anyagent.testing import AgentReply, MemoryPeer

pytestmark = pytest.mark.anyio

DURATION = "gen_ai.client.operation.duration"
FIRST_CHUNK = "gen_ai.client.operation.time_to_first_chunk"
TOKENS = "gen_ai.client.token.usage"
SECRET = "s3cr3t"


class Recorder:
    """What one process exports, kept in memory."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracer_provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer = self.tracer_provider.get_tracer("the application")

    def instrument(self, **options: Any) -> None:
        otel.instrument(tracer_provider=self.tracer_provider, meter_provider=self.meter_provider, **options)

    @property
    def spans(self) -> list[ReadableSpan]:
        """The spans of requests that have ended."""
        return [span for span in self._exporter.get_finished_spans() if span.kind is SpanKind.CLIENT]

    @property
    def span(self) -> ReadableSpan:
        (span,) = self.spans
        return span

    def points(self, metric: str) -> list[HistogramDataPoint]:
        """What was recorded of `metric` until metrics are asked for; a point for each set of attributes."""
        return [
            point
            for resource in (self._metrics.resource_metrics if self._metrics else ())
            for scope in resource.scope_metrics
            for each in scope.metrics
            if each.name == metric
            for point in each.data.data_points
            if isinstance(point, HistogramDataPoint)
        ]

    def everything(self) -> str:
        """All that was exported, as text."""
        assert self._metrics is not None
        spans = self._exporter.get_finished_spans()
        return "".join(span.to_json() for span in spans) + self._metrics.to_json()

    @functools.cached_property
    def _metrics(self) -> MetricsData | None:
        return self._reader.get_metrics_data()  # which forgets the exemplars

    def shut_down(self) -> None:
        self.tracer_provider.shutdown()
        self.meter_provider.shutdown()


@pytest.fixture
def bare_recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    otel.uninstrument()
    recorder.shut_down()


@pytest.fixture
def recorder(bare_recorder: Recorder) -> Recorder:
    bare_recorder.instrument()
    return bare_recorder


async def prompt_id(peer: MemoryPeer) -> str | None:
    message = await peer.receive()
    assert isinstance(message, IM.UserMessage)
    return message.id


async def answer(peer: MemoryPeer, *, tokens: int = 7, status: str = "completed") -> None:
    request_id = await prompt_id(peer)
    peer.send(OM.EventTextChunk("answer", id=request_id), OM.EventEnd(tokens, status, id=request_id))


async def ask(agent: Agent, peer: MemoryPeer, **options: Any) -> None:
    """One request that is answered."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: answer(peer, **options))
        await agent.ask("prompt")


async def test_a_request_is_a_client_span_with_the_attributes_of_the_conventions(
    bare_recorder: Recorder,
) -> None:
    bare_recorder.instrument(provider_name="example", agent_name="Clerk")
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("prompt", conversation="c-1")
        assert bare_recorder.spans == []
        await answer(peer, status="incomplete")
        await response.collect()
    span = bare_recorder.span
    assert (span.name, span.kind) == ("invoke_agent Clerk", SpanKind.CLIENT)
    attributes = dict(span.attributes or {})
    del attributes["server.address"], attributes["server.port"]  # another test's, which has a server
    assert attributes == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.provider.name": "example",
        "gen_ai.agent.name": "Clerk",
        "gen_ai.conversation.id": "c-1",
        "gen_ai.response.finish_reasons": ("incomplete",),
        "anyagent.tokens_used": 7,
    }
    assert span.status.status_code is StatusCode.UNSET
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "anyagent"
    assert span.instrumentation_scope.version
    assert span.instrumentation_scope.schema_url == "https://opentelemetry.io/schemas/1.41.0"


async def test_what_is_not_known_is_left_out(recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        await ask(agent, peer)
    assert recorder.span.name == "invoke_agent"
    assert recorder.span.attributes is not None
    assert recorder.span.attributes["gen_ai.provider.name"] == "anyagent"
    assert not {"gen_ai.agent.name", "gen_ai.conversation.id", "error.type", "anyagent.cancelled"} & set(
        recorder.span.attributes
    )


async def test_metrics_have_the_advised_buckets_and_the_attributes_of_the_conventions(
    recorder: Recorder,
) -> None:
    async with memory_agent() as (agent, peer):
        await ask(agent, peer, tokens=7)
        await ask(agent, peer, tokens=500)
    seconds = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
    tokens = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
    for metric, buckets in ((DURATION, seconds), (FIRST_CHUNK, seconds), (TOKENS, tokens)):
        (point,) = recorder.points(metric)
        assert point.count == 2
        assert tuple(point.explicit_bounds) == buckets
        attributes = dict(point.attributes or {})
        assert attributes.pop("gen_ai.token.type", None) == ("total" if metric == TOKENS else None)
        assert set(attributes) == {
            "gen_ai.operation.name",
            "gen_ai.provider.name",
            "server.address",
            "server.port",
        }
    (point,) = recorder.points(TOKENS)
    assert (point.sum, point.min, point.max) == (507, 7, 500)


async def test_a_span_lasts_from_the_call_to_the_end_as_does_its_duration(recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("prompt")
        request_id = await prompt_id(peer)
        await anyio.sleep(2)
        peer.send(OM.EventTextChunk("answer", id=request_id))
        await anyio.sleep(3)
        peer.send(OM.EventEnd(7, id=request_id))
        await response.collect()
    (duration,), (first_chunk,) = recorder.points(DURATION), recorder.points(FIRST_CHUNK)
    assert duration.sum == pytest.approx(5)
    assert first_chunk.sum == pytest.approx(2)
    assert recorder.span.start_time is not None
    assert recorder.span.end_time is not None
    assert recorder.span.end_time - recorder.span.start_time == pytest.approx(5e9)


async def test_an_answer_without_an_event_has_no_first_chunk(recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("prompt")
        peer.send(OM.EventEnd(0, id=await prompt_id(peer)))
        await response.collect()
    assert recorder.points(FIRST_CHUNK) == []
    assert [point.count for point in recorder.points(DURATION)] == [1]
    assert [point.sum for point in recorder.points(TOKENS)] == [0]


async def test_a_request_waiting_for_its_lane_counts_from_the_call(recorder: Recorder) -> None:
    async with memory_agent(wire="single") as (agent, peer), anyio.create_task_group() as tasks:
        first = await agent.send_message("first")
        tasks.start_soon(agent.ask, "second")
        await anyio.sleep(2)
        for _ in range(2):
            await peer.receive()
            peer.send(OM.EventTextChunk("answer"), OM.EventEnd(7))
        await first.collect()
    for metric in (DURATION, FIRST_CHUNK):
        (point,) = recorder.points(metric)
        assert point.count == 2
        assert [point.min, point.max] == [pytest.approx(2)] * 2


# Parents


async def test_the_parent_is_the_span_that_is_current_in_the_caller(recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        with recorder.tracer.start_as_current_span("the caller's") as caller:
            response = await agent.send_message("prompt")
            assert trace.get_current_span() is caller
        with recorder.tracer.start_as_current_span("another"):
            await answer(peer)
            await response.collect()
    assert recorder.span.parent == caller.get_span_context()
    assert recorder.span.context is not None
    assert recorder.span.context.trace_id == caller.get_span_context().trace_id


async def test_a_request_outside_of_any_span_is_the_root_of_its_trace(recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        await ask(agent, peer)
    assert recorder.span.parent is None


async def test_concurrent_requests_do_not_nest_in_each_other(recorder: Recorder) -> None:
    callers: dict[str, trace.SpanContext] = {}

    async def call(agent: Agent, name: str) -> None:
        with recorder.tracer.start_as_current_span(name) as caller:
            callers[name] = caller.get_span_context()
            await agent.ask("prompt", conversation=name)

    async with memory_agent() as (agent, peer), anyio.create_task_group() as tasks:
        names = [f"caller {number}" for number in range(20)]
        for name in names:
            tasks.start_soon(call, agent, name)
        ids = [await prompt_id(peer) for _ in names]
        for request_id in reversed(ids):
            peer.send(OM.EventTextChunk("answer", id=request_id))
            await anyio.lowlevel.checkpoint()
        for request_id in ids:
            peer.send(OM.EventEnd(7, id=request_id))
    parents = {(span.attributes or {})["gen_ai.conversation.id"]: span.parent for span in recorder.spans}
    assert parents == callers


async def test_requests_of_one_caller_are_siblings(recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        with recorder.tracer.start_as_current_span("the caller's") as caller:
            responses = [await agent.send_message("prompt") for _ in range(3)]
            for _ in responses:
                await answer(peer)
            for response in responses:
                await response.collect()
    assert [span.parent for span in recorder.spans] == [caller.get_span_context()] * 3


async def test_a_measurement_refers_to_the_span_of_its_request(recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        await ask(agent, peer)
    assert recorder.span.context is not None
    for metric in (DURATION, FIRST_CHUNK, TOKENS):
        (point,) = recorder.points(metric)
        assert [each.span_id for each in point.exemplars] == [recorder.span.context.span_id]


# Outcomes


async def answered_with_an_error(agent: Agent, peer: MemoryPeer) -> None:
    response = await agent.send_message("prompt")
    peer.send(OM.Error("overloaded", SECRET, id=await prompt_id(peer)))
    await response.collect()


async def disconnected(agent: Agent, peer: MemoryPeer) -> None:
    response = await agent.send_message("prompt")
    await prompt_id(peer)
    peer.close(1011, SECRET)
    await response.collect()


async def disconnected_before(agent: Agent, peer: MemoryPeer) -> None:
    peer.close(1011, SECRET)
    await anyio.wait_all_tasks_blocked()
    await agent.send_message("prompt")


async def undecodable(agent: Agent, peer: MemoryPeer) -> None:
    response = await agent.send_message("prompt")
    peer.send(
        b'{"type": "AGENT_EVENT_TEXT_CHUNK", "text": ["%s"], "id": "%s"}'
        % (SECRET.encode(), str(await prompt_id(peer)).encode())
    )
    await response.collect()


async def not_read(agent: Agent, peer: MemoryPeer) -> None:
    async with await agent.send_message("prompt") as response:
        request_id = await prompt_id(peer)
        for _ in range(3):
            peer.send(OM.EventToolCall(id=request_id, call_id="1", name=SECRET, arguments=SECRET))
            await anyio.wait_all_tasks_blocked()
        async for _ in response:
            pass


async def not_encodable(agent: Agent, peer: MemoryPeer) -> None:
    await agent.send_message(SECRET, conversation="\ud800")


@pytest.mark.parametrize(
    ("failing", "error", "error_type"),
    [
        (answered_with_an_error, AgentError, "anyagent.errors.AgentError"),
        (disconnected, Disconnected, "anyagent.errors.Disconnected"),
        (disconnected_before, Disconnected, "anyagent.errors.Disconnected"),
        (undecodable, ProtocolError, "anyagent.errors.ProtocolError"),
        (not_read, SlowConsumerError, "anyagent.errors.SlowConsumerError"),
        (not_encodable, ValueError, "ValueError"),
    ],
)
async def test_a_failure_is_told_by_its_class_and_by_nothing_else(
    recorder: Recorder,
    failing: Callable[[Agent, MemoryPeer], Awaitable[None]],
    error: type[Exception],
    error_type: str,
) -> None:
    async with memory_agent(limits=Limits(response_events=2)) as (agent, peer):
        with pytest.raises(error):
            await failing(agent, peer)
    attributes = recorder.span.attributes or {}
    assert attributes["error.type"] == error_type
    assert "anyagent.cancelled" not in attributes
    assert "gen_ai.response.finish_reasons" not in attributes
    assert recorder.span.status.status_code is StatusCode.ERROR
    assert recorder.span.status.description is None
    assert recorder.span.events == ()
    (point,) = recorder.points(DURATION)
    assert (point.attributes or {})["error.type"] == error_type
    assert recorder.points(TOKENS) == []
    assert SECRET not in recorder.everything()


async def test_a_conversation_that_cannot_be_encoded_does_not_break_the_export(recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        with pytest.raises(ValueError, match="surrogate"):
            await not_encodable(agent, peer)
    assert (recorder.span.attributes or {})["gen_ai.conversation.id"] == "?"


async def leave(agent: Agent, peer: MemoryPeer) -> None:
    async with await agent.send_message("prompt") as response:
        peer.send(OM.EventTextChunk("answer", id=await prompt_id(peer)))
        async for _ in response:
            break


async def time_out(agent: Agent, peer: MemoryPeer) -> None:
    with anyio.move_on_after(1):
        await agent.ask("prompt")


async def cancel_while_waiting_for_a_lane(agent: Agent, peer: MemoryPeer) -> None:
    async with await agent.send_message("another, left as well"):
        with anyio.move_on_after(1):
            await agent.send_message("prompt")


async def abandon(agent: Agent, peer: MemoryPeer) -> None:
    response = await agent.send_message("prompt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del response
        gc.collect()
    await anyio.wait_all_tasks_blocked()


@pytest.mark.parametrize("way", [leave, time_out, cancel_while_waiting_for_a_lane, abandon])
async def test_a_request_that_its_caller_leaves_is_no_error(
    recorder: Recorder, way: Callable[[Agent, MemoryPeer], Awaitable[None]]
) -> None:
    async with memory_agent(limits=Limits(in_flight=1)) as (agent, peer):
        await way(agent, peer)
    assert recorder.spans
    for span in recorder.spans:
        assert span.attributes is not None
        assert span.attributes["anyagent.cancelled"] is True
        assert not {"error.type", "anyagent.tokens_used"} & set(span.attributes)
        assert span.status.status_code is StatusCode.UNSET
    (point,) = recorder.points(DURATION)
    assert point.count == len(recorder.spans)
    assert (point.attributes or {})["anyagent.cancelled"] is True
    assert recorder.points(TOKENS) == []


async def test_a_cancelled_wait_for_a_lane_lasts_as_long_as_it_was_waited(recorder: Recorder) -> None:
    async with memory_agent(limits=Limits(in_flight=1)) as (agent, peer):
        await cancel_while_waiting_for_a_lane(agent, peer)
    assert [point.max for point in recorder.points(DURATION)] == [pytest.approx(1)]


@pytest.mark.parametrize("tokens", [-1, 2**63, 10**30])
async def test_a_number_of_tokens_that_no_exporter_takes_is_left_out(
    recorder: Recorder, tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with memory_agent() as (agent, peer):
        await ask(agent, peer, tokens=tokens)
    assert "anyagent.tokens_used" not in (recorder.span.attributes or {})
    assert recorder.points(TOKENS) == []
    assert [point.count for point in recorder.points(DURATION)] == [1]
    assert caplog.records == []


async def test_the_largest_number_of_tokens_is_exported(recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        await ask(agent, peer, tokens=2**63 - 1)
    assert (recorder.span.attributes or {})["anyagent.tokens_used"] == 2**63 - 1
    assert [point.max for point in recorder.points(TOKENS)] == [2**63 - 1]


async def test_a_status_of_the_agents_own_making_is_not_exported(recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        await ask(agent, peer, status=SECRET)
    assert (recorder.span.attributes or {})["gen_ai.response.finish_reasons"] == ("_OTHER",)
    assert SECRET not in recorder.everything()


async def test_a_request_that_is_open_when_the_agent_is_closed_ends_with_it(recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("prompt")
        await prompt_id(peer)
    assert (recorder.span.attributes or {})["error.type"] == "anyagent.errors.Disconnected"
    with pytest.raises(Disconnected):
        await response.collect()


@pytest.mark.sockets
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True)
async def test_a_request_that_outlives_a_connection_has_one_span(recorder: Recorder) -> None:
    async def drop_the_first(message: IM.UserMessage, reply: AgentReply) -> None:
        if message.text == "first":
            await reply.tool_call("drop", "{}")
            reply.drop()

    with embedded_agent(drop_the_first, wire="single") as server:
        async with (
            open_agent(server.url, reconnect=Backoff(initial=0.01)) as agent,
            anyio.create_task_group() as tasks,
        ):
            first = await agent.send_message("first", conversation="first")
            tasks.start_soon(lambda: agent.ask("second", conversation="second"))
            await anyio.wait_all_tasks_blocked()
            call = await anext(first)
            assert isinstance(call, OM.EventToolCall)
            await first.send_tool_result(call.call_id, "")
            with pytest.raises(Disconnected):
                await first.collect()
    assert [span.attributes["gen_ai.conversation.id"] for span in recorder.spans if span.attributes] == [
        "first",
        "second",
    ]
    assert [span.status.status_code for span in recorder.spans] == [StatusCode.ERROR, StatusCode.UNSET]


# What is said


async def chatty(message: IM.UserMessage, reply: AgentReply) -> None:
    await reply.text(message.text)
    raise RuntimeError(message.text)


@pytest.mark.sockets
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True)
async def test_of_the_url_the_host_and_port_are_exported_and_nothing_secret(
    recorder: Recorder,
) -> None:
    with embedded_agent(chatty) as server:
        url = f"ws://{SECRET}:{SECRET}@127.0.0.1:{server.port}/{SECRET}?{SECRET}={SECRET}"
        metadata = {SECRET: SECRET}
        async with open_agent(url) as agent:
            with pytest.raises(AgentError) as caught:
                await agent.ask(SECRET, metadata=metadata)
    assert caught.value.partial is not None
    assert caught.value.partial.text == SECRET
    for attributes in (recorder.span.attributes, *(point.attributes for point in recorder.points(DURATION))):
        assert attributes is not None
        assert attributes["server.address"] == "127.0.0.1"
        assert attributes["server.port"] == server.port
    exported = recorder.everything()
    assert SECRET not in exported
    assert "czNjcjN0" not in exported  # the beginning of Basic credentials


async def test_no_event_of_an_answer_is_exported(recorder: Recorder) -> None:
    async with (
        memory_agent() as (agent, peer),
        await agent.send_message(SECRET, metadata={SECRET: SECRET}) as response,
    ):
        request_id = await prompt_id(peer)
        peer.send(
            OM.EventReasoningChunk(SECRET, id=request_id),
            OM.EventToolCall(id=request_id, call_id=SECRET, name=SECRET, arguments=SECRET),
            json.dumps({"type": SECRET, "id": request_id}).encode(),
            OM.EventTextChunk(SECRET, id=request_id),
        )
        async for event in response:
            if isinstance(event, OM.EventToolCall):
                await response.send_tool_result(event.call_id, SECRET)
                peer.send(OM.EventEnd(7, id=request_id))
    assert recorder.span.status.status_code is StatusCode.UNSET
    assert SECRET not in recorder.everything()


# Instrumenting


async def test_nothing_is_exported_unless_instrumented(bare_recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        await ask(agent, peer)
        bare_recorder.instrument()
        otel.uninstrument()
        await ask(agent, peer)
    assert bare_recorder.spans == []
    assert bare_recorder.points(DURATION) == []


async def test_a_request_in_flight_is_observed_to_its_end(recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("prompt")
        otel.uninstrument()
        await answer(peer)
        await response.collect()
    assert (recorder.span.attributes or {})["anyagent.tokens_used"] == 7


async def test_a_request_made_before_is_not_observed(bare_recorder: Recorder) -> None:
    async with memory_agent() as (agent, peer):
        response = await agent.send_message("prompt")
        bare_recorder.instrument()
        await answer(peer)
        await response.collect()
    assert bare_recorder.spans == []


def test_instrumenting_twice_is_refused_and_changes_nothing(recorder: Recorder) -> None:
    with pytest.raises(RuntimeError, match="uninstrument"):
        otel.instrument()
    otel.uninstrument()
    otel.uninstrument()
    recorder.instrument()


class Choosy(Sampler):
    """Notes what it is asked about, and takes everything."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Mapping[str, Any]]] = []

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Mapping[str, Any] | None = None,
        links: Sequence[trace.Link] | None = None,
        trace_state: trace.TraceState | None = None,
    ) -> SamplingResult:
        self.seen.append((name, dict(attributes or {})))
        return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)

    def get_description(self) -> str:
        return "Choosy"


async def test_a_sampler_sees_all_that_is_known_when_the_request_is_made() -> None:
    sampler = Choosy()
    recorder = Recorder(sampler)
    recorder.instrument(agent_name="Clerk")
    try:
        async with memory_agent() as (agent, peer):
            await ask(agent, peer)
    finally:
        otel.uninstrument()
        recorder.shut_down()
    ((name, attributes),) = sampler.seen
    assert name == "invoke_agent Clerk"
    assert set(attributes) == {
        "gen_ai.operation.name",
        "gen_ai.provider.name",
        "gen_ai.agent.name",
        "server.address",
        "server.port",
    }


async def test_requests_that_are_not_sampled_are_measured() -> None:
    recorder = Recorder(ALWAYS_OFF)
    recorder.instrument()
    try:
        async with memory_agent() as (agent, peer):
            await ask(agent, peer)
    finally:
        otel.uninstrument()
        points = recorder.points(DURATION)
        recorder.shut_down()
    assert recorder.spans == []
    assert [point.count for point in points] == [1]


class Broken(SpanProcessor):
    def __init__(self, when: str) -> None:
        self._when = when

    def on_start(self, span: trace.Span, parent_context: Context | None = None) -> None:
        if self._when == "start":
            raise ZeroDivisionError

    def on_end(self, span: ReadableSpan) -> None:
        if self._when == "end":
            raise ZeroDivisionError


@pytest.mark.parametrize("when", ["start", "end"])
async def test_a_span_processor_that_raises_harms_no_request(
    recorder: Recorder, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.tracer_provider.add_span_processor(Broken(when))
    async with memory_agent() as (agent, peer):
        await ask(agent, peer)
        await ask(agent, peer)
    assert [(record.name, record.levelno) for record in caplog.records] == [
        ("anyagent.otel", logging.ERROR)
    ] * 2
    assert "ZeroDivisionError" in caplog.text


def test_without_providers_the_global_ones_are_used() -> None:
    program = """
import anyio
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from anyagent import OM, otel
from anyagent.testing import memory_agent

otel.instrument()  # may come before the providers are there
exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider([reader]))

async def main():
    async with memory_agent() as (agent, peer):
        async with await agent.send_message("prompt"):
            pass

anyio.run(main)
print(*[span.name for span in exporter.get_finished_spans()])
print(*[metric.name for each in reader.get_metrics_data().resource_metrics
        for scope in each.scope_metrics for metric in scope.metrics])
"""
    assert run(program) == ["invoke_agent", DURATION]


def test_only_the_module_itself_imports_opentelemetry() -> None:
    program = """
import sys
import anyagent, anyagent.cli, anyagent.testing
print(any(name.split(".")[0] == "opentelemetry" for name in sys.modules))
import anyagent.otel
print(any(name.startswith("opentelemetry.sdk") for name in sys.modules))
"""
    assert run(program) == ["False", "False"]


def run(program: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.splitlines()
