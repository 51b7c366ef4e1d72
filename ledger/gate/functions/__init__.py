"""The gate's server-side code, and loading it into Redis.

The source is one library in several files, joined in the order of `_PARTS`: each knows what stands before it.
`header.lua` says what the functions, their keys and their answers are.

The library's name has its version, so that workers of two versions can run side by side
on one ledger. Within a version, code on the server that differs is replaced.
"""

import asyncio
from functools import cache
from typing import Final, cast

from redis.asyncio import Redis
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from tollbook.ledger.errors import ServerTooOld
from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.packaged import packaged_text
from tollbook.ledger.server.connection import ANSWER_TIMEOUT_S, leave_server
from tollbook.ledger.server.refusals import cannot_serve, unavailable
from tollbook.ledger.server.servers import primaries

LIBRARY: Final = "tollbook_v2"
_PARTS: Final = (
    "header",
    "values",
    "ledger",
    "calls",
    "weighing",
    "alerts",
    "holds",
    "corrections",
    "plans",
    "policies",
    "credits",
    "keys",
    "upkeep",
    "restoring",
    "streams",
    "questions",
    "registration",
)
_log = LazyLogger(__name__)


@cache
def library_code() -> str:
    """Return the Lua source of the function library."""
    return "\n".join(packaged_text("tollbook.ledger.gate.functions", f"{part}.lua") for part in _PARTS)


def function(name: str) -> str:
    """Return the server-side name of one of the library's functions, for example `tollbook_v2_reserve`."""
    return f"{LIBRARY}_{name}"


async def load_library(redis: Redis) -> None:
    """Load the library into the server, or every primary of a cluster, unless the same code is there.

    Errors: ServerTooOld if the server has no functions; LedgerUnavailable.
    """
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            for server in await primaries(redis):
                await _load_into(server)
    except ReadOnlyError as exc:
        await leave_server(redis)
        raise cannot_serve(exc) from exc
    except (RedisError, OSError) as exc:
        raise unavailable(exc) from exc


async def _load_into(server: Redis) -> None:
    code = library_code()
    await _check_version(server)
    loaded = await server.function_list(LIBRARY, withcode=True)
    if _code_of(loaded) != code:
        await server.function_load(code, replace=True)
        _log.info("functions.loaded", library=LIBRARY, replaced=bool(loaded))


async def check_server(redis: Redis) -> None:
    """Errors: ServerTooOld for a server before Redis 7.0; Valkey has functions in every version."""
    for server in await primaries(redis):
        await _check_version(server)


async def _check_version(server: Redis) -> None:
    try:
        info = await server.info("server")  # pyright: ignore[reportUnknownMemberType]
    except ResponseError:
        return  # INFO may be forbidden to this user; FUNCTION fails if it is missing.
    version = str(info.get("redis_version", "0"))
    if "valkey_version" not in info and int(version.split(".")[0]) < 7:
        raise ServerTooOld(version)  # G8


def _code_of(listing: object) -> str | None:
    """Find `library_code` in a FUNCTION LIST reply, which is a map or a flat list by protocol version."""
    if not isinstance(listing, list) or not listing:
        return None
    library: object = listing[0]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(library, list):
        library = dict(zip(library[::2], library[1::2], strict=True))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if not isinstance(library, dict):
        return None
    fields = cast("dict[str | bytes, object]", library)
    code = fields.get("library_code") or fields.get(b"library_code")
    return code.decode() if isinstance(code, bytes) else str(code)
