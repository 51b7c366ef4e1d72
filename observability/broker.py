"""FastStream's own broker middlewares, adapted to how this worker reads.

They wrap `Worker.take`, which returns as soon as each task of a batch has a slot, so they do not see the execution of
tasks. Entries taken over from a dead worker never pass through FastStream. `metrics.py` exposes only those of their
numbers that are correct here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from faststream.opentelemetry import TelemetryMiddleware
    from faststream.redis.prometheus import RedisPrometheusMiddleware
    from prometheus_client import CollectorRegistry

    from tollbook.observability.tracing import Tracing

APP_NAME: Final = "tollbook"
_BODY_SIZE: Final = "messaging.message.payload_size_bytes"


def broker_middlewares(
    registry: "CollectorRegistry | None", tracing: "Tracing | None"
) -> "Sequence[RedisPrometheusMiddleware | TelemetryMiddleware[Any]]":
    """Return the middlewares that count read batches (with `registry`) and trace them (with `tracing`).

    A batch's span is in a trace of its own, with links to the publishers' spans; each task is in its publisher's trace.
    """
    # Imported here: loaded only if metrics are on.
    found: list[Any] = []
    if registry is not None:
        from faststream.redis.prometheus import RedisPrometheusMiddleware

        found.append(RedisPrometheusMiddleware(registry=registry, app_name=APP_NAME))
    if tracing is not None:
        found.append(_tracing_middleware(tracing))
    return found


def _tracing_middleware(tracing: "Tracing") -> "TelemetryMiddleware[Any]":
    from faststream.opentelemetry import TelemetryMiddleware
    from faststream.redis.opentelemetry.provider import RedisTelemetrySettingsProvider

    class Attributes(RedisTelemetrySettingsProvider):
        def get_consume_attrs_from_message(self, msg: Any) -> dict[str, Any]:
            attributes = super().get_consume_attrs_from_message(msg)
            # The parser leaves the body empty, because the worker reads the entries itself. So its size is meaningless.
            attributes.pop(_BODY_SIZE, None)
            return attributes

    return TelemetryMiddleware(
        settings_provider_factory=lambda _: Attributes(),
        tracer_provider=tracing.provider,
        include_messages_counters=False,
    )
