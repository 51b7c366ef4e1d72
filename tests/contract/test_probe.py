"""The probe finds everything that keeps a hold from being written or announced; missing permissions are named."""

import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.quick import first_quick
from tests.servers import CONTAINER, binary_of, server_kinds, wait_until
from tollbook.ledger.errors import PermissionsMissing, RedisCannotServe
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.probe import acl_line, check_permissions, check_writable
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.policy import default_policy

KEYS = Keys()
STREAMS = list(default_policy().streams)


@pytest.fixture(params=[kind for kind in server_kinds() if kind != CONTAINER])
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(tmp_path / "data", binary=binary_of(request.param)) as server:
        yield server


async def as_user(server: EmbeddedServer, *rules: str) -> Redis:
    """Return the client of a user with these rules."""
    async with connect(server.url) as redis:
        await load_library(redis)
        await redis.execute_command("ACL", "SETUSER", "tollbook", "reset", "on", ">PASSWORD", *rules)
    return connect(f"redis://tollbook:PASSWORD@{server.url.rpartition('@')[2]}")


def rules_of(line: str) -> Sequence[str]:
    return line.split()[5:]


async def probe(redis: Redis) -> None:
    pipeline = CommandPipeline(redis)
    try:
        await check_writable(pipeline, KEYS)
    finally:
        await pipeline.aclose()


async def test_a_server_that_takes_writes_is_left_as_it_was(server: EmbeddedServer) -> None:
    async with connect(server.url) as redis:
        await load_library(redis)
        await probe(redis)
        assert await redis.dbsize() == 0


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (("REPLICAOF", "127.0.0.1", "1"), "it is a read-only replica"),
        (("CONFIG", "SET", "maxmemory", "1"), "its memory is used up"),
        (("CONFIG", "SET", "min-replicas-to-write", "1"), "too few of its replicas"),
    ],
)
async def test_a_server_that_takes_no_write_says_why(server: EmbeddedServer, setup: Sequence[str], words: str) -> None:
    async with connect(server.url) as redis:
        await load_library(redis)
        await redis.execute_command(*setup)
        with pytest.raises(RedisCannotServe, match=words):
            await probe(redis)


async def test_a_server_whose_disk_fails_says_so(server: EmbeddedServer) -> None:
    """The snapshot cannot be written, so Redis refuses writes (MISCONF)."""
    async with connect(server.url) as redis:
        await load_library(redis)
        await redis.config_set("save", "3600 1")
        await redis.set("a", "b")
        blocked = server_directory(await redis.config_get("dir"))
        (blocked / "dump.rdb").mkdir()
        (blocked / "dump.rdb" / "full").touch()
        await redis.bgsave()
        await wait_until(lambda: has_failed(redis), what="the end of the snapshot")
        with pytest.raises(RedisCannotServe, match="it cannot write to its disk"):
            await probe(redis)
        await redis.config_set("save", "")  # Otherwise the server would try again before it ends.


async def has_failed(redis: Redis) -> bool:
    return (await redis.info("persistence"))["rdb_last_bgsave_status"] == "err"


def server_directory(config: Any) -> Path:
    return Path(config["dir"])


NEEDED = rules_of(acl_line())
# What is taken from the documented user, or changed -> how it is named.
LACKING = {
    "a command of the gate": ([*NEEDED, "-zadd"], "the command ZADD"),
    "a command of ours": ([*NEEDED, "-hgetall"], "the command HGETALL"),
    "two commands": ([*NEEDED, "-xadd", "-publish"], "the command XADD, the command PUBLISH"),
    "the ledger's keys": ([rule for rule in NEEDED if rule != "~{tollbook:*"], "the keys ~{tollbook:*"),
    "keys beside the ledger": ([rule for rule in NEEDED if rule != "~tollbook:*"], "the keys ~tollbook:*"),
    "keys only to be read": (
        [rule.replace("~{tollbook:", "%R~{tollbook:") for rule in NEEDED],
        "the keys ~{tollbook:*",
    ),
    "channels": ([rule for rule in NEEDED if not rule.startswith("&")], "the channels &{tollbook:*"),
    "the channels of baselines": (
        [*(rule for rule in NEEDED if not rule.startswith("&")), "&{tollbook:*}:waiters", "&{tollbook:*}:result:*"],
        "the channels &{tollbook:*",
    ),
    "to ask": ([*NEEDED, "-fcall"], "the command FCALL"),
    "a task stream": ([rule for rule in NEEDED if rule != "~generation"], "the keys ~generation"),
    "to read a task stream": ([*NEEDED, "-xreadgroup"], "the command XREADGROUP"),
    "subcommands": ([*NEEDED, "-xgroup|create"], "the command XGROUP CREATE"),
    "a projector's commands": ([*NEEDED, "-eval"], "the command EVAL"),
    "to forget a receiver of alerts": ([*NEEDED, "-xgroup|destroy"], "the command XGROUP DESTROY"),
}


@pytest.mark.parametrize("case", first_quick(4, LACKING))
async def test_missing_permissions_are_named(server: EmbeddedServer, case: str) -> None:
    rules, words = LACKING[case]
    async with await as_user(server, *rules) as redis:
        pipeline = CommandPipeline(redis)
        with pytest.raises(PermissionsMissing) as refused:
            await check_permissions(pipeline, [KEYS], streams=STREAMS, is_projector=True)
        await pipeline.aclose()
        assert words == ", ".join(refused.value.missing)
        assert "ACL SETUSER" in refused.value.message


@pytest.mark.parametrize(
    "case", first_quick(2, ["a command of the gate", "the ledger's keys", "channels", "keys only to be read", "to ask"])
)
async def test_the_probe_names_missing_permissions_too(server: EmbeddedServer, case: str) -> None:
    rules, words = LACKING[case]
    async with await as_user(server, *rules) as redis:
        with pytest.raises(PermissionsMissing, match=re.escape(words)):
            await probe(redis)


async def test_the_documented_user_has_all_permissions(server: EmbeddedServer) -> None:
    async with await as_user(server, *NEEDED) as redis:
        pipeline = CommandPipeline(redis)
        await check_permissions(pipeline, [KEYS], streams=STREAMS, is_projector=True)
        await check_writable(pipeline, KEYS)
        await pipeline.aclose()
