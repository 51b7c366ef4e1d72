"""Serves `/metrics`, `/health/live` and `/health/ready` in plain ASGI."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import structlog

from tollbook.observability.health import Health, Readiness, liveness
from tollbook.observability.metrics import MetricsPage
from tollbook.observability.process_state import ProcessState

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

_TEXT: Final = "text/plain; charset=utf-8"
_INDEX: Final = "Tollbook: /metrics /health/live /health/ready\n"
_log = structlog.get_logger(__name__)


class ObservabilityApp:
    """Answers GET and HEAD, and nothing else."""

    def __init__(self, state: ProcessState) -> None:
        self._state = state
        self._readiness = Readiness(state)
        self._metrics = MetricsPage(state, self._readiness)

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        assert scope["type"] == "http", "the server runs without lifespan and without websockets"
        status, content_type, body = 405, _TEXT, b"only GET and HEAD\n"
        if scope["method"] in ("GET", "HEAD"):
            try:
                status, content_type, body = await self._answer(scope)
            except Exception:  # noqa: BLE001 - the edge of the server: an error here must not affect the worker.
                _log.exception("observability.failed", path=scope["path"])
                status, content_type, body = 500, _TEXT, b"see the log\n"
        headers = [
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            *([(b"allow", b"GET, HEAD")] if status == 405 else []),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, scope: Scope) -> tuple[int, str, bytes]:
        match scope["path"].rstrip("/"):
            case "/metrics":
                body, content_type = await self._metrics.render(_accept(scope))
                return 200, content_type, body
            case "/health/live":
                return _health("live", liveness(self._state))
            case "/health/ready":
                return _health("ready", await self._readiness.get())
            case "":
                return 200, _TEXT, _INDEX.encode()
            case _:
                return 404, _TEXT, _INDEX.encode()


def _health(name: str, health: Health) -> tuple[int, str, bytes]:
    # One line for each check, for people with curl.
    checks = ",\n  ".join(json.dumps(check) for check in health.documents())
    body = f'{{"{name}": {json.dumps(health.ok)}, "checks": [\n  {checks}\n]}}\n'
    return 200 if health.ok else 503, "application/json", body.encode()


def _accept(scope: Scope) -> str:
    return ",".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"accept")
