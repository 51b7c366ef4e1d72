"""Traces: one for each task, from its publisher through every attempt to the acknowledgement.

A task's span continues the publisher's `traceparent`. Without it, the trace id is derived from the stream entry, so
that all deliveries of a task are in one trace, in any process. A later delivery also links to the one before. Spans
have ids, names, numbers and codes, but no text of a prompt, a completion, a key or an error message, and no user id
(G10).
Traces are never written to the ledger.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from typing import Final, Literal

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from tollbook.consumers.messages import Delivery, trace_of
from tollbook.inference.attempts import Attempt
from tollbook.inference.calls.holds import Charge, Hold
from tollbook.inference.calls.steps import RecordAttempt
from tollbook.ledger.gate.requests import (
    AlreadySettled,
    Denied,
    OpenCall,
    Reserved,
    ReserveReply,
    Settled,
    SettleRequest,
    Waiting,
)
from tollbook.schemas.results import InferenceResult, TaskStatus
from tollbook.schemas.routes import Target

_PROPAGATOR: Final = TraceContextTextMapPropagator()
_ids: ContextVar[tuple[int | None, int | None]] = ContextVar("span_ids", default=(None, None))
Attributes = Mapping[str, AttributeValue | None]


class TaskIds(RandomIdGenerator):
    """Random ids, except for the span of a delivery, whose ids are derived from the stream entry."""

    def generate_trace_id(self) -> int:
        """Return the delivery's trace id while its span is started; otherwise a random id."""
        return _ids.get()[0] or super().generate_trace_id()

    def generate_span_id(self) -> int:
        """Return the delivery's span id while its span is started; otherwise a random id."""
        return _ids.get()[1] or super().generate_span_id()


