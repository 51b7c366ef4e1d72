"""One trace for each task: from its publisher over every attempt to the acknowledgement, and nothing private in it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from faststream.redis import RedisBroker
from faststream.redis.opentelemetry import RedisTelemetryMiddleware
from opentelemetry import trace
from opentelemetry.propagate import inject
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, StatusCode, format_trace_id
from redis.asyncio import Redis

from tests.servers import wait_until
from tests.system import REPLIES, GatedStandIn, RunningSystem, running_system, serving
from tollbook.inference.settings import Settings
from tollbook.observability import exporting
from tollbook.observability.exporting import open_tracing
from tollbook.observability.tracing import TaskIds, Tracing
from tollbook.schemas.results import TaskStatus
from tollbook.standin import StandInConfig
from tollbook.standin.faults import FaultPlan

SONNET, MINI = "anthropic/claude-sonnet-4", "openai/gpt-4o-mini"
SECRET, USER = "the-prompt-nobody-may-see", "user-who-is-nobodys-business"


class Traced:
    """A provider that keeps its spans here."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(id_generator=TaskIds(), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(provider)

    def of(self, trace_id: int) -> list[ReadableSpan]:
        """The spans of one trace, in the order of their ends."""
        return [span for span in self.exporter.get_finished_spans() if context_of(span).trace_id == trace_id]

    def text(self) -> str:
        return "".join(span.to_json() for span in self.exporter.get_finished_spans())


def context_of(span: ReadableSpan) -> SpanContext:
    assert span.context is not None
    return span.context


def make_task(task_id: str, **fields: str) -> dict[str, str]:
    given = {"task": "generate_draft", "task_id": task_id, "user_id": USER, "prompt": SECRET, "reply_to": REPLIES}
    return {**given, "campaign_id": "campaign-of-theirs", "metadata": f'{{"note": "{SECRET}"}}', **fields}


