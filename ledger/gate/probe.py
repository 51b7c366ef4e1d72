"""Whether a hold could be written and announced now, and whether the Redis user may do what Tollbook needs.

Readiness, `doctor` and the start of every process ask this, so that none of them is content with a server that answers
and takes no write. The probe writes and takes back in one step, with the keys of a hold; what it wrote is never seen.
"""

import asyncio
import re
from collections.abc import Iterable, Sequence
from typing import Final

from redis.exceptions import NoPermissionError, ResponseError

from tollbook.ledger.errors import PermissionsMissing
from tollbook.ledger.gate.functions import function
from tollbook.ledger.gate.replies import FunctionsMissing
from tollbook.ledger.keys import (
    Keys,
    alert_receivers,
    alerts,
    dead_letters,
    projector_lease,
    task_partition,
    worker_key,
)
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.refusals import unavailable
from tollbook.ledger.stream_owners import STREAM_OWNERS
from tollbook.schemas.policy import default_policy

# It has a space, so that it is nobody's id.
_NOBODY: Final = "no body"
_COMMAND: Final = re.compile(r"run the '([^']+)'")

# Every command, whole: K is a key of the ledger, S a task stream, C a channel.
LEDGER_COMMANDS: Final = (
    "PING", "TIME", "FUNCTION LIST", "FUNCTION LOAD code", "FCALL f 0",
    "GET K", "SET K v", "DEL K", "EXISTS K",
    "HGET K f", "HSET K f v", "HSETNX K f v", "HMGET K f", "HGETALL K", "HLEN K", "HDEL K f", "HEXISTS K f",
    "ZADD K 1 m", "ZREM K m", "ZCARD K", "ZRANGEBYSCORE K 0 1",
    "RPUSH K v", "LPOP K", "LINDEX K 0", "LLEN K", "LRANGE K 0 1",
    "XADD K * f v", "XLEN K", "XRANGE K - +", "XREVRANGE K + -", "XDEL K 0-1",
    "PUBLISH C m", "SUBSCRIBE C", "UNSUBSCRIBE C",
)  # fmt: skip
"""What every process does on the ledger, by itself or in the gate's functions."""
PROJECTOR_COMMANDS: Final = (
    "EVAL s 1 K", "HINCRBY K f 1", "PTTL K", "SCAN 0", "XINFO STREAM K", "XINFO GROUPS K", "XREAD STREAMS K 0",
    "XTRIM K MAXLEN 1", "TYPE K",
    "XREADGROUP GROUP g c STREAMS K >", "XACK K g 0-1", "XGROUP CREATE K g 0", "XGROUP DESTROY K g",
)  # fmt: skip
"""What a projector does beside that; the last line is for the queue of alerts."""
WORKER_COMMANDS: Final = (
    "XREADGROUP GROUP g c STREAMS S >", "XACK S g 0-1", "XCLAIM S g c 0 0-1", "XPENDING S g", "XGROUP CREATE S g 0",
    "XGROUP DELCONSUMER S g c", "XINFO GROUPS S", "XINFO CONSUMERS S g", "XINFO STREAM S", "XTRIM S MAXLEN 1",
    "INCRBY K 1", "EXPIRE K 1",
)  # fmt: skip
"""What a worker does beside that, on its task streams, when it drops old tasks and dead letters, and with deltas."""
# By INFO and CONFIG GET a server shows how it keeps its data; without them Tollbook needs TOLLBOOK_ALLOW_UNSYNCED=1.
# SELECT is for another database than 0. `tollbook verify` and `tollbook recover` look at one moment: MULTI, EXEC. WAIT
# is for TOLLBOOK_MIN_REPLICAS, ROLE for Sentinels. CLUSTER SLOTS and ASKING are for a cluster, MEMORY USAGE is for
# `tollbook partitions`.
_FURTHER_COMMANDS: Final = (
    "INFO", "CONFIG GET p", "SELECT 1", "MULTI", "EXEC", "ZRANGE K 0 1", "WAIT 0 1", "ROLE",
    "CLUSTER SLOTS", "ASKING", "MEMORY USAGE K",
)  # fmt: skip
_TWO_WORDS: Final = ("FUNCTION", "XGROUP", "XINFO", "CONFIG", "CLUSTER", "MEMORY")


async def check_takes_writes(pipeline: CommandPipeline, keys: Keys) -> None:
    """Write and take back, as a change of this partition would.

    Errors: RedisCannotServe for a server that takes no write now; FunctionsMissing; PermissionsMissing;
        LedgerUnavailable.
    """
    try:
        await _write(pipeline, keys)
    except ResponseError as exc:
        raise _meaning(exc, keys.namespace) from exc


async def check_writable(pipeline: CommandPipeline, keys: Keys) -> None:
    """Write and take back, as a reservation in this partition would, and ask whether it could be announced.

    Errors: RedisCannotServe for a server that takes no write now; PermissionsMissing; LedgerUnavailable.
    """
    # In one round trip.
    written, missing = await asyncio.gather(
        _write(pipeline, keys), missing_permissions(pipeline, [keys]), return_exceptions=True
    )
    if isinstance(missing, list) and missing:
        raise PermissionsMissing(missing) from (written if isinstance(written, BaseException) else None)
    if isinstance(written, ResponseError):
        raise _meaning(written, keys.namespace) from written
    for problem in (written, missing):
        if isinstance(problem, BaseException):
            raise problem


