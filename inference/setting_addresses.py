"""Types of settings: addresses, ports, keys, names, and how long to keep something.

Every validator raises a ValueError whose text follows the name of its setting. No message shows a value that may
contain a password or a key (G10).
"""

import base64
import re
from typing import Annotated, Final, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, StringConstraints

from tollbook.ledger.archive.s3_address import split_s3_url
from tollbook.ledger.server.address import check_address
from tollbook.schemas.expectations import Expected
from tollbook.schemas.problems import shown

_MAX_KEEP_S: Final = 10 * 366 * 86_400
# The limits of a Standard Webhooks secret.
_MIN_KEY_BYTES: Final = 16
_MAX_KEY_BYTES: Final = 128


def _split_url(value: str) -> SplitResult:
    try:
        return urlsplit(value)
    except ValueError:
        # Python's message would quote the host part, which may contain a password.
        raise ValueError("is not a valid address") from None


def check_base_url(value: str) -> str:
    """Return the address of a provider's API, without a slash at its end. Errors: ValueError."""
    parts = _split_url(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http or https address such as https://openrouter.ai/api/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must hold no user name and no password; put the key into OPENROUTER_API_KEY")
    if parts.query or parts.fragment:
        raise ValueError("must have no query (?...) and no fragment (#...)")
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("must have a port from 1 to 65535, or none") from None
    return value.rstrip("/")


def check_api_key(value: SecretStr) -> SecretStr:
    """Return a key that can be sent in a header. Errors: ValueError, which does not show the key."""
    # A line break would inject a header, and other characters would fail at every call.
    if not re.fullmatch(r"[\x21-\x7e]{1,1000}", value.get_secret_value()):
        raise ValueError("must be 1 to 1000 printable ASCII characters without spaces and line breaks")
    return value


def _metrics_port(value: object) -> int | Literal["off"] | None:
    if value is None:
        return None
    if value == "off":
        return "off"
    port = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,5}", value) else value
    if type(port) is not int or not 0 <= port <= 65_535:
        raise ValueError(f"must be a port from 1 to 65535, 0 for a free one, or 'off', not {shown(value)}")
    return port


_ORIGIN: Final = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?")


def _origins(value: object) -> object:
    if not isinstance(value, str):
        return value
    names = tuple(name for each in value.split(",") if (name := each.strip()))
    for name in names:
        if name != "*" and not _ORIGIN.fullmatch(name):
            raise ValueError(f"must be origins such as https://app.example.com, separated by commas, not {shown(name)}")
    return names


def _s3_url(value: str) -> str:
    split_s3_url(value)
    return value.rstrip("/")


def _seconds_or_off(given: object) -> float | None:
    if given is None or given == "off":
        return None
    try:
        seconds = float(str(given))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MAX_KEEP_S:
        raise ValueError(f"must be a number of seconds from 0 to {_MAX_KEEP_S}, or off, not {shown(given)}")
    return seconds


def _webhook_secret(value: SecretStr) -> SecretStr:
    try:
        key = base64.b64decode(value.get_secret_value().removeprefix("whsec_"), validate=True)
    except ValueError:
        key = b""
    if not _MIN_KEY_BYTES <= len(key) <= _MAX_KEY_BYTES:
        raise ValueError(
            f"must be 'whsec_' and {_MIN_KEY_BYTES} to {_MAX_KEY_BYTES} random bytes in base64, "
            "such as `echo whsec_$(openssl rand -base64 32)` prints"
        )
    return value


RedisUrl = Annotated[str, AfterValidator(check_address)]
BaseUrl = Annotated[str, AfterValidator(check_base_url)]
ApiKey = Annotated[SecretStr, AfterValidator(check_api_key)]
WebhookSecret = Annotated[SecretStr, AfterValidator(_webhook_secret)]
KeepSeconds = Annotated[float | None, BeforeValidator(_seconds_or_off)]
MetricsPort = Annotated[int | Literal["off"] | None, BeforeValidator(_metrics_port)]
Origins = Annotated[tuple[str, ...], BeforeValidator(_origins)]
Port = Annotated[int, Field(ge=1, le=65_535)]
S3Url = Annotated[str, AfterValidator(_s3_url)]
Namespace = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$"),
    Expected("1 to 64 of the characters a-z 0-9 . _ -, with a letter or a digit first"),
]
AppTitle = Annotated[
    str, StringConstraints(pattern=r"^[\x20-\x7e]{0,100}$"), Expected("at most 100 printable ASCII characters")
]
AppUrl = Annotated[
    str, StringConstraints(pattern=r"^https?://[\x21-\x7e]{1,200}$"), Expected("an http or https address")
]
ProviderId = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9-]{1,40}$"), Expected("a provider's id such as 'openrouter' or 'openai'")
]