def names(spans: Sequence[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


def children_of(spans: Sequence[ReadableSpan], parent: ReadableSpan) -> list[ReadableSpan]:
    found = [span for span in spans if span.parent is not None and span.parent.span_id == context_of(parent).span_id]
    return sorted(found, key=lambda span: span.start_time or 0)


async def test_a_request_for_embeddings_is_named_so(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    traced, publisher = Traced(), trace.get_tracer("publisher", tracer_provider=TracerProvider())
    model, policy = "openai/text-embedding-3-small", tmp_path / "tollbook.toml"
    policy.write_text(f'[tasks.embed]\nkind = "embeddings"\nmodel = "{model}"\n')
    standin = GatedStandIn(StandInConfig(lists_prices=True))
    async with running_system(
        tmp_path / "data", server_url, provider=standin, tracing=traced.tracing, policy_file=policy
    ) as running:
        carrier: dict[str, str] = {}
        with publisher.start_as_current_span("publish", kind=SpanKind.PRODUCER) as published:
            inject(carrier)
        task = {"task": "embed", "user_id": "u1", "task_id": "e1", "reply_to": REPLIES, "input": "text", **carrier}
        await running.publish("generation", [task])
        await running.answers(["e1"])
        await settled(running)
    [span] = [each for each in traced.of(published.get_span_context().trace_id) if each.kind is SpanKind.CLIENT]
    assert (span.name, dict(span.attributes or {})["gen_ai.operation.name"]) == (f"embeddings {model}", "embeddings")


async def settled(running: RunningSystem) -> None:
    async def is_acknowledged() -> bool:
        return await running.pending() == 0 and not running.workers[-1].in_flight

    await wait_until(is_acknowledged, what="the acknowledgement")


async def test_a_trace_is_one_tree_from_publisher_over_a_fallback_to_the_acknowledgement(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    traced, publisher = Traced(), trace.get_tracer("publisher", tracer_provider=TracerProvider())
    standin = GatedStandIn(StandInConfig(faults=FaultPlan(script=("http_500", None))))
    async with running_system(
        tmp_path / "data", server_url, provider=standin, tracing=traced.tracing, retries=0
    ) as running:
        carrier: dict[str, str] = {}
        with publisher.start_as_current_span("publish", kind=SpanKind.PRODUCER) as published:
            inject(carrier)
        await running.publish("generation", [make_task("traced", **carrier)])
        result = (await running.answers(["traced"]))[0]
        await settled(running)
        events = await running.query("FROM events ORDER BY seq")

    spans = traced.of(published.get_span_context().trace_id)
    [root] = [
        span
        for span in spans
        if span.parent is not None and span.parent.span_id == published.get_span_context().span_id
    ]
    assert (root.name, root.kind) == ("process generation", SpanKind.CONSUMER)
    steps = children_of(spans, root)
    assert names(steps) == ["reserve", f"chat {SONNET}", "fallback", f"chat {MINI}", "settle", "acknowledge"]
    assert len(spans) == len(steps) + 1
    reserve, failed, fallback, worked, settle, _ = (dict(span.attributes or {}) for span in steps)
    assert reserve["tollbook.reply"] == "reserved"
    assert (failed["tollbook.outcome"], failed["http.response.status_code"]) == ("http_error", 500)
    assert steps[1].status.status_code is StatusCode.ERROR
    assert (fallback["tollbook.reason"], fallback["gen_ai.request.model"]) == ("http_error", MINI)
    called = [event for event in events if event["type"] == "model-called"]
    cost = next(event for event in events if event["type"] == "cost-recorded")
    assert worked["gen_ai.response.id"] == called[1]["generation_id"]
    assert worked["tollbook.cost_nanousd"] == int(called[1]["charge_usd"] * 10**9)
    assert worked["gen_ai.usage.output_tokens"] == called[1]["completion_tokens"]
    assert settle["tollbook.cost_nanousd"] == int(cost["amount_usd"] * 10**9) == int(result.cost_usd * 10**9)
    assert settle["tollbook.event_id"] == cost["id"]
    assert dict(root.attributes or {})["tollbook.task_id"] == "traced"
    # FastStream's span of the batch is in a trace of its own and links to the publisher's span; the task's links to it.
    assert "payload_size" not in traced.text(), "FastStream is shown no body, whose size would be 0"
    [batch] = [span for span in traced.exporter.get_finished_spans() if span.name == "generation create"]
    assert [link.context.span_id for link in batch.links] == [published.get_span_context().span_id]
    assert [format_trace_id(link.context.trace_id) for link in root.links] == [
        format_trace_id(context_of(batch).trace_id)
    ]
    for private in (SECRET, USER, "campaign-of-theirs", "stand-in]"):
        assert private not in traced.text(), private
    # Nor is the trace on the ledger.
    assert all(carrier["traceparent"].split("-")[1] not in event["payload"] for event in events)


@pytest.mark.slow
async def test_a_redelivery_is_in_the_trace_of_the_first_and_linked_to_it(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    traced = Traced()
    async with running_system(
        tmp_path / "data", server_url, tracing=traced.tracing, workers=0, stop_grace_s=0.0, claim_after_s=1.0
    ) as running:
        async with serving(running, 1):
            await running.provider.shut()
            await running.publish("generation", [make_task("cut-off")])
            await running.provider.wait_for_arrivals(1, user=USER)
        await running.provider.open()
        async with serving(running, 1):
            assert (await running.answers(["cut-off"]))[0].status is TaskStatus.DONE
            await settled(running)
    first, second = [span for span in traced.exporter.get_finished_spans() if span.name == "process generation"]
    assert context_of(first).trace_id == context_of(second).trace_id
    assert first.parent is second.parent is None
    assert [link.context.span_id for link in second.links] == [context_of(first).span_id]
    assert [dict(span.attributes or {})["tollbook.deliveries"] for span in (first, second)] == [1, 2]
    spans = traced.of(context_of(first).trace_id)
    assert names(children_of(spans, first)) == ["reserve", f"chat {SONNET}", "settle"]
    cut_off = children_of(spans, first)[1]
    assert dict(cut_off.attributes or {})["error.type"] == "CancelledError"
    assert names(children_of(spans, second)) == ["reserve", f"chat {SONNET}", "settle", "acknowledge"]


async def test_faststream_s_own_header_is_continued_and_a_malformed_task_has_its_span(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    traced, theirs = Traced(), Traced()
    async with running_system(tmp_path / "data", server_url, tracing=traced.tracing) as running:
        broker = RedisBroker(
            server_url, middlewares=[RedisTelemetryMiddleware(tracer_provider=theirs.tracing.provider)]
        )
        async with broker:
            document: Any = make_task("by-faststream", metadata="")
            await broker.publish(document, stream="generation")
            await broker.publish({"task": "generate_draft", SECRET: SECRET}, stream="analysis")
        await running.answers(["by-faststream"])
        await wait_until(lambda: running.workers[0].finished.total() == 2, what="both tasks")
        await settled(running)
    sent = {span.name: span for span in theirs.exporter.get_finished_spans()}
    for stream, status in (("generation", "done"), ("analysis", "invalid")):
        spans = traced.of(context_of(sent[f"{stream} create"]).trace_id)
        [root] = [span for span in spans if span.name == f"process {stream}"]
        assert root.parent is not None
        assert root.parent.span_id == context_of(sent[f"{stream} create"]).span_id
        assert dict(root.attributes or {})["tollbook.status"] == status
    assert SECRET not in traced.text()


async def test_a_task_is_done_with_any_trace_context(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    malformed = ("", "00-zz", "00-" + 32 * "0" + "-" + 16 * "1" + "-01", 100_000 * "x")
    tasks = [make_task(f"odd-{n}", traceparent=text, tracestate="\x00" + text) for n, text in enumerate(malformed)]
    traced = Traced()
    async with running_system(tmp_path / "data", server_url, tracing=traced.tracing) as running:
        await running.publish("generation", tasks)
        results = await running.answers(task["task_id"] for task in tasks)
        await settled(running)
    assert {result.status for result in results} == {TaskStatus.DONE}
    roots = [span for span in traced.exporter.get_finished_spans() if span.name == "process generation"]
    assert [span.parent for span in roots] == [None] * len(tasks)


async def test_spans_reach_a_collector_and_a_dead_one_does_not_keep_the_process_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    received: list[tuple[str, bytes]] = []

    async def collect(request: web.Request) -> web.Response:
        received.append((request.path, await request.read()))
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", collect)
    collector = TestServer(app)
    await collector.start_server()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", str(collector.make_url("")))
    monkeypatch.setattr(exporting, "_LAST_SPANS_S", 0.1)
    settings = Settings(_env_file=None, traces="otlp")  # pyright: ignore[reportCallIssue]
    async with open_tracing(settings) as tracing:
        assert tracing is not None
        with tracing.reserving(7):
            pass
    [(path, body)] = received
    assert path == "/v1/traces"
    assert b"reserve" in body
    assert b"service.name\x12\n\n\x08tollbook" in body
    async with asyncio.timeout(5), open_tracing(settings) as tracing:
        assert tracing is not None
        with tracing.reserving(7):
            pass
        await collector.close()


async def test_traces_are_off_unless_they_are_asked_for(tmp_path: Path) -> None:
    async with open_tracing(Settings(_env_file=None)) as tracing:  # pyright: ignore[reportCallIssue]
        assert tracing is None
