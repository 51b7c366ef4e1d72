"""`tollbook doctor`'s checks of the Redis server: version, persistence, replicas, memory, and writes."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import ResponseError

from tollbook.app.findings import Finding, count_of, first_line
from tollbook.inference.settings import Settings
from tollbook.ledger.errors import LedgerError, LedgerUnavailable, PermissionsMissing
from tollbook.ledger.gate.probe import check_permissions, check_writable
from tollbook.ledger.gate.replies import FunctionsMissing
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.address import database_of, hide_password
from tollbook.ledger.server.cluster import Cluster
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.policy import ServerPolicy, read_policy
from tollbook.ledger.server.servers import cluster_of, place_of, primaries, server_of
from tollbook.ledger.server.slots import SLOTS
from tollbook.schemas.policy import Policy

if TYPE_CHECKING:
    from redis.asyncio import Redis

# Without maxmemory, the server may use the machine's memory until the system kills it.
_MEMORY_PART: Final = 0.8


async def server_findings(redis: "Redis", url: str) -> AsyncIterator[Finding]:
    """Report the server's version, address and database."""
    if (cluster := await cluster_of(redis)) is None:
        yield await _server(redis, f"at {hide_password(url)}, database {database_of(url)}")
        return
    servers = await primaries(redis)
    for server in servers:
        yield await _server(server, f"at {place_of(server)}, one of {count_of(len(servers), 'primary node')}")
    yield _cluster(cluster)


async def _server(redis: "Redis", place: str) -> Finding:
    try:
        info: dict[str, Any] = await redis.info("server")  # pyright: ignore[reportUnknownMemberType]
    except ResponseError as exc:
        return Finding(
            "redis",
            "warning",
            f"the server {place} answers, but does not say which version it is ({first_line(exc)})",
            "allow INFO to this user",
        )
    name = "Valkey" if "valkey_version" in info else "Redis"
    return Finding("redis", "ok", f"{name} {info.get('valkey_version', info['redis_version'])} {place}")


def _cluster(cluster: Cluster) -> Finding:
    covered = sum(each.last + 1 - each.first for each in cluster.ranges)
    if covered < SLOTS:
        return Finding(
            "cluster",
            "failed",
            f"{SLOTS - covered:,} of {SLOTS:,} slots have no node",
            "assign them, or start the node",
        )
    alone = sorted({str(each.primary) for each in cluster.ranges if not each.replicas})
    if alone:
        return Finding(
            "cluster",
            "warning",
            f"no replica can take over from {', '.join(alone)}",
            "add replicas (redis-cli --cluster add-node --cluster-replica)",
        )
    return Finding("cluster", "ok", "every slot has a primary and a replica")


async def keeping_findings(redis: "Redis", settings: Settings, keys: Sequence[Keys]) -> AsyncIterator[Finding]:
    """Report whether the server, or each primary of a cluster, may lose writes or runs out of memory.

    `keys` are those of the partitions; replication is tested with a key that the server has.
    """
    servers = await primaries(redis)
    marks = {await server_of(redis, each.mark): each.mark for each in keys}
    for server in servers:
        policy = await read_policy(server)
        found = (
            _persistence(policy, allow_unsynced=settings.allow_unsynced),
            await _replicas(server, policy, settings, mark=marks.get(server)),
            await _memory(server, policy),
        )
        for finding in found:
            if finding is not None:
                yield finding if len(servers) == 1 else replace(finding, found=f"{place_of(server)}: {finding.found}")


