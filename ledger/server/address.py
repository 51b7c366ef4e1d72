"""The address of a Redis server, REDIS_URL: which parts it may have.

Invariant: an address is either fully understood, or refused with a sentence that names the wrong part, never a
password. redis-py ignores what it does not understand: `/x` would be database 0, `/1/2` database 12, and `redis:h:1`
the server of this machine.
"""

import re
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from tollbook.ledger.server.sentinel_address import QUOTING, names_sentinels, read_sentinel_address
from tollbook.schemas.problems import unknown_name

_SCHEMES: Final = ("redis", "rediss", "unix")
# redis-py accepts all of its options as parameters. Some change how replies are parsed, or retry commands: they would
# stop the workers or book a task twice. Only options of the connection are safe.
PARAMETERS: Final = ("db", "username", "password", "client_name")
TLS_PARAMETERS: Final = (
    "ssl_ca_certs", "ssl_ca_path", "ssl_ca_data", "ssl_certfile", "ssl_keyfile", "ssl_password", "ssl_cert_reqs",
    "ssl_check_hostname", "ssl_ciphers",
)  # fmt: skip
_PASSWORD: Final = re.compile(r"(://[^:@/]*:).*@")
_PASSWORD_PARAMETER: Final = re.compile(r"(\w*password=)[^&]*", re.IGNORECASE)


def check_address(url: str) -> str:
    """Return an address that is fully understood. Errors: ValueError, without the name of the setting."""
    if names_sentinels(url):
        check_address(read_sentinel_address(url).server_url)
        return url
    scheme = url.partition(":")[0].lower()
    if "cluster" in scheme:
        raise ValueError("a cluster is recognised automatically: write redis://HOST:PORT,HOST:PORT/0")
    if "sentinel" in scheme:
        raise ValueError("must name Sentinels as redis+sentinel://HOST:PORT,HOST:PORT/SERVICE")
    for each in each_server(url):
        _check_one(each)
    return url


def each_server(url: str) -> tuple[str, ...]:
    """Return the address of each server that a URL names: several for a cluster, separated by commas."""
    scheme, separator, rest = url.partition("://")
    # Only commas between hosts separate; those in a password, or after the hosts, do not.
    network, slash, path = rest.partition("/")
    if "?" in network:
        network, mark, path = network.partition("?")
        slash = mark
    login, at, hosts = network.rpartition("@")
    if scheme == "unix" or "," not in hosts:
        return (url,)
    return tuple(f"{scheme}{separator}{login}{at}{host}{slash}{path}" for host in hosts.split(","))


def _check_one(url: str) -> None:
    parts = _split(url)
    if parts.scheme not in _SCHEMES or not url[len(parts.scheme) :].startswith("://"):
        raise ValueError("must begin with redis://, rediss://, unix:// or redis+sentinel://")
    _check_server(parts)
    _check_parameters(parts)


def database_of(url: str) -> int:
    """Return the number of the database in an address, 0 if it has none."""
    if names_sentinels(url):
        return database_of(read_sentinel_address(url).server_url)
    parts = urlsplit(url)
    named = dict(parse_qsl(parts.query)).get("db")
    if named is None and parts.scheme != "unix":
        named = unquote(parts.path).strip("/")
    return int(named or 0)


def hide_password(redis_url: str) -> str:
    """Return the URL without its passwords, for logs and messages."""
    # Passwords of the server and of a TLS key may also be parameters. An unquoted password with a ? or # in it must be
    # hidden as well.
    return _PASSWORD_PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1***@", redis_url))  # G10


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError:
        # Python's own message would quote the host, and a part of a password with it.
        raise ValueError("is not a URL; write an IPv6 address in brackets, redis://[::1]:6379/0") from None
    hosts = parts.netloc.rpartition("@")[2]
    try:
        port = parts.port
    except ValueError:
        raise ValueError(f"has no valid port; {QUOTING}") from None
    if port == 0 or hosts.endswith(":"):
        raise ValueError("has no valid port: leave it out for 6379, or write redis://HOST:PORT/0")
    return parts


def _check_server(parts: SplitResult) -> None:
    if parts.fragment or "#" in parts.netloc:
        raise ValueError(f"must not have a #; {QUOTING}")
    if parts.scheme == "unix":
        if parts.hostname or parts.path in ("", "/"):
            raise ValueError("must name the socket with its full path: unix:///PATH/TO/SOCKET?db=0")
        return
    if "@" in parts.query and "@" not in parts.netloc:
        # The query is part of a password with a ?, so it is not shown.
        raise ValueError(f"has an @ after a ?; {QUOTING}")
    if not parts.hostname:
        raise ValueError("names no host: write redis://HOST:PORT/0")
    database = unquote(parts.path).removeprefix("/")
    if database and not _is_number(database):
        # A path with an @ is part of a password with a /, so it is not shown.
        shown = "what follows the host" if "@" in parts.path + parts.query else f"/{database}"
        raise ValueError(f"{shown} is not a database: write its number, redis://HOST:PORT/0; {QUOTING}")


def _check_parameters(parts: SplitResult) -> None:
    known = (*PARAMETERS, *(TLS_PARAMETERS if parts.scheme == "rediss" else ()))
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    for name, value in pairs:
        if name not in known and "@" in parts.query:
            # The "parameter" is part of a password with a ?, so it is not shown.
            raise ValueError(f"has an @ after a ?; {QUOTING}")
        if name not in known:
            raise ValueError(f"{unknown_name('parameter', name, known)}; ssl_... with rediss://")
        if name == "db" and not _is_number(value):
            raise ValueError("'db' must be the number of a database")
        if [given for given, _ in pairs].count(name) > 1:
            raise ValueError(f"has {name!r} twice")
        if not value:
            raise ValueError(f"has no value for {name!r}")
    database = unquote(parts.path).removeprefix("/")
    if parts.scheme != "unix" and database and "db" in dict(pairs):
        raise ValueError("names the database twice: as /NUMBER and as 'db'")


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,6}", text) is not None
