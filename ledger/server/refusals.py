"""Explains errors of Redis in one line each: what is wrong, and what to do. All texts for errors of Redis are here.

Redis sends some of them as eight lines, and redis-py removes the code from errors that it has a class for; so they are
recognised by their words (Redis 7 and 8, Valkey 9, redis-py 8.1; November 2026). Redis' client is imported where it is
used: quick commands explain an error without it.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from tollbook.ledger.errors import LedgerUnavailable, RedisCannotServe

# Words of Redis, of redis-py or of the operating system -> what they mean here. The first that is found counts.
_MEANINGS: Final[tuple[tuple[str, str], ...]] = (
    # Sentinels first: their error quotes each Sentinel, in the words of a server.
    (r"no sentinel leads.*no such service", "the Sentinels know no such service: correct REDIS_URL"),
    (
        r"no sentinel leads.*(?:wrongpass|password|noauth|authenticat)",
        "the Sentinels require another user or password: correct sentinel_username and sentinel_password in REDIS_URL",
    ),
    (r"no sentinel leads", "no Sentinel leads to a primary: start the Sentinels, or correct REDIS_URL"),
    (r"protected mode", "it is in protected mode: give it a password (requirepass), or connect from its own machine"),
    (
        r"without any password configured|no password is set",
        "it has no password, but REDIS_URL gives one: remove it from REDIS_URL",
    ),
    (
        r"wrongpass|invalid username-password|invalid password",
        "the user name or the password is wrong: correct REDIS_URL (redis://USER:PASSWORD@HOST:PORT)",
    ),
    (
        r"noauth|authentication required|authenticated before",
        "it requires a password: set REDIS_URL to redis://:PASSWORD@HOST:PORT",
    ),
    (r"connection refused|connect call failed", "nothing listens there: start Redis, or correct REDIS_URL"),
    (
        r"name or service not known|nodename nor servname|name resolution|no address associated",
        "there is no such host: correct REDIS_URL",
    ),
    (r"no route to host|network is unreachable", "the host cannot be reached: check the network, or correct REDIS_URL"),
    (r"no such file or directory", "there is no such socket: start Redis, or correct REDIS_URL"),
    (r"timeout connecting|timed out|not within", "no answer in time: check the address, the network and the server"),
    (r"wrong_version_number|record layer failure", "it does not speak TLS: use redis:// instead of rediss://"),
    (r"certificate", "its TLS certificate is not trusted: name the authority with ?ssl_ca_certs=FILE in REDIS_URL"),
    (
        r"db index is out of range|invalid db index|select is not allowed",
        "it has no such database (a cluster has only 0): correct REDIS_URL",
    ),
    (r"protocol error|invalidresponse", "what answers there is not Redis: correct REDIS_URL"),
    (
        r"^movederror",
        "it is a node of a cluster, and this user may not use CLUSTER SLOTS: allow it with ACL SETUSER",
    ),
    (r"the cluster is down|hash slot not served", "its cluster is down: start the nodes that are missing"),
    (r"loading the dataset", "it is loading its data: try again in a moment"),
    (r"maxmemory|oom command", "its memory is used up: raise maxmemory"),
    (r"read only replica|readonly", "it is a read-only replica: set REDIS_URL to the primary"),
    (
        r"misconf|unable to persist|errors writing to the aof",
        "it cannot write to its disk, and refuses writes until it can: free space there, see the server's log",
    ),
    (
        r"noreplicas|not enough good replicas",
        "too few of its replicas answer: start them, or lower its min-replicas-to-write",
    ),
    (r"busy redis is busy|busy valkey is busy", "it is busy with another script: try again in a moment"),
)
_NO_PERMISSION: Final = re.compile(r"no permissions? to (?:run|access) (.+?)(?: command)?\.?$", re.IGNORECASE)
_MAX_LENGTH: Final = 200


def unavailable(exc: BaseException) -> LedgerUnavailable:
    """Return the ledger's error for an error of redis-py or of the network; raise it `from exc`."""
    from redis.exceptions import AuthenticationError, ResponseError

    text = _first_sentence(str(exc)) or type(exc).__name__
    match exc:
        case AuthenticationError():
            return LedgerUnavailable(
                f"Redis refused the log-in ({text}): give a user and a password in REDIS_URL, "
                "redis://USER:PASSWORD@HOST:PORT/0"
            )
        case ResponseError():
            return LedgerUnavailable(f"Redis refused a command ({text})")
        case _:
            return LedgerUnavailable(f"Redis did not answer ({type(exc).__name__}: {text})")


def cannot_serve(exc: BaseException) -> RedisCannotServe:
    """Return the error for a reply of Redis that it cannot serve now; raise it `from exc`."""
    return RedisCannotServe(f"Redis cannot serve now: {reason_of(exc)}")


@contextmanager
def translating_redis_errors() -> Generator[None]:
    """Raise LedgerUnavailable for an error of redis-py."""
    from redis.exceptions import RedisError

    try:
        yield
    except RedisError as exc:
        raise unavailable(exc) from exc


def reason_of(exc: BaseException) -> str:
    """Return in one line why Redis failed or refused, and what to do."""
    root = _root(exc)
    return str(exc) if root is None else _meaning(f"{type(root).__name__}: {root}")


def explain(exc: BaseException) -> str:
    """Return an error's message; text of Redis or its client in it is replaced by one line that says what to do.

    Tollbook's own words (the address, the task) stay.
    """
    root = _root(exc)
    if root is None:
        return str(exc)
    reason, original = reason_of(exc), str(root)
    if root is exc:
        return f"Redis refuses: {reason}"
    text = str(exc).replace(f"Redis did not answer ({type(root).__name__}: {original})", reason)
    text = text.replace(original, reason)
    return " ".join(text.split())


def _root(exc: BaseException) -> BaseException | None:
    """Return the error of Redis or of its client that caused another one; None if there is none."""
    found, is_ours = exc, isinstance(exc, LedgerUnavailable)
    while True:
        if type(found).__module__.startswith("redis.") or (is_ours and isinstance(found, OSError)):
            return found
        if found.__cause__ is None:
            return None
        found = found.__cause__


def _first_sentence(text: str) -> str:
    # Redis explains some refusals, such as protected mode, in a page of text; the first sentence says what it is.
    return text if len(text) <= _MAX_LENGTH else re.split(r"[.\n]\s", text)[0][:_MAX_LENGTH]


def _meaning(error: str) -> str:
    for words, meaning in _MEANINGS:
        if re.search(words, error, re.IGNORECASE):
            return meaning
    line = " ".join(error.partition(": ")[2].split())
    if refused := _NO_PERMISSION.search(line):
        return f"this user may not use {refused[1]}: allow it with ACL SETUSER, or use another user in REDIS_URL"
    return line[:_MAX_LENGTH]
