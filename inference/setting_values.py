"""Values of settings that have a form of their own: addresses, money, JSON tables.

JSON is read with `parse_float=Decimal`, so that no price or cap is ever a float.
Messages name what is wrong and never quote a value that may hold a password or a key.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, cast
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BeforeValidator, SecretStr

from tollbook.inference.prices.model_price import FOREVER_MS, DatedPrice, ModelPrice, price_from_usd
from tollbook.schemas.identifiers import check_id
from tollbook.schemas.money import MoneyError, nanousd_from_usd
from tollbook.schemas.plans import Plan
from tollbook.schemas.tasks import TaskStream

# A bound is tokens times price; this keeps it far from the largest amount the ledger can hold.
_MAX_USD_PER_MTOK: Final = 10_000
_PRICE_FIELDS: Final = ("prompt", "completion", "cached", "cache_write", "request")
_REDIS_PARAMETERS: Final = ("db", "username", "password", "client_name")
_MODEL_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,149}")


@dataclass(frozen=True, slots=True)
class CapTable:
    """Caps in nano-dollars that replace a plan's, for single users or for whole plans."""

    users: Mapping[str, int] = field(default_factory=dict[str, int])
    plans: Mapping[Plan, int] = field(default_factory=dict[Plan, int])

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class ConcurrencyTable:
    """Calls in flight, for every stream and for single ones."""

    default: int = 32
    streams: Mapping[str, int] = field(default_factory=dict[str, int])

    def of(self, stream: str) -> int:
        """Return the number for one stream."""
        return self.streams.get(stream, self.default)

    def total(self) -> int:
        """Return the number over the four task streams."""
        return sum(self.of(stream.value) for stream in TaskStream)

    def __str__(self) -> str:
        return str(self.default)


def _redis_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must begin with redis://, rediss:// or unix://")
    try:
        _ = parts.port
    except ValueError:
        # Python's own words would quote a part of a password that holds a / or a #.
        raise ValueError("has no valid port; quote /, ?, # and @ in a password as %2F, %3F, %23 and %40") from None
    # redis-py takes any option of its own as a parameter. Those that change how replies are read, or that send a
    # command again, would stop the workers or book a task twice; the others are for the connection alone.
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _REDIS_PARAMETERS and not (parts.scheme == "rediss" and name.startswith("ssl_")):
            known = ", ".join(_REDIS_PARAMETERS)
            raise ValueError(f"{name!r:.60} is not taken in a Redis address ({known}; ssl_... with rediss://)")
        if name == "db" and not text.isdecimal():
            raise ValueError("db must be the number of a database")
    return value


def _base_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http or https address such as https://openrouter.ai/api/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must hold no user name or password; the key goes into OPENROUTER_API_KEY")
    if parts.query or parts.fragment:
        raise ValueError("must have no query and no fragment")
    return value.rstrip("/")


def _api_key(value: SecretStr) -> SecretStr:
    # It goes into a header, where a line break would be an injection and other characters an error at every call.
    if not re.fullmatch(r"[\x21-\x7e]{1,1000}", value.get_secret_value()):
        raise ValueError("must be printable ASCII without spaces or line breaks")
    return value


def _usd_cap(value: object) -> int | None:
    return None if value is None else _nanousd(_number(value), "the cap")


