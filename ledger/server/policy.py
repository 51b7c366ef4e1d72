"""Checks whether a Redis server is safe for the ledger, at the start and while Tollbook runs.

A server that may evict keys forgets which calls were made. A server that does not sync its writes loses holds in a
crash. A full server and a replica refuse writes. Each of these stops new calls before money is held (G8).
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from tollbook.ledger.errors import LedgerRefused, LedgerUnavailable, TooFewReplicas
from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.server.connection import ANSWER_TIMEOUT_S, leave_server
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.servers import place_of, primaries

WATCH_INTERVAL_S: Final = 10.0
_MEMORY_LIMIT: Final = 0.9
# Replicas answer every second; servers have the same limit for min-replicas-to-write.
_MAX_LAG_S: Final = 10
_REFUSED_INTERVAL_S: Final = 1.0
_log = LazyLogger(__name__)


class ServerUnsafe(LedgerRefused):
    """The server may lose writes, or cannot accept more; no call is made until that is changed."""


@dataclass(frozen=True, slots=True)
class ServerPolicy:
    """A server's configuration and state; None if this user may not read it. Sizes are bytes; a limit of 0 is none."""

    eviction: str | None = None
    used_memory_bytes: int = 0
    memory_limit_bytes: int = 0
    has_append_only_file: bool | None = None
    fsync: str | None = None
    is_synced_in_rewrite: bool = True
    role: str | None = None
    replicas: int | None = None
    """Replicas that are linked and have answered lately."""
    server: str = "the Redis server"
    """Name for messages; on a cluster with the address."""

    @property
    def is_synced(self) -> bool:
        """Whether every write is known to be on disk before it is answered."""
        return bool(self.has_append_only_file) and self.fsync == "always" and self.is_synced_in_rewrite

    @property
    def is_nearly_full(self) -> bool:
        """Whether calls must stop, so that open holds can still be settled."""
        return bool(self.memory_limit_bytes) and self.used_memory_bytes >= _MEMORY_LIMIT * self.memory_limit_bytes

    @property
    def danger(self) -> tuple[bool, bool, float]:
        """Sort key: the higher, the less safe."""
        limit = self.memory_limit_bytes
        is_refused = self.refusal(allow_unsynced=True) is not None
        return is_refused, not self.is_synced, self.used_memory_bytes / limit if limit else 0.0

    def refusal(self, *, allow_unsynced: bool) -> str | None:
        """Return why no call may be made on this server and what to do; None if calls may be made."""
        if self.role == "slave":
            return f"{self.server} is a replica and takes no writes: connect to its primary"
        if self.eviction is not None and self.eviction != "noeviction":
            return f"{self.server} may evict keys: set its maxmemory-policy, now {self.eviction}, to noeviction"
        if self.is_nearly_full:
            return (
                f"{self.server} is nearly full ({self.used_memory_bytes:,} of {self.memory_limit_bytes:,} bytes): "
                "raise maxmemory, or lower TOLLBOOK_STREAM_KEEP_EVENTS"
            )
        if not self.is_synced and not allow_unsynced:
            return f"{self.unsynced_reason()}, or set TOLLBOOK_ALLOW_UNSYNCED=1 to accept that loss"
        return None

    def unsynced_reason(self) -> str:
        """Return why a crash of the server can lose holds and charges, and what to set."""
        if self.has_append_only_file is None or (self.has_append_only_file and self.fsync is None):
            return (
                f"{self.server} does not say whether it syncs its writes: allow this user INFO and CONFIG GET, "
                "see that appendonly is yes and appendfsync always"
            )
        if not self.has_append_only_file:
            return (
                f"{self.server} keeps no append-only file, so a crash loses the ledger: "
                "set appendonly yes and appendfsync always"
            )
        if self.fsync == "always":
            return (
                f"{self.server} does not sync its writes while it rewrites its append-only file, so a crash then "
                "loses them: set no-appendfsync-on-rewrite, now yes, to no"
            )
        return f"a crash of {self.server} loses its last writes: set appendfsync, now {self.fsync}, to always"


async def read_policy(redis: Redis) -> ServerPolicy:
    """Read a server's policy; of a cluster, return that of the least safe primary.

    Errors: RedisError, OSError or LedgerUnavailable if a server does not answer.
    """
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        servers = await primaries(redis)
        found = [await _read_one(server) for server in servers]
    policy, server = max(zip(found, servers, strict=True), key=lambda each: each[0].danger)
    return policy if server is redis else replace(policy, server=f"the Redis server at {place_of(server)}")


async def _read_one(redis: Redis) -> ServerPolicy:
    try:
        info: dict[str, Any] = await redis.info()  # pyright: ignore[reportUnknownMemberType]
    except ResponseError:
        info = {}
    try:
        config: Any = await redis.config_get("*appendfsync*")  # pyright: ignore[reportUnknownMemberType]
    except ResponseError:
        config = dict[str, str]()
    return ServerPolicy(
        eviction=info.get("maxmemory_policy"),
        used_memory_bytes=int(info.get("used_memory", 0)),
        memory_limit_bytes=int(info.get("maxmemory", 0)),
        has_append_only_file=bool(info["aof_enabled"]) if "aof_enabled" in info else None,
        fsync=config.get("appendfsync"),
        is_synced_in_rewrite=config.get("no-appendfsync-on-rewrite", "no") != "yes",
        role=info.get("role"),
        replicas=_replicas(info),
    )


