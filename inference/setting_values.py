"""Settings with a format of their own: addresses, money, JSON tables.

JSON is read with `parse_float=Decimal`, so that no price or cap is ever a float. Every validator raises a ValueError
that follows the name of its setting; no message shows a value that may hold a password or a key (G10).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, cast
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, SecretStr

from tollbook.inference.prices.model_price import FOREVER_MS, DatedPrice, ModelPrice, price_from_usd
from tollbook.ledger.server.address import check_address
from tollbook.schemas.identifiers import check_id
from tollbook.schemas.money import MAX_NANOUSD, NANOUSD_PER_USD, MoneyError, check_nanousd, nanousd_from_usd
from tollbook.schemas.plans import Plan
from tollbook.schemas.problems import shown, unknown_name
from tollbook.schemas.tasks import MODEL_ID_PATTERN, MODEL_ID_WORDS, TaskStream

# A bound is tokens times price; this limit keeps it far below the largest amount that the ledger can hold.
_MAX_USD_PER_MTOK: Final = 10_000
_MAX_CAP_USD: Final = MAX_NANOUSD // NANOUSD_PER_USD
_PRICE_FIELDS: Final = ("prompt", "completion", "cached", "cache_write", "request")


@dataclass(frozen=True, slots=True)
class CapTable:
    """Caps in nano-dollars of single users, and of plans where they replace the plan's own."""

    users: Mapping[str, int] = field(default_factory=dict[str, int])
    plans: Mapping[Plan, int] = field(default_factory=dict[Plan, int])

    def __post_init__(self) -> None:
        for kind, caps in (("user", self.users), ("plan", self.plans)):
            for name, cap_nanousd in caps.items():
                check_nanousd(cap_nanousd, name=f"the cap of {kind} {name}")

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class ConcurrencyTable:
    """Concurrent calls of one worker, by stream; `default` is for the streams that are not named."""

    default: int = 32
    streams: Mapping[str, int] = field(default_factory=dict[str, int])

    def of(self, stream: str) -> int:
        """Return the concurrent calls for one stream."""
        return self.streams.get(stream, self.default)

    def total(self) -> int:
        """Return the concurrent calls for all task streams together."""
        return sum(self.of(stream.value) for stream in TaskStream)

    def __str__(self) -> str:
        return str(self.default)


def _split_url(value: str) -> SplitResult:
    try:
        return urlsplit(value)
    except ValueError:
        # Python's own message would quote the host part, which may hold a password.
        raise ValueError("is not a valid address") from None


def _base_url(value: str) -> str:
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


def _api_key(value: SecretStr) -> SecretStr:
    # The key becomes a header: a line break would be an injection, and other characters an error at every call.
    if not re.fullmatch(r"[\x21-\x7e]{1,1000}", value.get_secret_value()):
        raise ValueError("must be 1 to 1000 printable ASCII characters without spaces and line breaks")
    return value


def _usd_cap(value: object) -> int | None:
    return None if value is None else _nanousd(value)


