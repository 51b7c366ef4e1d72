"""FastStream's own middlewares on the broker, adapted to how this worker reads.

They wrap `Worker.take`, which returns as soon as each task of a batch has a slot; what becomes of the tasks they do not
see. Entries taken over from a dead worker never pass through FastStream at all. `metrics.py` shows of their numbers
only those that are true here.
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
    """Return what counts, into `registry`, the batches that are read, and what traces them; each where it is asked for.

    The span of a batch is of a trace of its own, linked to the publishers' spans: its tasks belong to theirs.
    """
    # Imported here: what nobody asks for need not be loaded.
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
            # The size of a body that the parser leaves empty, for the worker to read the entries themselves.
            attributes.pop(_BODY_SIZE, None)
            return attributes

    return TelemetryMiddleware(
        settings_provider_factory=lambda _: Attributes(),
        tracer_provider=tracing.provider,
        include_messages_counters=False,
    )