async def _write(pipeline: CommandPipeline, keys: Keys) -> None:
    used = (
        keys.meta, keys.ledger, keys.holds, keys.waiters, keys.account(_NOBODY), keys.call(_NOBODY),
        keys.result(_NOBODY), keys.tail(_NOBODY), keys.probe,
    )  # fmt: skip
    await pipeline.execute("FCALL", function("probe"), len(used), *used)


async def check_permissions(
    pipeline: CommandPipeline, keys: Sequence[Keys], *, streams: Iterable[str] = (), is_projector: bool = False
) -> None:
    """Check what this user may do. `streams` are the task streams that this process reads.

    Errors: PermissionsMissing, with everything that is missing; LedgerUnavailable.
    """
    missing = await missing_permissions(pipeline, keys, streams=streams, is_projector=is_projector)
    if missing:  # G8
        raise PermissionsMissing(missing)


async def missing_permissions(
    pipeline: CommandPipeline, keys: Sequence[Keys], *, streams: Iterable[str] = (), is_projector: bool = False
) -> list[str]:
    """Return what this user may not do, as `command XADD`, `keys ~{tollbook:*` or `channels &{tollbook:*`.

    Errors: PermissionsMissing where it may not even ask; LedgerUnavailable.
    """
    streams, namespace = tuple(streams), keys[0].namespace
    own = [name for key in keys for name in (key.meta, key.ledger, key.result(_NOBODY), key.probe)]
    patterns = {
        f"~{{{namespace}:*": [*own, *((alerts(namespace), alert_receivers(namespace)) if is_projector else ())],
        f"~{namespace}:*": [
            dead_letters(namespace), projector_lease(namespace), worker_key(namespace, "any"),
            task_partition(namespace, "any"),
        ],
        f"~{STREAM_OWNERS}": [STREAM_OWNERS],
        **{f"~{stream}": [stream] for stream in streams},
    }  # fmt: skip
    channels = [
        name
        for key in keys
        for name in (key.waiters, key.result(_NOBODY), key.baseline_requests, key.baseline_answers("nobody"))
    ]
    places = {"K": keys[0].meta, "S": next(iter(streams), ""), "C": keys[0].waiters}
    commands = {
        " ".join(places.get(word, word) for word in command.split()): command
        for command in (
            *LEDGER_COMMANDS,
            *(PROJECTOR_COMMANDS if is_projector else ()),
            *(WORKER_COMMANDS if streams else ()),
        )
    }
    wanted = [
        *(f"command {command}" for command in commands),
        *(f"key {name}" for names in patterns.values() for name in names),
        *(f"channel {name}" for name in channels),
    ]
    try:
        # Each server of a cluster has users of its own.
        replies: list[list[bytes]] = await pipeline.execute_on_primaries("FCALL", function("permissions"), 0, *wanted)
    except ResponseError as exc:
        raise _meaning(exc, namespace) from exc
    refused = {each.decode() for reply in replies for each in reply}
    # Of a command on a key that is refused anyway, nothing is known.
    unknown = {letter for letter, name in places.items() if not refused.isdisjoint((f"key {name}", f"channel {name}"))}
    return [
        # A command on keys of the ledger and on task streams is named once.
        *dict.fromkeys(
            f"the command {_name(command)}"
            for asked, command in commands.items()
            if f"command {asked}" in refused and unknown.isdisjoint(command.split())
        ),
        *(
            f"the keys {pattern}"
            for pattern, names in patterns.items()
            if any(f"key {name}" in refused for name in names)
        ),
        *([f"the channels &{{{namespace}:*"] if any(f"channel {name}" in refused for name in channels) else []),
    ]


def _name(command: str) -> str:
    words = command.split()
    return " ".join(words[: 2 if words[0] in _TWO_WORDS else 1])


def _meaning(exc: ResponseError, namespace: str) -> Exception:
    words = str(exc)
    if "Function not found" in words:
        return FunctionsMissing(words)
    if command := _COMMAND.search(words):
        return PermissionsMissing([f"the command {command[1].replace('|', ' ').upper()}"])
    if isinstance(exc, NoPermissionError):
        return PermissionsMissing([f"the keys ~{{{namespace}:*"])
    return unavailable(exc)


def acl_line(namespace: str = "tollbook", streams: Iterable[str] = tuple(default_policy().streams)) -> str:
    """Return the command that makes a Redis user for all of Tollbook, with the permissions it needs and no others."""
    commands = (*LEDGER_COMMANDS, *PROJECTOR_COMMANDS, *WORKER_COMMANDS, *_FURTHER_COMMANDS)
    keys = (f"{{{namespace}:*", f"{namespace}:*", STREAM_OWNERS, *streams)
    names = dict.fromkeys(_name(command).lower().replace(" ", "|") for command in commands)
    return " ".join(
        (
            "ACL SETUSER tollbook on >PASSWORD resetkeys",
            *(f"~{key}" for key in keys),
            f"resetchannels &{{{namespace}:* -@all",
            *(f"+{name}" for name in names),
        )
    )