def _persistence(policy: ServerPolicy, *, allow_unsynced: bool) -> Finding:
    if policy.role == "slave":
        return Finding(
            "persistence", "failed", "the server is a replica and accepts no writes", "set REDIS_URL to the primary"
        )
    if policy.eviction not in (None, "noeviction"):
        return Finding(
            "persistence",
            "failed",
            f"maxmemory-policy is {policy.eviction}: keys can be evicted",
            "set it to noeviction",
        )
    if policy.is_synced:
        return Finding("persistence", "ok", "append-only file, synced on every write")
    if policy.has_append_only_file is False:
        found, advice = (
            "the append-only file is off: a crash loses the ledger",
            "set appendonly yes and appendfsync always",
        )
    elif policy.has_append_only_file is None or policy.fsync is None:
        found = "unknown whether the server syncs its writes: this user has no permission to ask"
        advice = "allow INFO and CONFIG GET to this user, or make sure that appendonly is yes and appendfsync always"
    elif policy.fsync == "always":
        found = "no-appendfsync-on-rewrite is yes: a crash while the file is rewritten loses writes"
        advice = "set it to no"
    else:
        found, advice = f"appendfsync is {policy.fsync}: a crash can lose the latest writes", "set it to always"
    if allow_unsynced:  # The processes also make calls and warn then.
        return Finding("persistence", "warning", f"{found}; accepted by TOLLBOOK_ALLOW_UNSYNCED", advice)
    return Finding("persistence", "failed", found, advice)


async def _replicas(redis: "Redis", policy: ServerPolicy, settings: Settings, *, mark: str | None) -> Finding | None:
    """Report whether a failover could lose acknowledged writes; None if there are no replicas and none are required.

    Without `mark`, the node has no partition, so replication of its writes is not required.
    """
    if mark is not None and settings.replication is not None:
        pipeline = CommandPipeline(redis, replication=settings.replication.of_node())
        try:
            await pipeline.replicate(mark)
        except LedgerUnavailable as exc:
            return Finding("replicas", "failed", str(exc), "no call is made until then")
        finally:
            await pipeline.aclose()
    wanted, linked = settings.min_replicas, policy.replicas
    if linked is not None and linked > wanted:
        return Finding(
            "replicas",
            "warning",
            f"{linked} are linked, TOLLBOOK_MIN_REPLICAS is {wanted}: a failover to one that lacks the last writes "
            "loses calls that were answered",
            f"set it to {linked} in every process, unless such a loss is acceptable",
        )
    if not wanted or mark is None:
        return None
    return Finding("replicas", "ok", f"{count_of(wanted, 'replica')} had a write when asked")


async def _memory(redis: "Redis", policy: ServerPolicy) -> Finding:
    used, limit = policy.used_memory_bytes, policy.memory_limit_bytes
    if limit:
        text = f"the server uses {_mebibytes(used)} of its limit of {_mebibytes(limit)}"
        if policy.is_nearly_full:
            return Finding("memory", "failed", text, "raise maxmemory, or lower TOLLBOOK_STREAM_KEEP_EVENTS")
        return Finding("memory", "ok", text)
    try:
        info: dict[str, Any] = await redis.info("memory")  # pyright: ignore[reportUnknownMemberType]
    except ResponseError:
        return Finding("memory", "warning", "unknown: this user has no permission to ask", "allow INFO to this user")
    machine = int(info.get("total_system_memory", 0))
    text = f"the server uses {_mebibytes(used)} of the machine's {_mebibytes(machine)}"
    if machine and used > _MEMORY_PART * machine:
        return Finding(
            "memory", "failed", f"{text}, and has no limit: the system may kill it", "add memory, or lower "
            "TOLLBOOK_STREAM_KEEP_EVENTS"
        )  # fmt: skip
    return Finding("memory", "ok", text)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


async def writing_findings(pipeline: CommandPipeline, keys: Sequence[Keys], policy: Policy) -> AsyncIterator[Finding]:
    """Report whether a hold could be written and announced now, and whether this user has all needed permissions."""
    try:
        await check_permissions(pipeline, keys, streams=policy.streams, is_projector=True)
        for key in keys:
            await check_writable(pipeline, key)
    except FunctionsMissing:
        yield Finding(
            "writes",
            "warning",
            "the gate's functions are not in this server",
            "`tollbook up` or `tollbook projector` loads them",
        )
    except PermissionsMissing as exc:
        yield Finding(
            "writes",
            "failed",
            f"this Redis user may not use {', '.join(exc.missing)}",
            "allow it with ACL SETUSER; docs/operators/deploy.md has the whole line",
        )
    except LedgerError as exc:
        yield Finding("writes", "failed", str(exc), "no call is made until the server accepts writes again")
    else:
        yield Finding("writes", "ok", "a hold could be written and announced now")
