"""Idempotency: finds the call that a request belongs to, so that a retry is not paid twice (G4).

`Idempotency-Key` identifies the call, until it fails without cost and a retry may succeed. SDKs that do not send it
count their retries in `x-stainless-retry-count`. Such a retry joins the call with the same key and body whose client
left before the answer was delivered. Each call is joined once, within ten minutes.
"""

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from tollbook.gateway.callers import CALLER_HEADERS
from tollbook.gateway.problems import invalid
from tollbook.inference.api_keys import ApiKey
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import gateway_calls
from tollbook.ledger.server.connection import as_map
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.observability.gateway_counts import GatewayCounts

KEY_HEADER: Final = "idempotency-key"
RETRY_HEADER: Final = "x-stainless-retry-count"
_JOINED_WITHIN_MS: Final = 600_000
_MAX_KEY: Final = 255
_LOOK_AGAIN_S: Final = 0.25
_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class CallIdentity:
    """The identity of a request's call."""

    call_id: str
    begun_ms: int = 0
    undelivered_key: str | None = field(default=None, repr=False)
    """The Redis hash of undelivered calls, where a retry finds this call; None if no retry can."""
    failures_key: str | None = field(default=None, repr=False)
    """With an Idempotency-Key: the Redis hash of its calls that failed without cost."""
    failures: int = 0
    """How many calls of this Idempotency-Key failed without cost before."""


class Idempotency:
    """Finds or creates the call of a request. `is_alive` tells whether a gateway, by its name, still runs."""

    def __init__(
        self,
        pipeline: CommandPipeline,
        *,
        namespace: str,
        gateway: str,
        is_alive: Callable[[str], Awaitable[bool]],
        patience_s: float,
        remembered_s: int,
        counts: GatewayCounts,
        now_ms: Callable[[], int] = lambda: round(1000 * time.time()),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`patience_s`: how long a retry waits to learn whether another gateway that has its call has ended.

        `remembered_s`: how long an Idempotency-Key identifies the same call.
        """
        self._patience_s = patience_s
        self._remembered_s = remembered_s
        self._counts = counts
        self._sleep = sleep
        self._pipeline = pipeline
        self._namespace = namespace
        self._gateway = gateway
        self._is_alive = is_alive
        self._now_ms = now_ms

    async def identify(
        self, key: ApiKey, path: str, headers: Mapping[str, str], body: Mapping[str, Any]
    ) -> CallIdentity:
        """Return the call of a request: that of its Idempotency-Key, one that it joins, or a new one.

        Errors: Problem (400) for an invalid Idempotency-Key; LedgerUnavailable.
        """
        named = headers.get(KEY_HEADER)
        if named is not None:
            if not named or len(named) > _MAX_KEY:
                raise invalid(f"'Idempotency-Key' must have 1 to {_MAX_KEY} characters")
            return await self._named(key, named)
        call_id = f"gw-{uuid.uuid4().hex}"
        retries = headers.get(RETRY_HEADER, "")
        if not (retries.isascii() and retries.isdecimal()):
            return CallIdentity(call_id)
        call = CallIdentity(call_id, self._now_ms())
        content = json.dumps(body, sort_keys=True, separators=(",", ":"))
        caller = (headers.get(header, "") for header in CALLER_HEADERS)
        call.undelivered_key = gateway_calls(self._namespace, _digest(key.key_id, path, content, *caller))
        if retries.strip("0"):
            call.call_id = await self._join(call.undelivered_key) or call_id
            self._counts.joined += call.call_id != call_id
        await self._keep(call, gateway=self._gateway)
        return call

    async def _named(self, key: ApiKey, named: str) -> CallIdentity:
        """Return the call of an Idempotency-Key. After each call that failed without cost, the next one is new."""
        failures_key = gateway_calls(self._namespace, _digest("tries", key.key_id, named))
        failures = int(await self._pipeline.execute("HLEN", failures_key))
        parts = (key.key_id, named, str(failures)) if failures else (key.key_id, named)
        return CallIdentity(f"gw-{_digest(*parts)}", failures_key=failures_key, failures=failures)

    async def record_free_failure(self, call: CallIdentity) -> None:
        """Record that a call failed without cost and may be tried again, so that a retry makes a new call.

        Concurrent requests that got the same refusal are recorded once.
        """
        if call.failures_key is not None:
            await self._execute_and_log("HSETNX", call.failures_key, str(call.failures), "1")
            await self._execute_and_log("EXPIRE", call.failures_key, str(self._remembered_s))

    async def mark_delivered(self, call: CallIdentity) -> None:
        """Record that the answer has reached its client."""
        if call.undelivered_key is not None:
            await self._execute_and_log("HDEL", call.undelivered_key, call.call_id)

    async def mark_abandoned(self, call: CallIdentity) -> None:
        """Record that the client left before it had the answer, so that a retry may join the call."""
        if call.undelivered_key is not None:
            try:
                await self._keep(call, gateway="")
            except LedgerUnavailable as exc:
                _log.warning("gateway.call_not_kept", call_id=call.call_id, problem=str(exc))

    async def is_joined(self, call: CallIdentity) -> bool:
        """Whether a retry has joined a call whose client left; True if that is unknown."""
        if call.undelivered_key is None:
            # A call with an Idempotency-Key may be awaited at any gateway.
            return call.failures_key is not None  # G4
        try:
            found: bytes | None = await self._pipeline.execute("HGET", call.undelivered_key, call.call_id)
        except LedgerUnavailable:
            return True
        return found is None or bool(found.decode().partition(" ")[2])

    async def _join(self, undelivered_key: str) -> str | None:
        """Return the call that a retry joins; None if no client of such a call has left.

        A gateway that was killed could not record that its clients left; that is seen when its heartbeat stops.
        """
        waited_s = 0.0
        while True:
            elsewhere = False
            for call_id, begun_ms, gateway in await self._undelivered(undelivered_key):
                if begun_ms < self._now_ms() - _JOINED_WITHIN_MS or gateway == self._gateway:
                    continue
                if gateway and await self._is_alive(gateway):
                    elsewhere = True
                # The retry that removes the entry joins the call, so two concurrent retries never join the same one.
                elif await self._pipeline.execute("HDEL", undelivered_key, call_id):  # G4
                    return call_id
            if not elsewhere or waited_s >= self._patience_s:
                return None
            await self._sleep(_LOOK_AGAIN_S)
            waited_s += _LOOK_AGAIN_S

    async def _undelivered(self, undelivered_key: str) -> list[tuple[str, int, str]]:
        """Return call id, start (ms) and gateway of each undelivered call, the oldest first."""
        found: Mapping[bytes, bytes] = as_map(await self._pipeline.execute("HGETALL", undelivered_key))
        calls: list[tuple[str, int, str]] = []
        for call_id, value in found.items():
            begun_ms, _, gateway = value.decode().partition(" ")
            calls.append((call_id.decode(), int(begun_ms), gateway))
        return sorted(calls, key=lambda call: call[1])

    async def _keep(self, call: CallIdentity, *, gateway: str) -> None:
        assert call.undelivered_key is not None, "only calls that a retry may join are kept"
        await self._pipeline.execute("HSET", call.undelivered_key, call.call_id, f"{call.begun_ms} {gateway}")
        await self._pipeline.execute("EXPIRE", call.undelivered_key, _JOINED_WITHIN_MS // 1000)

    async def _execute_and_log(self, *command: str) -> None:
        try:
            await self._pipeline.execute(*command)
        except LedgerUnavailable as exc:
            _log.warning("gateway.call_not_removed", problem=str(exc))


def _digest(*parts: str) -> str:
    text = "\0".join(parts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
