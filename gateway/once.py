"""Once: which call a request belongs to, so that what is sent again is not paid again (G4).

`Idempotency-Key` names the call, until its outcome is one that cost nothing and that a retry may change. SDKs that send
none count their own retries in `x-stainless-retry-count`: such a retry joins the call of the same key and body whose
client went before its answer was delivered. Each call is joined once, and within ten minutes.
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

from tollbook.gateway.callers import SAYING_WHO
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
class CallName:
    """The id of a request's call. `shelf` is where an undelivered call is kept for a retry; None where none comes."""

    call_id: str
    begun_ms: int = 0
    shelf: str | None = field(default=None, repr=False)
    tries: str | None = field(default=None, repr=False)
    """Of a call that its client has named: where its tries that came to nothing are counted."""
    number: int = 0
    """How many such tries there were before."""


class Once:
    """Names calls. `is_alive` says whether a gateway, by its name, still works."""

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
        """`patience_s`: how long a retry waits to learn whether another gateway, which has its call, has ended.

        `remembered_s`: how long an Idempotency-Key names the same call.
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

    async def name(self, key: ApiKey, path: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> CallName:
        """Return the call that a request belongs to: one that its client names, one to be joined, or a new one.

        Errors: Problem (400) for an unusable Idempotency-Key; LedgerUnavailable.
        """
        named = headers.get(KEY_HEADER)
        if named is not None:
            if not named or len(named) > _MAX_KEY:
                raise invalid(f"'Idempotency-Key' must have 1 to {_MAX_KEY} characters")
            return await self._named(key, named)
        call_id = f"gw-{uuid.uuid4().hex}"
        retries = headers.get(RETRY_HEADER, "")
        if not (retries.isascii() and retries.isdecimal()):
            return CallName(call_id)
        name = CallName(call_id, self._now_ms())
        content = json.dumps(body, sort_keys=True, separators=(",", ":"))
        said = (headers.get(header, "") for header in SAYING_WHO)
        name.shelf = gateway_calls(self._namespace, _digest(key.key_id, path, content, *said))
        if retries.strip("0"):
            name.call_id = await self._join(name.shelf) or call_id
            self._counts.joined += name.call_id != call_id
        await self._keep(name, gateway=self._gateway)
        return name

    async def _named(self, key: ApiKey, named: str) -> CallName:
        """Return the call that a client names. A try that came to nothing is another call than the next."""
        tries = gateway_calls(self._namespace, _digest("tries", key.key_id, named))
        number = int(await self._pipeline.execute("HLEN", tries))
        parts = (key.key_id, named, str(number)) if number else (key.key_id, named)
        return CallName(f"gw-{_digest(*parts)}", tries=tries, number=number)

    async def came_to_nothing(self, name: CallName) -> None:
        """Note that a call has cost nothing and may be tried again: its stored refusal answers no retry then.

        Of requests at a time that had the same refusal, one is counted.
        """
        if name.tries is not None:
            await self._try("HSETNX", name.tries, str(name.number), "1")
            await self._try("EXPIRE", name.tries, str(self._remembered_s))

    async def delivered(self, name: CallName) -> None:
        """Note that the answer has reached its client."""
        if name.shelf is not None:
            await self._try("HDEL", name.shelf, name.call_id)

    async def left(self, name: CallName) -> None:
        """Note that the client went before it had the answer: a retry may join the call."""
        if name.shelf is not None:
            try:
                await self._keep(name, gateway="")
            except LedgerUnavailable as exc:
                _log.warning("gateway.call_not_kept", call_id=name.call_id, problem=str(exc))

    async def is_joined(self, name: CallName) -> bool:
        """Whether a retry has joined a call whose client left. Where that cannot be known, it may have."""
        if name.shelf is None:
            # One that its client has named may be waited for at any gateway.
            return name.tries is not None  # G4
        try:
            found: bytes | None = await self._pipeline.execute("HGET", name.shelf, name.call_id)
        except LedgerUnavailable:
            return True
        return found is None or bool(found.decode().partition(" ")[2])

    async def _join(self, shelf: str) -> str | None:
        """Return the call that a retry joins; None where no client of such a call has left.

        A gateway that was killed told nobody that its clients are gone: that is seen when it falls silent.
        """
        waited_s = 0.0
        while True:
            elsewhere = False
            for call_id, begun_ms, gateway in await self._shelved(shelf):
                if begun_ms < self._now_ms() - _JOINED_WITHIN_MS or gateway == self._gateway:
                    continue
                if gateway and await self._is_alive(gateway):
                    elsewhere = True
                # Whoever removes the entry has it: two retries at a time join two calls.
                elif await self._pipeline.execute("HDEL", shelf, call_id):  # G4
                    return call_id
            if not elsewhere or waited_s >= self._patience_s:
                return None
            await self._sleep(_LOOK_AGAIN_S)
            waited_s += _LOOK_AGAIN_S

    async def _shelved(self, shelf: str) -> list[tuple[str, int, str]]:
        """Return call id, begin and gateway of each call, the oldest first."""
        found: Mapping[bytes, bytes] = as_map(await self._pipeline.execute("HGETALL", shelf))
        calls: list[tuple[str, int, str]] = []
        for call_id, value in found.items():
            begun_ms, _, gateway = value.decode().partition(" ")
            calls.append((call_id.decode(), int(begun_ms), gateway))
        return sorted(calls, key=lambda call: call[1])

    async def _keep(self, name: CallName, *, gateway: str) -> None:
        assert name.shelf is not None, "only calls that a retry may join are kept"
        await self._pipeline.execute("HSET", name.shelf, name.call_id, f"{name.begun_ms} {gateway}")
        await self._pipeline.execute("EXPIRE", name.shelf, _JOINED_WITHIN_MS // 1000)

    async def _try(self, *command: str) -> None:
        try:
            await self._pipeline.execute(*command)
        except LedgerUnavailable as exc:
            _log.warning("gateway.call_not_removed", problem=str(exc))


def _digest(*parts: str) -> str:
    text = "\0".join(parts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
