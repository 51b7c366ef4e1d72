"""The address of a primary that Sentinels know: redis+sentinel://USER:PASSWORD@HOST:PORT,HOST:PORT/SERVICE/DATABASE.

User, password, database and the other parameters are the primary's; `sentinel_username` and `sentinel_password` are for
the Sentinels. With rediss+sentinel, all of them speak TLS.
"""

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode

QUOTING: Final = "write /, ?, # and @ in a password as %2F, %3F, %23 and %40"
_SCHEMES: Final = ("redis+sentinel", "rediss+sentinel")
_DEFAULT_PORT: Final = 26379
_MAX_PORT: Final = 65_535
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_SERVICE: Final = re.compile(r"[A-Za-z0-9._-]+")
_FORM: Final = "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE"
_OWN_PARAMETERS: Final = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class SentinelAddress:
    """The Sentinels that know the primary of `service`. `server_url` is the primary's URL with the service as host."""

    sentinels: tuple[tuple[str, int], ...]
    service: str
    server_url: str = field(repr=False)
    username: str | None = None
    password: str | None = field(default=None, repr=False)


def names_sentinels(url: str) -> bool:
    """Whether an address names Sentinels, by its scheme."""
    return url.partition(":")[0].lower() in _SCHEMES


def read_sentinel_address(url: str) -> SentinelAddress:
    """Return the parts of an address that names Sentinels; `server_url` is not checked yet.

    Errors: ValueError, without the name of the setting.
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme not in _SCHEMES or not rest:
        raise ValueError(f"is not an address of Sentinels: write {_FORM}")
    if "#" in rest:
        raise ValueError(f"must not have a #; {QUOTING}")
    place, _, query = rest.partition("?")
    places, _, path = place.partition("/")
    login, at, hosts = places.rpartition("@")
    if "@" in path or "@" in login or ("@" in query and not at):
        # This part of the address belongs to the password, so it is not shown.
        raise ValueError(f"has an @ in a wrong place; {QUOTING}")
    service, database = _service(path)
    own, others = _split_parameters(query)
    server_url = f"{scheme.partition('+')[0]}://{login}{at}{service}{f'/{database}' if database else ''}"
    return SentinelAddress(
        tuple(_sentinel(each) for each in hosts.split(",")),
        service,
        f"{server_url}?{urlencode(others, quote_via=quote)}" if others else server_url,
        own.get("sentinel_username"),
        own.get("sentinel_password"),
    )


def _sentinel(text: str) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    port = int(found[2] or _DEFAULT_PORT) if found else 0
    if found is None or not 0 < port <= _MAX_PORT:
        raise ValueError(f"names no Sentinel in {text!r}: write HOST or HOST:PORT, separated by commas, {_FORM}")
    return found[1].strip("[]"), port


def _service(path: str) -> tuple[str, str]:
    """Return service and database from the path of the address."""
    service, _, database = unquote(path).partition("/")
    if not _SERVICE.fullmatch(service) or service.isdigit():
        problem = f"names no service in {service!r}" if service else "names no service"
        raise ValueError(f"{problem}: write {_FORM}, with the service's name in the Sentinels' configuration")
    if database and not database.isdigit():
        raise ValueError(f"/{database} is not a database: write its number, {_FORM}/0")
    return service, database


def _split_parameters(query: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return the parameters for the Sentinels, and those for the primary."""
    own, others = dict[str, str](), list[tuple[str, str]]()
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OWN_PARAMETERS:
            others.append((name, value))
        elif name in own:
            raise ValueError(f"has {name!r} twice")
        elif not value:
            raise ValueError(f"has no value for {name!r}")
        else:
            own[name] = value
    return own, others
