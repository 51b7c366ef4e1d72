"""Types of settings: money and tables, such as caps, prices, routes and concurrency.

JSON is read with `parse_float=Decimal`, so that no price or cap is ever a float. Every validator raises a ValueError
whose text follows the name of its setting.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, Any, Final, cast

from pydantic import AfterValidator, BeforeValidator, ValidationError

from tollbook.schemas.identifiers import check_id
from tollbook.schemas.json_text import NotJson, RepeatedKey, parse_json
from tollbook.schemas.money import MAX_NANOUSD, NANOUSD_PER_USD, MoneyError, check_nanousd, nanousd_from_usd
from tollbook.schemas.policy_rules import MAX_USD_PER_MTOK, PriceRule, by_day, not_endless
from tollbook.schemas.problems import shown, unknown_name
from tollbook.schemas.tasks import MODEL_ID_PATTERN, MODEL_ID_WORDS

_MAX_CAP_USD: Final = MAX_NANOUSD // NANOUSD_PER_USD
_MIN_MEMORY_MB: Final = 64
_PRICE_FIELDS: Final = (
    "prompt", "completion", "cached", "cache_write", "image", "audio", "video", "image_output", "file", "web_search",
    "request",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CapTable:
    """Caps in nano-dollars: of single users, and of plans whose own cap is replaced."""

    users: Mapping[str, int] = field(default_factory=dict[str, int])
    plans: Mapping[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        for kind, caps in (("user", self.users), ("plan", self.plans)):
            for name, cap_nanousd in caps.items():
                check_nanousd(cap_nanousd, name=f"the cap of {kind} {name}")

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class ConcurrencyTable:
    """Concurrent calls of one worker, by stream; `default` is for streams without an entry."""

    default: int = 32
    streams: Mapping[str, int] = field(default_factory=dict[str, int])

    def of(self, stream: str) -> int:
        """Return the concurrent calls for one stream."""
        return self.streams.get(stream, self.default)

    def __str__(self) -> str:
        return str(self.default)


def _memory(value: str) -> str:
    """Return a memory limit in DuckDB's form."""
    found = re.fullmatch(r"([1-9]\d{0,6})\s*([MG]B)", value.strip().upper())
    if found is None or int(found[1]) * (1 if found[2] == "MB" else 1_000) < _MIN_MEMORY_MB:
        raise ValueError(f"must be a size such as 512MB or 2GB, at least {_MIN_MEMORY_MB}MB, not {shown(value)}")
    return found[1] + found[2]


def _usd_cap(value: object) -> int | None:
    return None if value is None else _nanousd(value)


def _concurrency(value: object) -> ConcurrencyTable:
    if isinstance(value, ConcurrencyTable):
        return value
    parsed = _json(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        return ConcurrencyTable(default=_calls(parsed))
    table = cast(dict[str, object], parsed)
    return ConcurrencyTable(streams={name: _calls(count, f"{name!r} ") for name, count in table.items()})


def _calls(value: object, subject: str = "") -> int:
    if type(value) is not int or not 1 <= value <= 10_000:
        raise ValueError(f"{subject}must be a whole number of calls from 1 to 10000, not {shown(value)}")
    return value


def _routes(value: object) -> dict[str, dict[str, object]]:
    # Numbers were read as Decimals, but a temperature is a float.
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
        normal_id = _user_id(user_id)
        if normal_id in users:
            raise ValueError(f"names user {shown(normal_id)} twice, in two spellings of Unicode")
        users[normal_id] = _nanousd(usd, f"the cap of user {shown(user_id)} ")
    plans = {
        name: _nanousd(usd, f"the cap of plan {name!r} ")
        for name, usd in _object(table.get("plans", {}), "'plans' ").items()
    }
    return CapTable(users, plans)


def _user_id(value: str) -> str:
    try:
        return check_id(value)
    except ValueError as exc:
        raise ValueError(f"a user id {exc}") from None


def _prices(value: object) -> dict[str, tuple[PriceRule, ...]]:
    prices: dict[str, tuple[PriceRule, ...]] = {}
    for model, entry in _object(value).items():
        if not re.fullmatch(MODEL_ID_PATTERN, model):
            raise ValueError(f"{shown(model)} must be {MODEL_ID_WORDS}")
        entries = cast(list[object], entry) if isinstance(entry, list) else [entry]
        dated = [each if isinstance(each, PriceRule) else _price(model, each) for each in entries]
        try:
            prices[model] = by_day(tuple(dated))
        except ValueError as exc:
            raise ValueError(f"{model!r} {exc}") from None
    return prices


def _price(model: str, entry: object) -> PriceRule:
    fields = _object(entry, f"{model!r} ")
    known = (*_PRICE_FIELDS, "from")
    for name in fields:
        if name not in known:
            raise ValueError(f"{model!r} has an {unknown_name('field', name, known)}")
    for name in ("prompt", "completion"):
        if fields.get(name) is None:
            raise ValueError(f"{name!r} of {model!r} is missing")
    usd = {
        name: _usd(fields[name], f"{name!r} of {model!r} ", MAX_USD_PER_MTOK)
        for name in _PRICE_FIELDS
        if fields.get(name) is not None
    }
    try:
        return PriceRule.model_validate({**usd, "from": fields.get("from")})
    except ValidationError:  # The amounts are valid, so the day is not.
        day = shown(fields.get("from"))
        raise ValueError(f"'from' of {model!r} must be a day in UTC such as '2026-12-01', not {day}") from None


def _nanousd(value: object, subject: str = "") -> int:
    return nanousd_from_usd(_usd(value, subject, _MAX_CAP_USD))


def _usd(value: object, subject: str, maximum: int) -> Decimal:
    """Return dollars as a number. Errors: ValueError for floats, bools, NaN, negatives and more than the maximum."""
    try:
        # `nanousd_from_usd` decides what is a valid amount.
        nanousd_from_usd(cast(Decimal, value))
        dollars = Decimal(cast(Decimal, value))
    except MoneyError:
        dollars = None
    if dollars is None or dollars > maximum:
        raise ValueError(f"{subject}must be dollars from 0 to {maximum}, not {shown(value)}")
    try:
        return not_endless(dollars)
    except ValueError as exc:
        raise ValueError(f"{subject}{exc}") from None


def _object(value: object, subject: str = "") -> dict[str, Any]:
    parsed = _json(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise ValueError(f"{subject}must be a JSON object, not {shown(parsed)}")  # noqa: TRY004 - pydantic turns only ValueErrors into problems.
    return cast(dict[str, Any], parsed)


def _json(text: str) -> object:
    try:
        return parse_json(text, parse_float=Decimal, parse_int=_int, parse_constant=float)
    except (NotJson, RepeatedKey) as exc:
        raise ValueError(str(exc)) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _int(digits: str) -> int:
    if len(digits) > 100:
        raise ValueError(f"has a number of {len(digits)} digits")
    return int(digits)


UsdCap = Annotated[int | None, BeforeValidator(_usd_cap)]
MemoryLimit = Annotated[str, AfterValidator(_memory)]
Concurrency = Annotated[ConcurrencyTable, BeforeValidator(_concurrency)]
RouteOverrides = Annotated[dict[str, dict[str, Any]], BeforeValidator(_routes)]
PriceOverrides = Annotated[dict[str, tuple[PriceRule, ...]], BeforeValidator(_prices)]
CapOverrides = Annotated[CapTable, BeforeValidator(_caps)]
