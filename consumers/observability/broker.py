"""FastStream's own middlewares on the broker, made to fit how this worker reads.

They wrap `Worker.take`, which a batch leaves as soon as each of its tasks has a slot; what becomes of the tasks they do
not see. Entries taken over from a dead worker never pass through FastStream at all. `metrics.py` shows of their numbers
only those that are true here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from faststream.redis.opentelemetry import RedisTelemetryMiddleware
    from faststream.redis.prometheus import RedisPrometheusMiddleware
    from prometheus_client import CollectorRegistry

    from consumers.observability.tracing import Tracing

APP_NAME: Final = "tollbook"


def middlewares(
    registry: "CollectorRegistry | None", tracing: "Tracing | None"
) -> "Sequence[RedisPrometheusMiddleware | RedisTelemetryMiddleware]":
    """Return what counts, into `registry`, the batches that are read, and what traces them; each where it is asked for.

    The span of a batch is of a trace of its own, linked to the publishers' spans: its tasks belong to theirs.
    """
    # Imported here: what nobody asks for costs no start anything.
    found: list[Any] = []
    if registry is not None:
        from faststream.redis.prometheus import RedisPrometheusMiddleware

        found.append(RedisPrometheusMiddleware(registry=registry, app_name=APP_NAME))
    if tracing is not None:
        from faststream.redis.opentelemetry import RedisTelemetryMiddleware

        found.append(RedisTelemetryMiddleware(tracer_provider=tracing.provider))
    return found