def _concurrency(value: object) -> ConcurrencyTable:
    if isinstance(value, ConcurrencyTable):
        return value
    parsed = _json(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        return ConcurrencyTable(default=_calls(parsed))
    table = cast(dict[str, object], parsed)
    for name in table:
        if name not in list(TaskStream):
            raise ValueError(unknown_name("stream", name, list(TaskStream)))
    return ConcurrencyTable(streams={name: _calls(count, f"{name!r} ") for name, count in table.items()})


def _calls(value: object, subject: str = "") -> int:
    if type(value) is not int or not 1 <= value <= 10_000:
        raise ValueError(f"{subject}must be a whole number of calls from 1 to 10000, not {shown(value)}")
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


def _routes(value: object) -> dict[str, dict[str, object]]:
    # A temperature is a float; it was read as a Decimal with the rest.
    return {
        name: {
            key: float(item) if isinstance(item, Decimal) else item
            for key, item in _object(fields, f"{shown(name)} ").items()
        }
        for name, fields in _object(value).items()
    }


def _caps(value: object) -> CapTable:
    if isinstance(value, CapTable):
        return value
    table = _object(value)
    for name in table:
        if name not in ("users", "plans"):
            raise ValueError(unknown_name("field", name, ("users", "plans")))
    users: dict[str, int] = {}
    for user_id, usd in _object(table.get("users", {}), "'users' ").items():
        users[_user_id(user_id)] = _nanousd(usd, f"the cap of user {shown(user_id)} ")
    plans: dict[Plan, int] = {}
    for name, usd in _object(table.get("plans", {}), "'plans' ").items():
        if name not in list(Plan):
            raise ValueError(unknown_name("plan", name, list(Plan)))
        plans[Plan(name)] = _nanousd(usd, f"the cap of plan {name!r} ")
    return CapTable(users, plans)


def _user_id(value: str) -> str:
    try:
        return check_id(value)
    except ValueError as exc:
        raise ValueError(f"a user id {exc}") from None


def _prices(value: object) -> dict[str, tuple[DatedPrice, ...]]:
    prices: dict[str, tuple[DatedPrice, ...]] = {}
    for model, entry in _object(value).items():
        if not re.fullmatch(MODEL_ID_PATTERN, model):
            raise ValueError(f"{shown(model)} must be {MODEL_ID_WORDS}")
        entries = cast(list[object], entry) if isinstance(entry, list) else [entry]
        dated = [each if isinstance(each, DatedPrice) else _dated_price(model, each) for each in entries]
        starts = [each.from_ms for each in dated]
        if not dated or len(set(starts)) != len(starts):
            raise ValueError(f"{model!r} must have one price or more, each with another 'from' day")
        prices[model] = tuple(sorted(dated, key=lambda each: each.from_ms))
    return prices


def _dated_price(model: str, entry: object) -> DatedPrice:
    fields = _object(entry, f"{model!r} ")
    known = (*_PRICE_FIELDS, "from")
    for name in fields:
        if name not in known:
            raise ValueError(f"{model!r} has an {unknown_name('field', name, known)}")
    for name in ("prompt", "completion"):
        if fields.get(name) is None:
            raise ValueError(f"{name!r} of {model!r} is missing")
    usd = {
        name: _usd(fields[name], f"{name!r} of {model!r} ", _MAX_USD_PER_MTOK)
        for name in _PRICE_FIELDS
        if fields.get(name) is not None
    }
    price: ModelPrice = price_from_usd(
        model,
        prompt=usd["prompt"],
        completion=usd["completion"],
        cached=usd.get("cached"),
        cache_write=usd.get("cache_write"),
        request=usd.get("request", Decimal(0)),
    )
    return DatedPrice(_midnight_ms(model, fields.get("from")), price)


def _midnight_ms(model: str, day: object) -> int:
    if day is None:
        return FOREVER_MS
    try:
        midnight = datetime.combine(date.fromisoformat(str(day)), time.min, UTC)
    except ValueError:
        raise ValueError(f"'from' of {model!r} must be a day in UTC such as '2026-12-01', not {shown(day)}") from None
    return round(midnight.timestamp()) * 1000


def _nanousd(value: object, subject: str = "") -> int:
    return nanousd_from_usd(_usd(value, subject, _MAX_CAP_USD))


def _usd(value: object, subject: str, maximum: int) -> Decimal:
    """Return dollars as a number. Errors: ValueError for floats, bools, NaN, negatives and more than the maximum."""
    try:
        # The money boundary decides what is an amount at all.
        nanousd_from_usd(cast(Decimal, value))
        dollars = Decimal(cast(Decimal, value))
    except MoneyError:
        dollars = None
    if dollars is None or dollars > maximum:
        raise ValueError(f"{subject}must be dollars from 0 to {maximum}, not {shown(value)}")
    return dollars


def _object(value: object, subject: str = "") -> dict[str, Any]:
    parsed = _json(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise ValueError(f"{subject}must be a JSON object, not {shown(parsed)}")  # noqa: TRY004 - pydantic turns only ValueErrors into problems.
    return cast(dict[str, Any], parsed)


def _json(text: str) -> object:
    try:
        return json.loads(text, parse_float=Decimal, parse_int=_int, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as exc:
        raise ValueError(f"is not JSON (character {exc.pos + 1})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _int(digits: str) -> int:
    if len(digits) > 100:
        raise ValueError(f"has a number of {len(digits)} digits")
    return int(digits)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"names {shown(twice)} twice")
    return table


RedisUrl = Annotated[str, AfterValidator(check_address)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
ApiKey = Annotated[SecretStr, AfterValidator(_api_key)]
UsdCap = Annotated[int | None, BeforeValidator(_usd_cap)]
MetricsPort = Annotated[int | Literal["off"] | None, BeforeValidator(_metrics_port)]
Concurrency = Annotated[ConcurrencyTable, BeforeValidator(_concurrency)]
RouteOverrides = Annotated[dict[str, dict[str, Any]], BeforeValidator(_routes)]
PriceOverrides = Annotated[dict[str, tuple[DatedPrice, ...]], BeforeValidator(_prices)]
CapOverrides = Annotated[CapTable, BeforeValidator(_caps)]
