"""Signs of life: every process of a ledger publishes its version and digests of the settings by which it decides.

Processes with different settings decide differently on one ledger, and no process can see this by itself. `doctor`
compares the signs and names the process that differs, and a process that holds tasks back. A sign has digests of
settings, never their values (G10).
"""

import asyncio
import contextlib
import hashlib
import json
import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final, cast

import structlog
from redis.exceptions import RedisError

from tollbook.inference.policy_file import read_policy_file
from tollbook.inference.settings import Settings
from tollbook.inference.stated_policy import policy_path
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import processes
from tollbook.ledger.server.connection import as_map
from tollbook.ledger.server.pipeline import CommandPipeline

RENEWED_S: Final = 10.0
ALIVE_MS: Final = 35_000
_GOODBYE_S: Final = 1.0
# A task that is held back is retried every few seconds; each retry may wait for Redis and for the projector.
_HELD_BACK_S: Final = 30.0
_MAX_REASON: Final = 300
_FORGOTTEN_MS: Final = 24 * 3600 * 1000
# Settings by which a process decides what a call may cost, how long a call waits for money, when it is given up, and
# when a write counts as safe.
DECIDING: Final = (
    "partitions", "caps", "day_cap_nanousd", "campaign_cap_nanousd", "routes", "prices", "price_provider",
    "hold_wait_s", "claim_after_s", "max_task_attempts", "result_ttl_s", "idempotency_ttl_s", "tail_keep_s",
    "min_replicas", "replica_durability",
)  # fmt: skip
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Sign:
    """The sign of one process; `part` is `up`, `worker`, `projector` or `application`; `settings` has digests.

    `holds_back` says why the process holds tasks back now; None if it does not.
    """

    name: str
    part: str
    version: str
    settings: Mapping[str, str]
    holds_back: str | None = None

    def differing_settings(self, other: Mapping[str, str]) -> list[str]:
        """Return the names of the settings that differ from `other`."""
        return [name for name, digest in other.items() if self.settings.get(name) != digest]


def settings_digests(settings: Settings) -> dict[str, str]:
    """Return a short digest of each deciding setting, by the name of its variable."""
    digests = {str(Settings.model_fields[name].validation_alias): _digest(getattr(settings, name)) for name in DECIDING}
    path = policy_path(settings)
    file = "" if path is None else read_policy_file(path).policy.digest[:8]
    return {**digests, "the policy file": file, "the price catalogue": version("genai-prices")}


class SignOfLife:
    """Writes the sign of this process. Make it with `sign_of_life`."""

    def __init__(self, pipeline: CommandPipeline, settings: Settings, *, name: str, part: str) -> None:
        self._pipeline = pipeline
        self._key = processes(settings.namespace)
        self._name = name
        self._facts = {"part": part, "version": version("tollbook"), "settings": settings_digests(settings)}
        self._reason = ""
        self._reason_ends = -math.inf
        self._has_changed = asyncio.Event()

    def hold_back(self, problem: Exception) -> None:
        """Show that tasks are held back, and why, until half a minute after the last call of this."""
        now = asyncio.get_running_loop().time()
        if now > self._reason_ends:
            self._has_changed.set()
        self._reason, self._reason_ends = " ".join(str(problem).split())[:_MAX_REASON], now + _HELD_BACK_S

    async def show(self) -> None:
        """Write the sign once. If Redis does not answer, nothing is written."""
        sign: dict[str, Any] = dict(self._facts)
        if asyncio.get_running_loop().time() <= self._reason_ends:
            sign["holds_back"] = self._reason
        try:
            found, now_ms = await _all(self._pipeline, self._key)
            await self._pipeline.execute("HSET", self._key, self._name, json.dumps({**sign, "seen_ms": now_ms}))
            for gone in (each for each, document in found.items() if now_ms - document["seen_ms"] > _FORGOTTEN_MS):
                await self._pipeline.execute("HDEL", self._key, gone)
        except (LedgerUnavailable, RedisError) as exc:
            _log.debug("sign_of_life.not_shown", problem=str(exc))

    async def keep_showing(self) -> None:
        """Write the sign every ten seconds, and at once when tasks begin to be held back."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEWED_S):
                    await self._has_changed.wait()
            self._has_changed.clear()
            await self.show()

    async def remove(self) -> None:
        """Remove the sign of this process."""
        with contextlib.suppress(LedgerUnavailable, RedisError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                await self._pipeline.execute("HDEL", self._key, self._name)


@asynccontextmanager
async def sign_of_life(
    pipeline: CommandPipeline, settings: Settings, *, name: str, part: str
) -> AsyncGenerator[SignOfLife]:
    """Show this process until the context ends."""
    sign = SignOfLife(pipeline, settings, name=name, part=part)
    await sign.show()
    showing = asyncio.create_task(sign.keep_showing())
    try:
        yield sign
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)
        await sign.remove()


async def read_signs(pipeline: CommandPipeline, namespace: str) -> list[Sign]:
    """Return the processes that are alive, by name. Errors: LedgerUnavailable."""
    found, now_ms = await _all(pipeline, processes(namespace))
    return [
        Sign(name, document["part"], document["version"], document["settings"], document.get("holds_back"))
        for name, document in sorted(found.items())
        if now_ms - document["seen_ms"] < ALIVE_MS
    ]


async def _all(pipeline: CommandPipeline, key: str) -> tuple[dict[str, dict[str, Any]], int]:
    found, now_ms = await asyncio.gather(pipeline.execute("HGETALL", key), pipeline.now_ms(key))
    return {name.decode(): json.loads(value) for name, value in as_map(found).items()}, now_ms


def _digest(value: object) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:8]


def _canonical(value: object) -> str:
    # The order of a table's entries does not matter.
    if isinstance(value, Mapping):
        value = cast("Mapping[object, object]", value)
        return f"{{{','.join(sorted(f'{key}:{_canonical(each)}' for key, each in value.items()))}}}"
    fields = getattr(value, "__dataclass_fields__", None)
    return _canonical({name: getattr(value, name) for name in fields}) if fields else repr(value)
