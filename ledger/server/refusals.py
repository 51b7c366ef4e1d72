"""Redis' refusals in one line each: what is wrong, and what to do.

Redis answers some of them with eight lines, and redis-py takes the code off the text of the errors that it has a
class for; so they are known by their words (Redis 7 and 8, Valkey 9, redis-py 8.1; November 2026).
"""

import re
from collections.abc import Iterator
from typing import Final

# Words of Redis, of redis-py or of the operating system -> what they mean here. The first that is found counts.
_MEANINGS: Final[tuple[tuple[str, str], ...]] = (
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
        "it wants a password: set REDIS_URL to redis://:PASSWORD@HOST:PORT",
    ),
    (r"connection refused", "nothing listens there: start Redis, or correct REDIS_URL"),
    (
        r"name or service not known|nodename nor servname|name resolution|no address associated",
        "there is no such host: correct REDIS_URL",
    ),
    (r"no route to host|network is unreachable", "the host cannot be reached: check the network, or correct REDIS_URL"),
    (r"no such file or directory", "there is no such socket: start Redis, or correct REDIS_URL"),
    (r"timeout connecting|timed out|not within", "no answer in time: check the address, the network and the server"),
    (r"wrong_version_number|record layer failure", "it does not speak TLS: use redis:// instead of rediss://"),
    (r"certificate", "its TLS certificate is not trusted: name the authority with ?ssl_ca_certs=FILE in REDIS_URL"),
    (r"db index is out of range|invalid db index|select is not allowed", "it has no such database: correct REDIS_URL"),
    (r"protocol error|invalidresponse", "what answers there is not Redis: correct REDIS_URL"),
    (r"loading the dataset", "it is loading its data: try again in a moment"),
    (r"maxmemory|oom command", "its memory is used up: raise maxmemory"),
    (r"read only replica|readonly", "it is a read-only replica: set REDIS_URL to the primary"),
    (r"misconf|unable to persist", "it cannot write to its disk: see the server's log"),
    (r"busy redis is busy|busy valkey is busy", "it is busy with another script: try again in a moment"),
)
_NO_PERMISSION: Final = re.compile(r"no permissions? to (?:run|access) (.+?)(?: command)?\.?$", re.IGNORECASE)
_MAX_LENGTH: Final = 200


def explain(exc: BaseException) -> str:
    """Return the message of an error that Redis or its client caused, in one line and with what to do.

    Of an error of ours, what it says for itself stays (the address, the task).
    """
    text = str(exc)
    root = next((each for each in _chain(exc) if _is_foreign(each)), None)
    if root is None:
        return text
    told = str(root)
    reason = _meaning(f"{type(root).__name__}: {told}")
    if root is exc:
        return f"Redis refuses: {reason}"
    text = text.replace(f"Redis did not answer ({type(root).__name__}: {told})", reason).replace(told, reason)
    return " ".join(text.split())


def _chain(exc: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = exc
    while found is not None:
        yield found
        found = found.__cause__


def _is_foreign(exc: BaseException) -> bool:
    return type(exc).__module__.startswith("redis.") or isinstance(exc, OSError)


def _meaning(told: str) -> str:
    for words, meaning in _MEANINGS:
        if re.search(words, told, re.IGNORECASE):
            return meaning
    line = " ".join(told.partition(": ")[2].split())
    if refused := _NO_PERMISSION.search(line):
        return f"this user may not use {refused[1]}: allow it with ACL SETUSER, or use another user in REDIS_URL"
    return line[:_MAX_LENGTH]