def _replicas(info: dict[str, Any]) -> int | None:
    if "connected_slaves" not in info:
        return None
    found = (info.get(f"slave{number}", {}) for number in range(int(info["connected_slaves"])))
    return sum(each.get("state") == "online" and int(each.get("lag", 0)) <= _MAX_LAG_S for each in found)


def missing_replicas(policy: ServerPolicy, min_replicas: int) -> TooFewReplicas | None:
    """Return the error if the server says that fewer than `min_replicas` are linked, else None."""
    if policy.replicas is None or policy.replicas >= min_replicas:
        return None
    return TooFewReplicas(found=policy.replicas, needed=min_replicas)


async def check_policy(redis: Redis, *, allow_unsynced: bool) -> None:
    """Check a server once. Errors: ServerUnsafe; LedgerUnavailable if it does not answer."""
    try:
        policy = await read_policy(redis)
    except (LedgerUnavailable, RedisError, OSError, TimeoutError) as exc:
        raise LedgerUnavailable("the Redis server did not answer when asked whether it keeps its data") from exc
    refusal = policy.refusal(allow_unsynced=allow_unsynced)
    if refusal is not None:
        raise ServerUnsafe(refusal)  # G8


class ServerWatch:
    """Checks a server periodically; `check` raises while the last result was unsafe."""

    def __init__(
        self,
        redis: Redis,
        *,
        allow_unsynced: bool,
        pipeline: CommandPipeline | None = None,
        interval_s: float = WATCH_INTERVAL_S,
    ) -> None:
        """`pipeline`: the pipeline of the calls, which may wait for replicas."""
        self._redis = redis
        self._pipeline = pipeline
        self._allow_unsynced = allow_unsynced
        self._interval_s = interval_s
        self._refusal: str | None = None
        self._is_risky = False
        self._unknown = "the Redis server did not answer when asked whether it keeps its data"
        self._was_unconfirmed = False
        self.policy = ServerPolicy()

    def check(self) -> None:
        """Errors: ServerUnsafe; TooFewReplicas; LedgerUnavailable while the server cannot be checked."""
        if self._unknown:  # G8
            raise LedgerUnavailable(self._unknown)
        if self._refusal is not None:  # G8
            raise ServerUnsafe(self._refusal)
        # Without this, unconfirmed holds would be written, which count as failed and stay open until they are overdue.
        # On a cluster, only the partitions of that node wait: see `Gate.check_confirmed`.
        if (unconfirmed := self._unconfirmed()) is not None and not self._is_on_cluster:  # G8
            raise unconfirmed

    async def look(self) -> None:
        """Check now. If the server does not answer, the last result stays: no call can be made on it anyway."""
        await self._look_for_replicas()
        try:
            self.policy = await read_policy(self._redis)
        except (LedgerUnavailable, RedisError, OSError, TimeoutError) as exc:
            _log.debug("server.not_asked", problem=str(exc))
            return
        if self.policy.role == "slave":
            # After a failover the address leads to the promoted server; open connections stay with the old one.
            await leave_server(self._redis)
        self._unknown = ""
        before, self._refusal = self._refusal, self.policy.refusal(allow_unsynced=self._allow_unsynced)
        is_risky = self._refusal is None and not self.policy.is_synced
        if is_risky and not self._is_risky:
            _log.warning(
                "server.unsynced", problem=self.policy.unsynced_reason(), accepted_by="TOLLBOOK_ALLOW_UNSYNCED"
            )
        self._is_risky = is_risky
        if self._refusal is not None and self._refusal != before:
            _log.error("server.refused", problem=self._refusal)
        elif self._refusal is None and before is not None:
            _log.info("server.accepted")

    async def _look_for_replicas(self) -> None:
        if self._pipeline is None:
            return
        with suppress(LedgerUnavailable):
            await self._pipeline.replicate()
        before, self._was_unconfirmed = self._was_unconfirmed, self._unconfirmed() is not None
        if self._was_unconfirmed and not before:
            _log.error("server.replicas_missing", problem=str(self._unconfirmed()))
        elif before and not self._was_unconfirmed:
            _log.info("server.replicas_back")

    @property
    def _is_on_cluster(self) -> bool:
        return self._pipeline is not None and self._pipeline.is_on_cluster

    def _unconfirmed(self) -> LedgerUnavailable | None:
        return None if self._pipeline is None else self._pipeline.unconfirmed

    async def run(self) -> None:
        """Check until cancelled, whatever goes wrong; an unexpected error stops calls."""
        while True:
            # While calls are stopped, checks are more frequent, so that calls soon continue.
            is_refused = self._refusal is not None or self._unconfirmed() is not None
            await asyncio.sleep(min(_REFUSED_INTERVAL_S, self._interval_s) if is_refused else self._interval_s)
            try:
                await self.look()
            except Exception as exc:  # noqa: BLE001 - calls stop for any error, and the next check may succeed.
                self._unknown = f"the Redis server could not be checked ({type(exc).__name__}: {exc})"  # G8
                _log.exception("server.look_failed")


@asynccontextmanager
async def watched_server(
    redis: Redis, *, allow_unsynced: bool, pipeline: CommandPipeline | None = None
) -> AsyncGenerator[ServerWatch]:
    """Check a server at the start, and periodically during the block. Errors at the start: as `ServerWatch.check`."""
    watch = ServerWatch(redis, allow_unsynced=allow_unsynced, pipeline=pipeline)
    await watch.look()
    watch.check()
    looking = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
