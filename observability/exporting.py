"""Exports spans: to a collector over OTLP, to standard error, or nowhere.

OpenTelemetry's own variables configure the rest: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_SDK_DISABLED and so on. While traces are off, OpenTelemetry is not
imported.
"""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import structlog

from tollbook.inference.errors import SettingsError
from tollbook.inference.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter

    from tollbook.observability.tracing import Tracing

_LAST_SPANS_S: Final = 3.0
_NOT_INSTALLED: Final = "TOLLBOOK_TRACES: OpenTelemetry is not installed: pip install 'tollbook[tracing]'"
_log = structlog.get_logger(__name__)


@asynccontextmanager
async def open_tracing(settings: Settings) -> AsyncGenerator["Tracing | None"]:
    """Yield the tracing of tasks, or None if traces are off. The last spans are sent at the end.

    Errors: SettingsError if OpenTelemetry is not installed, or its variables are invalid.
    """
    if settings.traces == "off":
        yield None
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        from tollbook.observability.tracing import TaskIds, Tracing
    except ModuleNotFoundError as exc:
        raise SettingsError([_NOT_INSTALLED]) from exc

    # The SDK's own default is "unknown_service".
    name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "tollbook"}
    resource = Resource.create({"service.version": version("tollbook"), **name})
    provider = TracerProvider(resource=resource, id_generator=TaskIds(), shutdown_on_exit=False)
    exporter = _exporter(settings)
    provider.add_span_processor(_processor(exporter, is_slow=settings.traces == "otlp"))
    try:
        yield Tracing(provider)
    finally:
        # In a thread: the shutdown blocks while a collector does not answer, and the loop has other parts to close.
        ending = asyncio.create_task(asyncio.to_thread(provider.shutdown))
        done, _ = await asyncio.wait({ending}, timeout=_LAST_SPANS_S)
        if not done:
            # The exporter retries for up to ten seconds; this makes it stop.
            _log.warning("traces.not_sent", waited_s=_LAST_SPANS_S)
            await asyncio.to_thread(exporter.shutdown)
        await ending


def _processor(exporter: "SpanExporter", *, is_slow: bool) -> "SpanProcessor":
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    try:
        return BatchSpanProcessor(exporter) if is_slow else SimpleSpanProcessor(exporter)
    except ValueError as exc:
        raise SettingsError([f"OTEL_BSP_*: {exc}"]) from exc


def _exporter(settings: Settings) -> "SpanExporter":
    if settings.traces == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as exc:
        raise SettingsError([_NOT_INSTALLED]) from exc
    try:
        return OTLPSpanExporter()
    except ValueError as exc:
        raise SettingsError([f"OTEL_EXPORTER_OTLP_*: {exc}"]) from exc