def _concurrency(value: object) -> ConcurrencyTable:
    if isinstance(value, ConcurrencyTable):
        return value
    parsed = _json(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        return ConcurrencyTable(default=_calls(parsed, "it"))
    known = [stream.value for stream in TaskStream]
    table = cast(dict[str, object], parsed)
    if unknown := [name for name in table if name not in known]:
        raise ValueError(f"{unknown[0]!r} is not a stream ({', '.join(known)})")
    return ConcurrencyTable(streams={name: _calls(count, name) for name, count in table.items()})


def _calls(value: object, name: str) -> int:
    if type(value) is not int or not 1 <= value <= 10_000:
        raise ValueError(f"{name} must be a whole number of calls from 1 to 10000")
    return value


def _metrics_port(value: object) -> int | Literal["off"] | None:
    if value is None:
        return None
    if value == "off":
        return "off"
    port = int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
    if type(port) is not int or not 0 <= port <= 65_535:
        raise ValueError("must be a port from 1 to 65535, 0 for a free one, or off")
    return port


def _routes(value: object) -> dict[str, dict[str, object]]:
    table = _object(value, "it")
    # A float is what a temperature is; it was read as a Decimal with the rest.
    return {
        name: {key: float(item) if isinstance(item, Decimal) else item for key, item in _object(fields, name).items()}
        for name, fields in table.items()
    }


def _caps(value: object) -> CapTable:
    if isinstance(value, CapTable):
        return value
    table = _object(value, "it")
    if unknown := [name for name in table if name not in ("users", "plans")]:
        raise ValueError(f"{unknown[0]!r} is neither users nor plans")
    users = {
        check_id(user): _nanousd(_number(usd), user) for user, usd in _object(table.get("users", {}), "users").items()
    }
    plans: dict[Plan, int] = {}
    for name, usd in _object(table.get("plans", {}), "plans").items():
        if name not in list(Plan):
            raise ValueError(f"{name!r} is not a plan ({', '.join(Plan)})")
        plans[Plan(name)] = _nanousd(_number(usd), name)
    return CapTable(users, plans)


def _prices(value: object) -> dict[str, tuple[DatedPrice, ...]]:
    prices: dict[str, tuple[DatedPrice, ...]] = {}
    for model, entry in _object(value, "it").items():
        if not _MODEL_ID.fullmatch(model):
            raise ValueError(f"{model!r:.60} is not a model id")
        entries = cast(list[object], entry) if isinstance(entry, list) else [entry]
        dated = [
            each if isinstance(each, DatedPrice) else _dated_price(model, _object(each, model)) for each in entries
        ]
        starts = [each.from_ms for each in dated]
        if not dated or len(set(starts)) != len(starts):
            raise ValueError(f"{model}: needs prices that begin on different days")
        prices[model] = tuple(sorted(dated, key=lambda each: each.from_ms))
    return prices


def _dated_price(model: str, fields: dict[str, Any]) -> DatedPrice:
    if unknown := [name for name in fields if name not in (*_PRICE_FIELDS, "from")]:
        raise ValueError(f"{model}: {unknown[0]!r} is none of {', '.join(_PRICE_FIELDS)}, from")
    if missing := [name for name in ("prompt", "completion") if name not in fields]:
        raise ValueError(f"{model}: {missing[0]} is missing")
    usd = {name: _number(fields[name]) for name in _PRICE_FIELDS if fields.get(name) is not None}
    for name, amount in usd.items():
        if not 0 <= amount <= _MAX_USD_PER_MTOK:
            raise ValueError(f"{model}: {name} must be 0 to {_MAX_USD_PER_MTOK} dollars")
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
        raise ValueError(f"{model}: from must be a day such as 2026-12-01 (UTC)") from None
    return round(midnight.timestamp()) * 1000


def _number(value: object) -> Decimal:
    if isinstance(value, bool | float) or not isinstance(value, Decimal | int | str):
        raise ValueError("dollars must be a decimal number")  # noqa: TRY004 - pydantic turns only ValueErrors into lines.
    try:
        number = Decimal(value)
    except ArithmeticError:
        raise ValueError("dollars must be a decimal number") from None
    if not number.is_finite():
        raise ValueError("dollars must be a finite number")
    return number


def _nanousd(usd: Decimal, name: str) -> int:
    try:
        return nanousd_from_usd(usd)
    except MoneyError as exc:
        raise ValueError(f"{name}: {exc}") from None


def _object(value: object, name: str) -> dict[str, Any]:
    parsed = _json(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} must be a JSON object")  # noqa: TRY004 - as above.
    return cast(dict[str, Any], parsed)


def _json(text: str) -> object:
    try:
        return json.loads(text, parse_float=Decimal, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as exc:
        raise ValueError(f"is not JSON (character {exc.pos + 1}: {exc.msg})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("names something twice")
    return table


RedisUrl = Annotated[str, AfterValidator(_redis_url)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
ApiKey = Annotated[SecretStr, AfterValidator(_api_key)]
UsdCap = Annotated[int | None, BeforeValidator(_usd_cap)]
MetricsPort = Annotated[int | Literal["off"] | None, BeforeValidator(_metrics_port)]
Concurrency = Annotated[ConcurrencyTable, BeforeValidator(_concurrency)]
RouteOverrides = Annotated[dict[str, dict[str, Any]], BeforeValidator(_routes)]
PriceOverrides = Annotated[dict[str, tuple[DatedPrice, ...]], BeforeValidator(_prices)]
CapOverrides = Annotated[CapTable, BeforeValidator(_caps)]