class Tracing:
    """Traces tasks and the steps of their calls. `provider` must have been created with `TaskIds`."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("tollbook")

    @contextmanager
    def working(self, delivery: Delivery) -> Generator[Callable[[InferenceResult], None]]:
        """Trace one delivery of a task, until it is acknowledged or given up."""
        headers = trace_of(delivery)
        # Not this process's own context, because reading the streams is not part of the task.
        parent = _PROPAGATOR.extract(headers, context=Context())
        before = trace.get_current_span(parent).get_span_context()
        trace_id = before.trace_id if before.is_valid else _trace_id(delivery)
        reading = trace.get_current_span().get_span_context()
        links = [Link(reading, {"tollbook.link": "read_in"})] if reading.is_valid else []
        if delivery.is_claimed:
            previous = SpanContext(
                trace_id, _span_id(delivery, delivery.deliveries - 1), is_remote=True, trace_flags=TraceFlags(1)
            )
            links.append(Link(previous, {"tollbook.link": "previous_delivery"}))
        token = _ids.set((trace_id, _span_id(delivery, delivery.deliveries)))
        try:
            span = self._tracer.start_span(
                f"process {delivery.stream}",
                parent,
                SpanKind.CONSUMER,
                links=links,
                attributes={
                    "messaging.system": "redis",
                    "messaging.operation.type": "process",
                    "messaging.destination.name": delivery.stream,
                    "messaging.message.id": delivery.entry_id,
                    "tollbook.deliveries": delivery.deliveries,
                },
            )
        finally:
            _ids.reset(token)

        def record_outcome(result: InferenceResult) -> None:
            _set(
                span,
                {
                    "tollbook.task_id": result.task_id,
                    "tollbook.task_type": result.task_type,
                    "tollbook.status": result.status.value,
                    "error.type": result.error_code.value if result.error_code else None,
                },
            )
            if result.status in (TaskStatus.FAILED, TaskStatus.INVALID):
                span.set_status(Status(StatusCode.ERROR))

        with _inside(span):
            yield record_outcome

    @contextmanager
    def acknowledging(self) -> Generator[None]:
        """Trace the acknowledgement of a task."""
        with self._step("acknowledge"):
            yield

    @contextmanager
    def reserving(self, amount_nanousd: int) -> Generator[Callable[[ReserveReply], None]]:
        """Trace the reservation of money for a call."""
        with self._step("reserve", {"tollbook.amount_nanousd": amount_nanousd}) as span:

            def record_outcome(reply: ReserveReply) -> None:
                _set(span, {"tollbook.reply": _kind_of(reply)})
                match reply:
                    case Reserved() | OpenCall():
                        _set(span, {"tollbook.hold": reply.hold})
                    case Denied():
                        _set(span, {"tollbook.reason": reply.reason})
                    case _:
                        pass

            yield record_outcome

    @contextmanager
    def attempting(self, target: Target, number: int) -> Generator[RecordAttempt]:
        """Trace one HTTP request to a provider."""
        attributes = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": target.model,
            "tollbook.provider": target.provider,
            "tollbook.attempt": number,
        }
        with self._step(f"chat {target.model}", attributes, kind=SpanKind.CLIENT) as span:

            def record_outcome(attempt: Attempt, charge: Charge) -> None:
                if attempt.embeddings:
                    span.update_name(f"embeddings {target.model}")
                    _set(span, {"gen_ai.operation.name": "embeddings"})
                _set(
                    span,
                    {
                        "tollbook.outcome": attempt.outcome,
                        "tollbook.cost_nanousd": charge.nanousd,
                        "tollbook.basis": charge.basis,
                        "http.response.status_code": attempt.http_status,
                        "gen_ai.response.id": attempt.generation_id,
                        "gen_ai.response.model": attempt.model_used,
                        "gen_ai.response.finish_reasons": [attempt.finish_reason] if attempt.finish_reason else None,
                        "gen_ai.usage.input_tokens": attempt.usage.prompt_tokens if attempt.usage else None,
                        "gen_ai.usage.output_tokens": attempt.usage.completion_tokens if attempt.usage else None,
                    },
                )
                if attempt.reason is not None:
                    _set(span, {"tollbook.reason": attempt.reason})
                if attempt.usage_doubt is not None:
                    _set(span, {"tollbook.usage_doubt": attempt.usage_doubt})
                if not attempt.is_ok or attempt.error_code is not None:
                    _fail(span, attempt.outcome if not attempt.is_ok else attempt.reason or attempt.outcome)

            yield record_outcome

    @contextmanager
    def preparing(
        self, step: Literal["retry", "fallback"], *, from_model: str, to_model: str, reason: str
    ) -> Generator[Callable[[str | None], None]]:
        """Trace the extension of a hold for the next attempt."""
        attributes = {
            "tollbook.from_model": from_model,
            "gen_ai.request.model": to_model,
            "tollbook.reason": reason,
        }
        with self._step(step, attributes) as span:

            def record_outcome(failure: str | None) -> None:
                if failure is not None:
                    _fail(span, "not_prepared")

            yield record_outcome

    @contextmanager
    def settling(
        self, request: SettleRequest, hold: Hold | None
    ) -> Generator[Callable[[Settled | AlreadySettled], None]]:
        """Trace the settlement of a hold."""
        attributes = {
            "tollbook.hold": request.hold,
            "tollbook.cost_nanousd": request.cost_nanousd,
            "tollbook.assumed_nanousd": request.assumed_nanousd,
            "tollbook.basis": hold.basis if hold else None,
            "tollbook.is_final": request.is_final,
        }
        with self._step("settle", attributes) as span:

            def record_outcome(reply: Settled | AlreadySettled) -> None:
                is_new = isinstance(reply, Settled) and bool(reply.entry_id)
                _set(span, {"tollbook.reply": "settled" if is_new else "settled_before"})
                if isinstance(reply, Settled) and reply.entry_id:
                    _set(span, {"tollbook.event_id": reply.entry_id})

            yield record_outcome

    @contextmanager
    def _step(
        self, name: str, attributes: Attributes | None = None, *, kind: SpanKind = SpanKind.INTERNAL
    ) -> Generator[Span]:
        span = self._tracer.start_span(name, kind=kind, attributes=_known(attributes or {}))
        with _inside(span):
            yield span


@contextmanager
def _inside(span: Span) -> Generator[None]:
    """Make the span current, and end it. Only the type of an error is recorded, because its text may quote a prompt."""
    try:
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            yield
    except BaseException as exc:
        _fail(span, type(exc).__name__)
        raise
    finally:
        span.end()


def _fail(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


def _set(span: Span, attributes: Attributes) -> None:
    span.set_attributes(_known(attributes))


def _known(attributes: Attributes) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}


def _kind_of(reply: ReserveReply) -> str:
    match reply:
        case Reserved():
            return "reserved"
        case Denied():
            return "denied"
        case Waiting():
            return "waiting"
        case OpenCall():
            return "open"
        case _:
            return "finished"


def _trace_id(delivery: Delivery) -> int:
    return _digest(16, delivery.stream, delivery.entry_id)


def _span_id(delivery: Delivery, number: int) -> int:
    # A task that was given back without work does not count as delivered, so its next delivery has the same id.
    return _digest(8, delivery.stream, delivery.entry_id, str(number))


def _digest(size: int, *parts: str) -> int:
    # Never 0, which is not a valid id.
    return int.from_bytes(blake2b("\0".join(parts).encode(), digest_size=size).digest()) | 1
